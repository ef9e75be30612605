"""The arguments of attribute and plan that are refused before any work is done, and all ways to say others."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from unittest import mock

import numpy as np
import pytest
import torch

import explaind_core as explaind
from explaind_core.errors import LayerError, QuestionError
from explaind_core.questions.question import Question
from explaind_core.run.run import Run
from explaind_core.testing import record_example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TRAIN = ("train", "test")


@lru_cache
def run() -> Run:
    return record_example(5)


def refused(**question) -> QuestionError:
    """``attribute`` and ``plan`` check alike."""
    errors = []
    for ask in (explaind.plan, lambda *a, **k: explaind.attribute(*a, **k, progress=False)):
        with pytest.raises(QuestionError) as error:
            ask(run(), INPUTS, **question)
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    return errors[0]


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (("step", "layers"), "there is no axis 'layers'"),
        (("gradient_step", "foo"), "there is no axis 'foo'"),
        (("step", "step"), "an axis is named twice"),
    ],
)
def test_axes_that_cannot_be_kept_are_refused(keep, what):
    error = refused(keep=keep)
    assert (error.what, error.where, error.got) == (what, "keep", keep)


def test_one_axis_needs_no_tuple():
    assert explaind.attribute(run(), INPUTS, keep="layer", nodes=1, progress=False).kernel.dims == ("layer",)


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        (slice(0, 3), "the slice of steps reaches outside the run"),
        (slice(2, 7), "the slice of steps reaches outside the run"),
        (slice(-2, None), "the slice of steps reaches outside the run"),
        (slice(5, 1, -1), "the slice of steps reaches outside the run"),
        (slice(3, 3), "no step is asked for"),
        ([], "no step is asked for"),
        ([3, 2], "steps must rise and not repeat"),
        ([2, 2], "steps must rise and not repeat"),
        ([1, 6], "the run has no step 6"),
        (0, "the run has no step 0"),
        ([1.5], "steps are not whole numbers"),
        ("first", "steps are not whole numbers"),
        (2.0, "steps are not whole numbers"),
    ],
)
def test_steps_that_are_not_there_are_refused(steps, what):
    assert refused(steps=steps).what == what


@pytest.mark.parametrize("steps", [np.int64(3), torch.tensor(3), [np.int64(3)], torch.tensor([3]), np.array([3])])
def test_steps_may_be_numpy_or_torch_numbers(steps):
    assert Question.ask(run(), INPUTS, steps=steps).steps == (3,)


@pytest.mark.parametrize("steps", [slice(None), slice(1, 6), slice(1, None), slice(None, 6), range(1, 6), None])
def test_all_steps_can_be_said_in_many_ways(steps):
    assert Question.ask(run(), INPUTS, steps=steps).steps == (1, 2, 3, 4, 5)


def test_layers_are_resolved_before_any_work():
    with pytest.raises(LayerError, match="matches no parameter"):
        explaind.plan(run(), INPUTS, layers=["encoder"])


def test_an_unknown_engine_is_refused():
    with pytest.raises(QuestionError, match="there is no such engine") as error:
        explaind.attribute(run(), INPUTS, engine="cluster")
    assert error.value.got == "cluster"


def test_a_run_without_its_model_cannot_be_asked():
    record = run()
    opened = explaind.open_run(record.path)
    with pytest.raises(QuestionError, match="the run was opened without its model") as error:
        explaind.plan(opened, INPUTS)
    assert error.value.remedy == "open_run(path, model=model)"


# ------------------------------------------------------------------ what cannot be
@contextlib.contextmanager
def at_once():
    """Nothing may be decomposed."""
    names = ("Decomposer.steps", "Decomposer.__init__")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(
                mock.patch(f"explaind_core.decomposition.decompose.{name}", side_effect=AssertionError(name))
            )
        yield


@pytest.mark.parametrize(
    ("question", "wording"),
    [
        ({"keep": TRAIN, "memory": 64, "strategy": "adjoint"}, "does not fit into the memory budget"),
        ({"keep": TRAIN, "memory": 64, "strategy": "features"}, "does not fit into the memory budget"),
        ({"keep": TRAIN, "memory": 64}, "does not fit into the memory budget"),
        ({"keep": ("step", "parameter", "train"), "memory": 64}, "does not fit into the memory budget"),
        ({"keep": ("gradient_step", "test"), "memory": 64}, "does not fit into the memory budget"),
        ({"keep": ("parameter",), "memory": 64}, "does not fit into the memory budget"),
        ({"keep": ("parameter",), "strategy": "forward"}, "cannot keep single parameters"),
        ({"keep": ("parameter", "train"), "strategy": "forward"}, "cannot keep single parameters"),
        ({"keep": TRAIN, "strategy": "reverse"}, "cannot tell gradients apart"),
        ({"keep": ("test",), "gradient_steps": [1], "strategy": "reverse"}, "cannot tell gradients apart"),
        ({"keep": ("test",), "strategy": "features"}, "cannot do without an axis or a restriction"),
        ({"strategy": "backward"}, "there is no such strategy"),
    ],
)
def test_what_cannot_be_is_refused_at_once_and_alike(question, wording):
    with at_once():
        error = refused(**question)
    assert wording in error.what
    assert error.remedy if "strategy" in error.what and "no such" not in error.what else error.expected
