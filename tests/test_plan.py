"""plan(): what an attribution would do; and the arguments that are refused before any work is done."""

from __future__ import annotations

import contextlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.budget import parse_memory
from explaind_core.errors import LayerError, QuestionError
from explaind_core.question import Question
from explaind_core.run import Run
from explaind_core.testing import record_example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def run(dtype: torch.dtype = torch.float64) -> Run:
    return record_example(5, dtype=dtype)


def refused(**question) -> QuestionError:
    """``attribute`` and ``plan`` check alike."""
    errors = []
    for ask in (explaind.plan, lambda *a, **k: explaind.attribute(*a, **k, progress=False)):
        with pytest.raises(QuestionError) as error:
            ask(run(), INPUTS, **question)
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    return errors[0]


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
    assert explaind.plan(run(), INPUTS, keep=("step",), nodes=1).tangents == 2


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


def test_a_result_that_just_fits_is_computed():
    needed = explaind.plan(run(), INPUTS, nodes=1).result_bytes
    assert explaind.attribute(run(), INPUTS, nodes=1, memory=needed, progress=False).sizes["step"] == 5
    with pytest.raises(QuestionError, match="memory budget"):
        explaind.attribute(run(), INPUTS, nodes=1, memory=needed - 1, progress=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 2**32), ("1.5 KiB", 1536), (" 2MB ", 2_000_000), ("7", 7), (12, 12), ("3B", 3), ("0.5MiB", 2**19),
        ("1GB", 10**9), ("2KB", 2000), (".5KiB", 512),
    ],
)  # fmt: skip
def test_an_amount_of_memory_is_bytes_or_has_a_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "4 gib", "-1GiB", "1.2.3GiB", ".", "4TiBs", "GiB", None, "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(QuestionError, match="memory is no amount of memory") as error:
        parse_memory(text)
    assert "4GiB" in error.value.expected


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=6))
def test_any_text_is_an_amount_of_memory_or_refused(text):
    with contextlib.suppress(QuestionError):
        assert parse_memory(text) >= 0


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


def test_a_plan_leaves_the_run_unasked(monkeypatch):
    """Nothing is decomposed for it."""
    import sys

    monkeypatch.setattr(sys.modules["explaind_core.stepwise"], "decompose", None)
    assert explaind.plan(run(), INPUTS, nodes=1).steps == 5
