"""Modes that store less: what is computed again is, bit by bit, what mode="steps" stores of the same training."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from support.mode_trainings import TRAININGS, Training, cnn, record

K = 3
STEPS = 7


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module", params=sorted(TRAININGS))
def runs(request, tmp_path_factory):
    """The same training, recorded in the three modes."""
    training, found = TRAININGS[request.param], {}
    for mode in ("steps", "parameters", "snapshots"):
        path = tmp_path_factory.mktemp(mode) / "run"
        found[mode] = record(training, path, STEPS, mode=mode, snapshot_every=K)
    return training, found


@pytest.mark.parametrize("mode", ["parameters", "snapshots"])
def test_every_tensor_of_every_step_is_the_same(runs, mode):
    reference, run = runs[1]["steps"], runs[1][mode]
    for s in [*run.steps, *reversed(run.steps)]:
        assert same(run.theta(s), reference.theta(s))
        assert same(run.buffers(s), reference.buffers(s))
        assert same(run.gradients(s), reference.gradients(s))
        assert same(run.theta(s, point="gradient"), reference.theta(s, point="gradient"))
        assert run.hyper(s) == reference.hyper(s)
        assert run.clips(s) == reference.clips(s)
        assert torch.equal(run.batch(s).ids, reference.batch(s).ids)
    before = torch.get_rng_state()
    run.close()
    run.gradients(STEPS)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", ["parameters", "snapshots"])
def test_attribution_is_the_same(runs, mode):
    training, found = runs
    keep = ("step", "layer", "test", "output")
    results = [explaind.attribute(found[m], training.x[:3], keep=keep, progress=False) for m in ("steps", mode)]
    for name in results[0].data_vars:
        assert (results[0][name].values == results[1][name].values).all(), name
    explained = [list(explaind.decompose(found[m])) for m in ("steps", mode)]
    for a, b in zip(*explained, strict=True):
        assert a.drift == b.drift
        assert a.error == b.error


@settings(max_examples=8, deadline=None, database=None)
@given(every=st.integers(1, 6), count=st.integers(1, 6), asked=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_any_distance_of_snapshots_any_length_any_order_of_questions(every, count, asked):
    training = Training(model=cnn, pieces=(3, 2), clip_norm=0.5)
    with tempfile.TemporaryDirectory() as folder:
        reference = record(training, f"{folder}/steps", count)
        for mode in ("parameters", "snapshots"):
            run = record(training, f"{folder}/{mode}", count, mode=mode, snapshot_every=every)
            for s in [s for s in asked if s <= count]:
                assert same(run.gradients(s), reference.gradients(s))
                assert same(run.theta(s), reference.theta(s))
                assert same(run.buffers(s - 1), reference.buffers(s - 1))
            run.close()
