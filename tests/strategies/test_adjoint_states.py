"""When the reverse-time adjoint forgets: what is rounding of what it was, and what had not appeared before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import explaind_core as explaind
from explaind_core.strategies.adjoint_walk import AdjointWalk, State
from support.axes_oracle import assert_answers, influences
from support.axes_runs import BATCHES, DATA, INPUTS, TARGETS, network, record_batches
from support.growing_filter import Grown


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("share", "kept"), [(1.01, True), (0.99, False), (0.0, False)])
def test_a_window_is_forgotten_below_the_rounding_of_what_it_was(dtype, share, kept):
    """And only behind its first step; what was zero anyway was not dropped."""
    peak = 8.0
    size = share * torch.finfo(dtype).eps * peak
    state = State({(0, "weight"): (torch.tensor([0.6 * size]), torch.tensor([0.8 * size]))}, peak)
    question = SimpleNamespace(function=SimpleNamespace(dtype=dtype), windows=[SimpleNamespace(steps=(5, 6))])
    for s, forgotten in ((6, False), (5, not kept), (1, not kept)):
        walk = SimpleNamespace(question=question, alive={0: state}, dropped={})
        AdjointWalk._drop(walk, s)
        assert (0 not in walk.alive) == forgotten
        assert walk.dropped == ({0: s} if forgotten and share and s > 1 else {})


def test_the_walk_ends_where_a_state_had_not_appeared(monkeypatch):
    schedule = [{"momentum": mu} for mu in (0.0, 0.0, 0.0, 0.8)]
    run = record_batches(
        network(), lambda ps: torch.optim.SGD(ps, lr=0.2), DATA, TARGETS, BATCHES, schedule=schedule, rule=Grown()
    )  # fmt: skip
    run = explaind.open_run(run.path, model=run.model, rule=Grown())
    walked, advance = [], AdjointWalk.advance

    def seen(self, split, *rest):
        walked.append(split.step)
        return advance(self, split, *rest)

    monkeypatch.setattr(AdjointWalk, "advance", seen)
    keep, question = ("step", "train", "test"), {"steps": {"last": [4]}}
    result = explaind.attribute(run, INPUTS, keep=keep, nodes=1, strategy="adjoint", progress=False, **question)
    assert walked == [4, 3]
    assert_answers(result, influences(run, INPUTS, 1), keep, **question)
