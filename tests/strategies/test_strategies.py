"""The type that a strategy is: a new one is a class and an entry in one tuple; and which one is chosen."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import pytest
import torch
import xarray as xr
import zarr

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.question import Question
from explaind_core.strategies.choose import STRATEGIES, choose
from explaind_core.strategies.forward import Forward
from explaind_core.strategies.probe import Estimate
from explaind_core.strategies.strategy import Choice, Strategy
from explaind_core.testing import record_example

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.strategies.choose")
INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Toy(Strategy):
    """The answers of forward mode, two test samples at a time, all windows of each."""

    name = "toy"
    along = "test"
    derivatives_are = "toys"

    def __init__(self, effort: float | None = None, bytes_held: int = 7) -> None:
        self.effort, self.bytes_held = effort, bytes_held

    def refuses(self, question):
        return self.cannot("keep layers", "sum over them") if question.keeps("layer") else None

    def holds(self, question, outputs):
        return Choice(self, 2, 2, 1, "", self.bytes_held, 11)

    def work(self, question, outputs):
        return self.effort

    def probe(self, probe, choice):
        return Estimate(12.0, 5)

    def derivatives(self, question, outputs):
        return 13

    def contributions(self, question, ends, choice, *, done=0, block, progress=True):
        forward = Forward()
        samples = question.function.samples
        windows = list(forward.contributions(question, ends, forward.holds(question, 3), block=block, progress=False))
        for start in range(done, samples, choice.rows):
            rows = slice(start, min(start + choice.rows, samples))
            for w in windows:
                terms = {name: value[rows] for name, value in w.terms.items()}
                edges = {name: getattr(w, name)[rows] for name in ("residual", "omitted", "statistics")}
                yield replace(w, terms=terms, **edges)


@pytest.fixture(scope="module")
def run():
    return record_example(4)


@pytest.fixture
def known(monkeypatch):
    def make(*arguments):
        toy = Toy(*arguments)
        monkeypatch.setattr(module, "STRATEGIES", (*STRATEGIES, toy))
        return toy

    return make


KEEP = ("step", "test", "output")


def ask(run, strategy="toy", keep=KEEP, **question) -> xr.Dataset:
    return explaind.attribute(run, INPUTS, keep=keep, nodes=1, strategy=strategy, progress=False, **question)


def test_a_strategy_that_nobody_knows_is_refused_with_those_that_are_known(run, known):
    with pytest.raises(QuestionError, match="there is no such strategy") as error:
        ask(run)
    assert error.value.expected == ("forward", "reverse", "features", "adjoint")
    known()
    with pytest.raises(QuestionError, match="there is no such strategy") as error:
        ask(run, "joy")
    assert error.value.expected == ("forward", "reverse", "features", "adjoint", "toy")
    assert (error.value.where, error.value.got) == ("strategy", "joy")


@pytest.mark.parametrize("keep", [KEEP, ("test",)])
def test_a_new_strategy_answers(run, known, keep, tmp_path):
    """In memory and block by block on disk, without anything else knowing it."""
    known()
    usual, found = ask(run, "forward", keep=keep), ask(run, keep=keep)
    assert found.attrs["strategy"] == "toy"
    xr.testing.assert_equal(found, usual)
    stored = ask(run, keep=keep, out=tmp_path / "result.zarr")
    assert zarr.open_group(tmp_path / "result.zarr")["kernel"].chunks[keep.index("test")] == 2
    xr.testing.assert_identical(stored.load(), ask(run, keep=keep))


def test_a_new_strategy_is_planned(run, known):
    known()
    made = explaind.plan(run, INPUTS, keep=KEEP, strategy="toy")
    told = (made.strategy, made.tangents, made.derivatives_are, made.passes, made.seconds, made.gradient_steps)
    assert told == ("toy", 13, "toys", 2, 12.0, 5)
    assert made.peak_bytes >= made.result_bytes + 7 + 11
    assert "toy mode: 4 steps x 2 nodes x 13 toys" in str(made)


def test_a_new_strategy_refuses(run, known):
    known(0.0)
    with pytest.raises(QuestionError, match="the strategy 'toy' cannot keep layers") as error:
        ask(run, keep=("layer", "test"))
    assert error.value.remedy == "sum over them"
    assert explaind.plan(run, INPUTS, keep=("layer", "test")).strategy != "toy"


@pytest.mark.parametrize(
    ("effort", "bytes_held", "chosen"),
    [
        (0.0, 7, "toy"), (None, 7, "forward"), (math.inf, 7, "forward"), (0.0, 2**40, "forward"), (8.0, 7, "toy"),
        (8.1, 7, "forward"),
    ],
)  # fmt: skip
def test_the_cheapest_that_fits_is_chosen(run, known, effort, bytes_held, chosen):
    """Two layers are eight passes forwards; of two that cost the same, it is the later one."""
    toy = known(effort, bytes_held)
    question = Question.ask(run, INPUTS)
    assert choose(question, 3).strategy.name == "forward"  # which keeps layers
    toy.refuses = lambda _: None
    assert choose(question, 3).strategy.name == chosen


def test_a_strategy_that_does_not_fit_is_named(run, known):
    known(0.0, 2**40)
    with pytest.raises(QuestionError, match="does not fit into the memory budget") as error:
        ask(run)
    assert error.value.where.startswith("strategy 'toy', {")
