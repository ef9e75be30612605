"""plan(): what an attribution would do, and that it does it."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import tempfile
from functools import lru_cache
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.decomposition.decompose import Decomposer
from explaind_core.errors import QuestionError
from explaind_core.run.run import Run
from explaind_core.store import readable_size
from explaind_core.strategies.adjoint_walk import AdjointWalk
from explaind_core.strategies.shares import GradientSplitter
from explaind_core.testing import record_example
from support.axes_oracle import SUBSETS
from support.axes_runs import example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def run(dtype: torch.dtype = torch.float64) -> Run:
    return record_example(5, dtype=dtype)


def test_a_plan_says_what_would_be_done():
    made = explaind.plan(run(), INPUTS, steps=slice(2, 5), nodes=3)
    assert (made.strategy, made.steps, made.nodes, made.chunks) == ("forward", 3, 3.0, 1)
    assert made.tangents == 2 * 2  # layers x terms
    assert made.fits
    assert made.seconds > 0


def test_a_plan_guesses_two_nodes_for_an_adaptive_question():
    assert explaind.plan(run(), INPUTS).nodes == 2.0


def test_a_plan_counts_the_rest_as_one_tangent_and_one_layer_where_layers_are_summed():
    assert explaind.plan(run(), INPUTS, layers=["2"], nodes=1).tangents == 2 + 1
    assert explaind.plan(run(), INPUTS, keep=("step",), nodes=1, strategy="forward").tangents == 2


def test_a_plan_counts_chunks():
    assert explaind.plan(run(), torch.zeros(7, 4).double(), nodes=1, chunk=3).chunks == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [("step", "layer", "test", "output"), ("step", "test"), ("layer", "output"), ()])
def test_the_size_of_the_result_is_known_beforehand(keep, dtype):
    made = explaind.plan(run(dtype), INPUTS.to(dtype), keep=keep, nodes=1)
    result = explaind.attribute(run(dtype), INPUTS.to(dtype), keep=keep, nodes=1, progress=False)
    large = ("kernel", "regularization", "residual", "omitted")
    assert made.result_bytes == sum(result[name].nbytes for name in large)


def test_a_plan_that_exceeds_the_budget_says_so():
    made = explaind.plan(run(), INPUTS, nodes=1, memory="1 KiB")
    assert not made.fits
    assert "MORE than the memory budget" in str(made)
    assert "MORE" not in str(explaind.plan(run(), INPUTS, nodes=1))
    assert "5 steps x 1 nodes x 4 tangents, 1 chunk(s)" in str(made)


def test_a_result_that_does_not_fit_is_refused_with_what_to_do():
    with pytest.raises(QuestionError) as error:
        explaind.attribute(run(), INPUTS, memory="1KiB", nodes=1, progress=False)
    assert error.value.what == "the result does not fit into the memory budget"
    assert error.value.where == "{'step': 5, 'layer': 2, 'test': 3, 'output': 3}"
    assert (error.value.expected, error.value.got) == ("at most 1.0 KiB", "2.1 KiB")
    assert "keep fewer axes" in error.value.remedy
    assert "out=" in error.value.remedy


@pytest.mark.parametrize("ask", [explaind.plan, explaind.attribute])
def test_what_does_not_fit_is_said_by_one_sample(ask):
    """The outputs of a language model's rows need not fit into memory to be counted."""
    passed = []

    def output(call, inputs):
        passed.append(len(inputs))
        return call(inputs).repeat(1, 1000)

    with contextlib.suppress(QuestionError):
        made = ask(run(), INPUTS, output=output, memory="32KiB", progress=False)
        assert not made.fits
        assert math.isnan(made.seconds)
        assert "not timed" in str(made)
    assert passed == [1]


def test_a_result_that_just_fits_is_computed():
    needed = explaind.plan(run(), INPUTS, nodes=1).result_bytes
    assert explaind.attribute(run(), INPUTS, nodes=1, memory=needed, progress=False).sizes["step"] == 5
    with pytest.raises(QuestionError, match="memory budget"):
        explaind.attribute(run(), INPUTS, nodes=1, memory=needed - 1, progress=False)


def test_a_plan_leaves_the_run_unasked(monkeypatch):
    """Nothing is decomposed for it."""
    monkeypatch.setattr(sys.modules["explaind_core.strategies.stepwise"], "decompose", None)
    assert explaind.plan(run(), INPUTS, nodes=1).steps == 5


# ------------------------------------------------------------------ every strategy
def descent(momentum: float = 0.0):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=momentum)


@lru_cache
def others(momentum: float = 0.0, steps: int = 8) -> Run:
    return record_example(steps, make_optimizer=descent(momentum))


TRAIN = ("train", "test")
#: (kept axes, what else is asked), and what is planned: strategy, passes, gradient_steps, tangents.
PLANNED = [
    (("step", "layer", "test", "output"), {}, ("forward", 1, 0, 4)),
    (("step",), {}, ("reverse", 1, 0, 1)),
    (("parameter", "test", "output"), {}, ("reverse", 1, 0, 3)),
    (("step", "parameter"), {}, ("reverse", 1, 0, 1)),
    (("layer", "test", "output"), {"train": [0, 1, 2, 3, 4]}, ("forward", 1, 5, None)),  # tangents: below
    (("parameter", "test"), {"train": [0, 1, 2, 3, 4]}, ("features", 1, 5, 1)),
    (("parameter", "train", "test", "output"), {}, ("features", 1, 5, 3)),
    (TRAIN, {}, ("adjoint", 1, 5, 1)),
    (("gradient_step", "test", "output"), {"strategy": "adjoint"}, ("adjoint", 1, 0, 3)),
    (TRAIN, {"memory": 65_000, "strategy": "adjoint"}, ("adjoint", 1, 5, 1)),
    (TRAIN, {"strategy": "features"}, ("features", 1, 5, 1)),
    (("step", "layer", "test", "output"), {"strategy": "reverse"}, ("reverse", 1, 0, 3)),
    (("gradient_step", "step"), {"strategy": "adjoint"}, ("adjoint", 1, 0, 1)),
]


@pytest.fixture(scope="module")
def known_ids():
    return sorted({i for s in run().steps for i in run().sample_ids(s).tolist()})


@pytest.mark.parametrize(("keep", "question", "expected"), PLANNED)
def test_every_strategy_is_planned(keep, question, expected, known_ids):
    question = question | ({"train": known_ids[:5]} if "train" in question else {})
    made = explaind.plan(run(), INPUTS, keep=keep, nodes=1, **question)
    names = ("strategy", "passes", "gradient_steps", "tangents")
    expected = (*expected[:3], expected[3] or made.tangents)
    assert tuple(getattr(made, name) for name in names) == expected
    assert made.steps == 5
    assert made.seconds > 0
    assert made.peak_bytes > made.result_bytes


@pytest.mark.parametrize(
    ("keep", "question"),
    [
        (("step", "layer", "test"), {}), (("step", "parameter"), {}), (("parameter", "train"), {}), (TRAIN, {}),
        (TRAIN, {"strategy": "features"}), (("gradient_step", "test"), {}), (("layer",), {"gradient_steps": [1, 2]}),
        (TRAIN, {"steps": {"a": [1, 2], "b": [4, 5]}}), (("test",), {"train": [0, 1]}), (("step", *TRAIN), {}),
    ],
)  # fmt: skip
def test_what_is_planned_is_done(keep, question, known_ids):
    question = question | ({"train": known_ids[:2]} if "train" in question else {})
    made = explaind.plan(run(), INPUTS, keep=keep, nodes=1, **question)
    result = explaind.attribute(run(), INPUTS, keep=keep, nodes=1, progress=False, **question)
    assert result.attrs["strategy"] == made.strategy


def least(**question) -> int:
    """The least power of two that is enough."""
    for memory in (2**k for k in range(8, 24)):
        with contextlib.suppress(QuestionError):
            explaind.plan(run(), INPUTS, nodes=1, memory=memory, **question)
            return memory
    raise AssertionError


def test_the_passes_that_are_planned_are_made(monkeypatch):
    """As few test samples at a time as fit, and a pass over the run for each block."""
    module = sys.modules["explaind_core.strategies.adjoint"]
    blocks = []

    class Spy(AdjointWalk):
        def __init__(self, question, tape, block, *arguments, **options):
            blocks.append(block)
            super().__init__(question, tape, block, *arguments, **options)

    monkeypatch.setattr(module, "AdjointWalk", Spy)
    question = {"keep": TRAIN, "strategy": "adjoint", "nodes": 1}
    passes = set()
    inputs = torch.randn(7, 4).double()
    for memory in (least(keep=TRAIN, strategy="adjoint"), 2**15, 2**16, "4GiB"):
        made = explaind.plan(run(), inputs, memory=memory, **question)
        blocks.clear()  # the one that was timed
        explaind.attribute(run(), inputs, memory=memory, progress=False, **question)
        assert made.passes == len(blocks)
        passes.add(made.passes)
    assert {7, 1} < passes


def test_tangents_of_what_gradients_are_restricted_to_are_planned():
    """Of two layers: the kernel of what is asked for, that of all else, and the regularization."""
    assert explaind.plan(run(), INPUTS, gradient_steps=[1, 2], nodes=1, strategy="forward").tangents == 2 * 3


@pytest.mark.parametrize("steps", [None, [7, 8], [3], {"a": [2], "b": [6]}])
@pytest.mark.parametrize(
    ("momentum", "keep", "strategy"),
    [
        (0.001, TRAIN, "adjoint"),
        (0.9, TRAIN, "adjoint"),
        (0.9, TRAIN, "features"),
        (0.001, TRAIN, "features"),
        (0.9, ("gradient_step",), "adjoint"),
    ],
)
def test_gradients_of_samples_are_planned_where_they_are_taken(momentum, keep, strategy, steps):
    planned, taken = gradient_steps(others(momentum), keep=keep, steps=steps, strategy=strategy)
    # What is dropped is less than what a bound says it is.
    assert len(taken) <= planned <= len(taken) + 1


@pytest.mark.parametrize(
    ("momentum", "keep", "strategy"),
    [(0.0, TRAIN, "adjoint"), (0.9, ("gradient_step",), "features")],
)
def test_gradients_are_planned_where_nothing_is_remembered_or_none_is_split(momentum, keep, strategy):
    planned, taken = gradient_steps(others(momentum, 20), keep=keep, steps=[19, 20], strategy=strategy)
    assert planned == len(taken)


def gradient_steps(one: Run, **question) -> tuple[int, set[int]]:
    """At how many steps gradients of samples are planned; and where they are taken."""
    taken = []

    original = GradientSplitter.shares

    def spy(self, split, names):
        taken.append(split.step)
        return original(self, split, names)

    made = explaind.plan(one, INPUTS, nodes=1, **question)
    with mock.patch.object(GradientSplitter, "shares", spy):
        explaind.attribute(one, INPUTS, nodes=1, progress=False, **question)
    assert len(taken) == len({*taken})
    return made.gradient_steps, {*taken}


# ------------------------------------------------------------------ sizes
@settings(deadline=None, max_examples=25)
@given(
    keep=st.sampled_from(SUBSETS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    steps=st.sampled_from([None, [2, 4], {"a": [1, 2], "b": [4]}]),
    gradient_steps=st.sampled_from([None, [1, 2]]),
    train=st.sampled_from([None, 3, {"x": 2, "y": 3}]),
    layers=st.sampled_from([None, ["2"], {"row": {"0.weight": 1}, "bias": "0.bias"}]),
    test=st.sampled_from([None, [1]]),
    used=st.booleans(),
)
def test_the_size_of_any_result_is_known_beforehand(keep, dtype, steps, gradient_steps, train, layers, test, used):
    one = resumed() if used else run(dtype)
    ids = sorted({i for s in (1, 2) for i in one.sample_ids(s).tolist()})
    train = ids[:train] if isinstance(train, int) else train and {"x": ids[:2], "y": ids[2:5]}
    question = {
        "keep": keep, "steps": steps, "gradient_steps": gradient_steps, "train": train, "layers": layers, "test": test,
    }  # fmt: skip
    inputs = INPUTS[:, :3] if used else INPUTS.to(dtype)
    made = explaind.plan(one, inputs, nodes=1, **question)
    result = explaind.attribute(one, inputs, nodes=1, progress=False, **question)
    large = ("kernel", "regularization", "prehistory", "residual", "omitted")
    assert made.result_bytes == sum(result[name].nbytes for name in large if name in result)
    assert ("prehistory" in result) == used
    assert (made.strategy, made.fits) == (result.attrs["strategy"], True)


def resumed() -> Run:
    return example("nesterov", "used")


# ------------------------------------------------------------------ a plan is cheap
@pytest.mark.parametrize(("keep", "question", "expected"), PLANNED)
def test_a_plan_replays_two_steps_and_leaves_nothing_behind(keep, question, expected, known_ids, tmp_path, monkeypatch):
    question = question | ({"train": known_ids[:5]} if "train" in question else {})
    seen, folders = [], []
    original = Decomposer.steps

    def steps(self, *arguments, **options):
        for split in original(self, *arguments, **options):
            seen.append(split.step)
            yield split

    def folder(*arguments, **options):
        folders.append(options)
        return made(*arguments, **options)

    made = tempfile.mkdtemp
    run()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", folder)
    monkeypatch.setattr(Decomposer, "steps", steps)
    explaind.plan(run(), INPUTS, keep=keep, nodes=1, **question)
    assert seen == [1, 2]
    assert not list(tmp_path.iterdir())
    assert not folders


def test_a_run_of_one_step_is_planned():
    assert explaind.plan(others(0.9, 1), INPUTS, keep=TRAIN, nodes=1).gradient_steps == 1


TOLD = re.compile(
    r"(?P<strategy>\w+) mode: (?P<steps>\d+) steps x (?P<nodes>[\d.]+) nodes x (?P<tangents>\d+) "
    r"(?P<what>tangents|rows per test sample), (?P<chunks>\d+) chunk\(s\) of test samples, "
    r"(?P<passes>\d+) pass\(es\) over the run(?:; gradients of samples at (?P<gradient_steps>\d+) steps)?; "
    r"about (?P<seconds>\d+) s, (?P<peak>[\d.]+ \w+) at most, of which (?P<result>[\d.]+ \w+) for the result"
    r"(?P<more>, MORE than the memory budget)?"
)


@pytest.mark.parametrize(("keep", "question", "expected"), PLANNED)
def test_a_plan_tells_all_that_it_knows(keep, question, expected, known_ids):
    question = question | ({"train": known_ids[:5]} if "train" in question else {})
    made = explaind.plan(run(), INPUTS, keep=keep, nodes=1, **question)
    told = TOLD.fullmatch(str(made))
    assert told
    for name in ("strategy", "steps", "nodes", "tangents", "chunks", "passes", "gradient_steps"):
        value = getattr(made, name)
        assert told[name] == (
            None if name == "gradient_steps" and not value else f"{value:g}" if name == "nodes" else str(value)
        )
    assert told["what"] == ("tangents" if made.strategy == "forward" else "rows per test sample")
    assert told["seconds"] == f"{made.seconds:.0f}"
    assert told["peak"] == readable_size(made.peak_bytes)
    assert told["result"] == readable_size(made.result_bytes)
    assert (told["more"] is None) == made.fits
