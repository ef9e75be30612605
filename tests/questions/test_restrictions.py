"""Which steps, gradients and samples a question is about: what it resolves to, and what it refuses, word for word."""

from __future__ import annotations

import itertools
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.restrictions import (
    Sample,
    Window,
    drawn,
    resolve_gradient_steps,
    resolve_steps,
    resolve_test,
    resolve_train,
    segments_of,
)
from explaind_core.run.run import Run
from support.axes_runs import INPUTS, example

STEPS = "steps within 1..4: a slice, a range, a list or a number"
ROWS = "rows within 0..2: a slice, a list or a number"
IDS = "ids of samples in the run's batches (in scope: 8, 0..8)"


@lru_cache
def run() -> Run:
    """Four steps; sample 5 in none of them."""
    return example("descent")


def refused(**question) -> QuestionError:
    with pytest.raises(QuestionError) as error:
        explaind.attribute(run(), INPUTS, nodes=1, progress=False, **question)
    return error.value


# ------------------------------------------------------------------ what is resolved
@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, [1, 2, 3, 4]), (slice(None), [1, 2, 3, 4]), (slice(2, 4), [2, 3]), (slice(None, 3), [1, 2]),
        (slice(3, None), [3, 4]), (slice(1, 5, 2), [1, 3]), (slice(2, 5), [2, 3, 4]), (range(2, 4), [2, 3]),
        ([1, 4], [1, 4]), (3, [3]), (torch.tensor([2, 3]), [2, 3]), (torch.tensor(4), [4]),
    ],
)  # fmt: skip
def test_steps_are_numbers_ranges_slices_and_lists(steps, expected):
    assert resolve_steps(run(), steps) == tuple(Window(s, (s,)) for s in expected)
    assert resolve_gradient_steps(run(), steps, 4) == tuple(expected)
    assert resolve_gradient_steps(run(), steps, 3) == tuple(s for s in expected if s <= 3) if expected != [4] else True
    assert resolve_steps(run(), {"only": steps}) == (Window("only", tuple(expected)),)


def test_windows_keep_their_names_and_order():
    found = resolve_steps(run(), {"b": 1, 7: range(2, 4), "a": [4]})
    assert found == (Window("b", (1,)), Window("7", (2, 3)), Window("a", (4,)))


@given(st.lists(st.integers(1, 12), min_size=1, unique=True).map(sorted), st.integers(1, 6), st.integers(1, 12))
def test_segments_are_neighbours_of_one_window_and_at_most_so_many(steps, chords, cut):
    parts = [tuple(s for s in steps if s <= cut), tuple(s for s in steps if s > cut)]
    windows = [Window(n, part) for n, part in enumerate(parts) if part]
    segments = segments_of(windows, chords)
    assert [s for segment in segments for s in segment.steps] == steps
    for segment in segments:
        assert 1 <= len(segment.steps) <= chords
        assert list(segment.steps) == list(range(segment.steps[0], segment.steps[-1] + 1))
        assert set(segment.steps) <= set(windows[segment.window].steps)
    for one, other in itertools.pairwise(segments):  # none could have been longer
        assert len(one.steps) == chords or other.steps[0] > one.steps[-1] + 1 or one.window != other.window


def test_train_entries_know_their_samples_and_what_they_leave_out():
    every = resolve_train(run(), None, range(1, 5))
    assert every.labels == (0, 1, 2, 3, 4, 6, 7, 8)
    assert (every.restricted, every.scope) == (False, 8)
    some = resolve_train(run(), [7, 0], range(1, 5))
    assert (some.labels, some.restricted) == ((7, 0), True)
    assert some.positions(torch.tensor([0, 5, 7, 7])).tolist() == [1, -1, 0, 0]
    assert resolve_train(run(), slice(1, 5), range(1, 5)).labels == (1, 2, 3, 4)
    assert resolve_train(run(), slice(None), range(1, 5)).restricted is False
    assert resolve_train(run(), torch.tensor([8, 7]), [3]).restricted is False
    groups = resolve_train(run(), {"a": [0, 1], 3: [4], "rest": [2, 3, 6, 7, 8]}, range(1, 5))
    assert (groups.labels, groups.restricted) == (("a", "3", "rest"), False)
    assert groups.positions(torch.tensor([1, 4, 8, 5])).tolist() == [0, 1, 2, -1]
    assert resolve_train(run(), {"a": [0, 1]}, range(1, 5)).restricted is True
    # A sample of another step's batch is known, and adds nothing to the gradients that are asked for.
    assert resolve_train(run(), [0, 8], [1]).labels == (0, 8)


def test_a_sample_that_was_announced_but_never_drawn_is_known():
    small = explaind.testing.record_example(steps=1)
    never = next(k for k in range(32) if k not in small.sample_ids(1).tolist())
    result = explaind.attribute(small, INPUTS.new_ones(1, 4), keep=("train",), train=[never], nodes=1, progress=False)
    assert result.kernel.values.tolist() == [0]


@pytest.mark.parametrize(
    ("test", "rows"),
    [
        (None, None), (slice(0, 2), (0, 1)), (slice(-2, None), (1, 2)), (slice(None, None, -1), (2, 1, 0)),
        ([2, 0], (2, 0)), (1, (1,)), (torch.tensor([1]), (1,)), (Sample(3), (0, 1, 2)), (range(1, 3), (1, 2)),
    ],
)  # fmt: skip
def test_rows_are_numbers_slices_and_lists(test, rows):
    assert resolve_test(test, 3) == rows


def test_only_what_was_drawn_is_told():
    assert drawn("step", slice(1, 3), 9) == drawn("step", {"a": [1]}, 9) == drawn("step", None, 9) == []
    assert drawn("step", Sample(2, 7), 9) == ["step: 2 of 9 drawn with seed 7"]
    assert drawn("step", {"a": Sample(2), "b": 3, "c": Sample(1)}, 9) == [
        "step 'a': 2 of 9 drawn with seed 0", "step 'c': 1 of 9 drawn with seed 0",
    ]  # fmt: skip


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("argument", ["steps", "gradient_steps"])
@pytest.mark.parametrize(
    ("value", "what", "expected"),
    [
        (slice(1, 99), "the slice of steps reaches outside the run", STEPS),
        (slice(0, 3), "the slice of steps reaches outside the run", STEPS),
        (slice(5, None), "the slice of steps reaches outside the run", STEPS),
        (slice(1, 1), "the slice of steps reaches outside the run", STEPS),
        (slice(-2, None), "the slice of steps reaches outside the run", STEPS),
        (slice(None, None, -1), "the slice of steps reaches outside the run", STEPS),
        (slice(3, 2), "no step is asked for", STEPS),
        ([], "no step is asked for", STEPS),
        (range(2, 2), "no step is asked for", STEPS),
        ([3, 2], "steps must rise and not repeat", STEPS),
        ([2, 2], "steps must rise and not repeat", STEPS),
        ([1.5], "steps are not whole numbers", STEPS),
        ("all", "steps are not whole numbers", STEPS),
    ],
    ids=repr,
)
def test_steps_that_are_not_there(argument, value, what, expected):
    error = refused(**{argument: value})
    assert (error.what, error.where, error.expected, error.got) == (what, argument, expected, value)
    if argument == "steps":
        error = refused(steps={"a": value})
        assert (error.what, error.where, error.expected, error.got) == (what, "steps['a']", expected, value)


@pytest.mark.parametrize("argument", ["steps", "gradient_steps"])
@pytest.mark.parametrize("step", [0, 5, -1])
def test_steps_outside_the_run(argument, step):
    assert "step" in str(refused(**{argument: [step]}))
    assert str(step) in str(refused(**{argument: step}))


def test_no_window():
    error = refused(steps={})
    assert error.what == "no window of steps is named"
    assert (error.where, error.remedy) == ("steps", "name at least one, or leave it out")


@pytest.mark.parametrize(
    ("one", "other", "last", "first"),
    [([1, 2], [2, 3], 2, 2), ([3], [1], 3, 1), ([1, 4], [2, 3], 4, 2), (slice(1, 4), slice(3, 5), 3, 3)],
)
def test_windows_that_overlap_or_fall(one, other, last, first):
    error = refused(steps={"a": one, "b": other})
    assert error.what == "windows of steps overlap or do not rise: their steps would be counted twice"
    assert error.where == "steps['b']"
    assert error.expected == f"steps behind {last}, the last of 'a'"
    assert error.got == f"from {first} on"
    assert error.remedy == "name disjoint windows from first to last, or ask twice"


def test_gradient_steps_are_no_windows():
    error = refused(gradient_steps={"a": [1]})
    assert error.what == "gradient_steps cannot be windows"
    assert (error.where, error.expected) == ("gradient_steps", "a slice, a range, a list or a number")


def test_gradients_behind_all_that_is_explained():
    error = refused(steps=[1, 2], gradient_steps=[3, 4])
    assert error.what == "no gradient that is asked for was taken up to the last step explained"
    assert (error.where, error.expected, error.got) == ("gradient_steps", "steps within 1..2", [3, 4])


@pytest.mark.parametrize("keep", [("train",), ("step", "test")])
@pytest.mark.parametrize(
    ("train", "what", "where", "got"),
    [
        ([5], "1 ids are of no sample that was trained on", "train", [5]),
        ([0, 99, 5, -3], "3 ids are of no sample that was trained on", "train", [-3, 5, 99]),
        (list(range(90, 99)), "9 ids are of no sample that was trained on", "train", [90, 91, 92, 93, 94]),
        ([], "no sample is asked for", "train", []),
        (slice(5, 6), "no sample is asked for", "train", slice(5, 6)),
        ([0, 1, 0], "an id is named twice", "train", [0, 1, 0]),
        ([0.5], "ids are not whole numbers", "train", [0.5]),
        ({"a": [0], "b": [5]}, "1 ids are of no sample that was trained on", "train['b']", [5]),
        ({"a": []}, "no sample is asked for", "train['a']", []),
        ({"a": [1, 1]}, "an id is named twice", "train['a']", [1, 1]),
        ({"a": [0, 1], "b": [4, 1]}, "groups of training samples overlap", "train", ["a", "b"]),
        ({}, "no group of training samples is named", "train", []),
    ],
)
def test_training_samples_that_make_no_sense(train, what, where, got, keep):
    error = refused(keep=keep, train=train)
    assert (error.what, error.where, error.got) == (what, where, got)
    if "no sample" in what:
        assert error.expected == IDS
        assert error.remedy == "ids are those that were passed to recorder.batch, or below its train_size"
    if "overlap" in what:
        assert (error.expected, error.remedy) == ("disjoint groups", "make them disjoint, or ask twice")


def test_a_run_without_samples():
    empty = SimpleNamespace(sample_ids=lambda _: torch.tensor([], dtype=torch.int64), steps=range(1, 3), manifest={})
    with pytest.raises(QuestionError, match="no gradient in scope has samples") as error:
        resolve_train(empty, None, [1, 2])
    assert (error.value.where, error.value.expected, error.value.got) == ("train", "recorded batches", "none")


@pytest.mark.parametrize(
    ("test", "what", "got"),
    [
        ([3], "rows are outside the inputs", [3]), ([0, -1], "rows are outside the inputs", [-1]),
        ([1, 1], "a row is named twice", [1, 1]), ([], "no row is asked for", []),
        (slice(2, 1), "no row is asked for", slice(2, 1)), (["a"], "test rows are not whole numbers", ["a"]),
    ],
)  # fmt: skip
def test_rows_that_make_no_sense(test, what, got):
    error = refused(test=test)
    assert (error.what, error.where, error.expected, error.got) == (what, "test", ROWS, got)


@pytest.mark.parametrize("size", [0, 4])
def test_more_than_there_is_cannot_be_drawn(size):
    error = refused(test=Sample(size))
    assert (error.what, error.where, error.expected, error.got) == ("that many cannot be drawn", "test", "1..3", size)


@pytest.mark.parametrize("chords", [0, -1, 1.0, True, "2", None])
def test_chords_are_a_number_of_steps(chords):
    error = refused(chords=chords)
    assert (error.what, error.where, error.expected, error.got) == (
        "chords is no number of steps", "chords", "an integer >= 1", chords,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["fastest", "Forward", ""])
def test_strategies_have_names(strategy):
    error = refused(strategy=strategy)
    assert (error.what, error.where, error.got) == ("there is no such strategy", "strategy", strategy)
    assert error.expected == ("forward", "reverse", "features", "adjoint")


@pytest.mark.parametrize(
    ("strategy", "question", "what", "remedy"),
    [
        ("forward", {"keep": ("parameter",)}, "keep single parameters", "keep layers, or say strategy='reverse'"),
        ("reverse", {"keep": ("train",)}, "tell gradients apart by step or training sample",
         "say strategy='features' or 'adjoint'"),
        ("reverse", {"train": [0]}, "tell gradients apart by step or training sample",
         "say strategy='features' or 'adjoint'"),
        ("features", {"keep": ("step",)}, "do without an axis or a restriction of gradients", "leave strategy out"),
    ],
)  # fmt: skip
def test_a_strategy_that_cannot_answer_says_what_it_cannot(strategy, question, what, remedy):
    error = refused(strategy=strategy, **question)
    assert (error.what, error.where, error.got, error.remedy) == (
        f"the strategy {strategy!r} cannot {what}", "strategy", strategy, remedy,
    )  # fmt: skip


@pytest.mark.parametrize("question", [{"keep": ("train",)}, {"keep": ("step",), "train": [0]}])
def test_samples_cannot_be_told_apart_without_the_loss(question, tmp_path):
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(2, 3, dtype=torch.float64)
    with explaind.Recorder(tmp_path / "run", model, optimizer, lambda a, b: (a - b).square().mean()) as recorder:
        model(x).square().mean().backward()
        recorder.batch(x, torch.zeros(2, 2, dtype=torch.float64), ids=[0, 1])
        optimizer.step()
    unknown = explaind.open_run(tmp_path / "run", model=model)
    with pytest.raises(QuestionError) as error:
        explaind.attribute(unknown, x, nodes=1, progress=False, **question)
    assert error.value.what == "the run's loss is not known, so gradients cannot be split by training sample"
    assert (error.value.where, error.value.expected) == ("train", "a loss of torch.nn, or one that is given")
    assert error.value.remedy == "say open_run(..., loss=...)"
    assert explaind.attribute(unknown, x, keep=("gradient_step",), nodes=1, progress=False).sizes == {
        "gradient_step": 1
    }
