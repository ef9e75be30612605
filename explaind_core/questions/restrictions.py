"""Which steps, gradient steps, training and test samples a question is about."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_core.errors import QuestionError
from explaind_core.run import Run

__all__ = [
    "Sample",
    "Segment",
    "TrainEntries",
    "Window",
    "drawn",
    "resolve_gradient_steps",
    "resolve_steps",
    "resolve_test",
    "resolve_train",
    "segments_of",
]


@dataclass(frozen=True)
class Sample:
    """Some positions of an axis, drawn without replacement; every result that rests on them says so.

    Args:
        size: how many.
        seed: of the draw.

    Raises:
        QuestionError: there are not that many.

    Example:
        >>> Sample(3, seed=1).draw(range(1, 11), "steps")
        [2, 6, 7]
    """

    size: int
    seed: int = 0

    def draw(self, of: Sequence[int], where: str) -> list[int]:
        """The chosen members of ``of``, in their order."""
        if not 1 <= self.size <= len(of):
            raise QuestionError("that many cannot be drawn", where=where, expected=f"1..{len(of)}", got=self.size)
        order = torch.randperm(len(of), generator=torch.Generator().manual_seed(self.seed))
        return sorted(of[int(i)] for i in order[: self.size])

    def label(self, axis: str, of: int) -> str:
        """What a result says of it."""
        return f"{axis}: {self.size} of {of} drawn with seed {self.seed}"


def drawn(axis: str, asked: Any, of: int) -> list[str]:
    """What a result says of the members of an axis that were drawn, by themselves or for one of its groups."""
    named = {f"{axis} {name!r}": v for name, v in asked.items()} if isinstance(asked, Mapping) else {axis: asked}
    return [value.label(name, of) for name, value in named.items() if isinstance(value, Sample)]


@dataclass(frozen=True)
class Window:
    """One entry of a result's step axis: its label, and the steps that are summed in it."""

    name: str | int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Steps that share one straight line from theta before the first to theta after the last; one step, as a rule.

    ``window`` is the position of the window that they belong to.
    """

    steps: tuple[int, ...]
    window: int


def resolve_steps(run: Run, steps: Any) -> tuple[Window, ...]:
    """The windows that ``steps`` names: one per step, or one per entry of a mapping.

    Raises:
        QuestionError: steps outside the run, none, repeated or falling ones; windows that overlap.
    """
    if not isinstance(steps, Mapping):
        return tuple(Window(s, (s,)) for s in _steps(run, steps, "steps"))
    windows = tuple(Window(str(name), _steps(run, value, f"steps[{name!r}]")) for name, value in steps.items())
    if not windows:
        raise QuestionError("no window of steps is named", where="steps", remedy="name at least one, or leave it out")
    for one, other in itertools.pairwise(windows):
        if other.steps[0] <= one.steps[-1]:
            raise QuestionError(
                "windows of steps overlap or do not rise: their steps would be counted twice",
                where=f"steps[{other.name!r}]",
                expected=f"steps behind {one.steps[-1]}, the last of {one.name!r}",
                got=f"from {other.steps[0]} on",
                remedy="name disjoint windows from first to last, or ask twice",
            )
    return windows


def segments_of(windows: Sequence[Window], chords: int) -> tuple[Segment, ...]:
    """The windows' steps, neighbours joined to chords of at most ``chords`` steps."""
    segments = []
    for position, window in enumerate(windows):
        joined: list[int] = []
        for s in window.steps:
            if joined and (s != joined[-1] + 1 or len(joined) == chords):
                segments.append(Segment(tuple(joined), position))
                joined = []
            joined.append(s)
        segments.append(Segment(tuple(joined), position))
    return tuple(segments)


def resolve_gradient_steps(run: Run, steps: Any, last: int) -> tuple[int, ...]:
    """The steps whose gradients are asked for, up to the last step explained.

    Raises:
        QuestionError: as :func:`resolve_steps`, or all of them behind ``last``.
    """
    if isinstance(steps, Mapping):
        raise QuestionError("gradient_steps cannot be windows", where="gradient_steps", expected="a slice, a range, a list or a number", got=steps)  # fmt: skip  # noqa: E501
    if steps is None:
        return tuple(range(1, last + 1))
    if isinstance(steps, Sample):  # of those that the explained steps can know of
        return tuple(steps.draw(range(1, last + 1), "gradient_steps"))
    asked = _steps(run, steps, "gradient_steps")
    found = tuple(s for s in asked if s <= last)
    if not found:
        raise QuestionError(
            "no gradient that is asked for was taken up to the last step explained",
            where="gradient_steps",
            expected=f"steps within 1..{last}",
            got=steps,
        )
    return found


def _steps(run: Run, steps: Any, where: str) -> tuple[int, ...]:
    total = len(run.steps)
    expected = f"steps within 1..{total}: a slice, a range, a list or a number"
    if isinstance(steps, Sample):
        return tuple(steps.draw(run.steps, where))
    if isinstance(steps, slice):
        start, stop = steps.start if steps.start is not None else 1, steps.stop if steps.stop is not None else total + 1
        # Python's own slices clamp; a range that is not there must not go unnoticed here.
        if not 1 <= start <= total or not 1 < stop <= total + 1 or (1 if steps.step is None else steps.step) < 1:
            raise QuestionError("the slice of steps reaches outside the run", where=where, expected=expected, got=steps)
        chosen = list(range(start, stop, steps.step or 1))
    elif steps is None:
        chosen = list(run.steps)
    else:
        chosen = whole_numbers(steps, "steps are not whole numbers", where, expected)
    if not chosen:
        raise QuestionError("no step is asked for", where=where, expected=expected, got=steps)
    for s in chosen:
        run.check_step(s)
    if sorted(set(chosen)) != chosen:
        raise QuestionError("steps must rise and not repeat", where=where, expected=expected, got=steps)
    return tuple(chosen)


def whole_numbers(values: Any, what: str, where: str, expected: str) -> list[int]:
    """``values``, one or many, as Python integers (QuestionError otherwise)."""
    try:
        return [index(v) for v in (values if np.ndim(values) else [values])]
    except (TypeError, ValueError) as error:
        raise QuestionError(what, where=where, expected=expected, got=values) from error


@dataclass(frozen=True)
class TrainEntries:
    """The entries of the train axis: one sample each, or one group of samples each.

    Attributes:
        labels: sample ids, or the groups' names.
        of: sample id -> its entry.
        restricted: whether samples are left out.
        scope: how many samples the gradients in scope are of.
    """

    labels: tuple[int | str, ...]
    of: Mapping[int, int]
    restricted: bool
    scope: int

    def positions(self, ids: Tensor) -> Tensor:
        """The entry of every sample of a batch, -1 for those that are not asked for."""
        return torch.tensor([self.of.get(i, -1) for i in ids.tolist()], dtype=torch.int64)


def resolve_train(run: Run, train: Any, gradient_steps: Sequence[int]) -> TrainEntries:
    """The samples that ``train`` names: all (None), ids, a slice of them, or a mapping from a name to these.

    Raises:
        QuestionError: an id that no gradient of the run is of, a repeated one, groups that overlap, or none.
    """
    seen = sorted({i for s in gradient_steps for i in run.sample_ids(s).tolist()})
    where, expected = "train", f"ids of samples in the run's batches (in scope: {len(seen)}, {_span(seen)})"
    ever: set[int] = set()  # of the whole run: looked up only where an id is not in scope
    if not seen:
        raise QuestionError("no gradient in scope has samples", where=where, expected="recorded batches", got="none")

    def ids(value: Any, place: str) -> list[int]:
        if value is None:
            return seen
        if isinstance(value, Sample):
            return value.draw(seen, place)
        if isinstance(value, slice):
            chosen = [i for i in seen if i in _sliced(value, seen[-1] + 1, place)]
        else:
            chosen = whole_numbers(value, "ids are not whole numbers", place, expected)
        unknown = sorted(set(chosen) - set(seen))
        if unknown:
            # A sample that no gradient in scope is of added nothing; one that the run never saw is a mistake.
            size = run.manifest.get("train_size")
            ever.update(i for s in (() if size else run.steps) for i in run.sample_ids(s).tolist())
            unknown = [i for i in unknown if i not in ever and not 0 <= i < (size or 0)]
        if unknown or not chosen:
            raise QuestionError(
                f"{len(unknown)} ids are of no sample that was trained on" if unknown else "no sample is asked for",
                where=place,
                expected=expected,
                got=unknown[:5] if unknown else value,
                remedy="ids are those that were passed to recorder.batch, or below its train_size",
            )
        if len(set(chosen)) < len(chosen):
            raise QuestionError("an id is named twice", where=place, got=value)
        return chosen

    if not isinstance(train, Mapping):
        chosen = ids(train, where)
        return TrainEntries(
            tuple(chosen), {i: n for n, i in enumerate(chosen)}, bool(set(seen) - set(chosen)), len(seen)
        )
    groups = {str(name): ids(value, f"train[{name!r}]") for name, value in train.items()}
    of = {i: n for n, members in enumerate(groups.values()) for i in members}
    if len(of) < sum(map(len, groups.values())) or not groups:
        raise QuestionError(
            "groups of training samples overlap" if groups else "no group of training samples is named",
            where=where,
            expected="disjoint groups",
            got=list(groups),
            remedy="make them disjoint, or ask twice",
        )
    return TrainEntries(tuple(groups), of, any(i not in of for i in seen), len(seen))


def _sliced(value: slice, size: int, where: str) -> range:
    """The positions of a slice (QuestionError for a step of 0, or bounds that are no numbers)."""
    try:
        return range(*value.indices(size))
    except (TypeError, ValueError) as error:
        raise QuestionError(f"the slice makes no sense: {error}", where=where, got=value) from error


def _span(seen: Sequence[int]) -> str:
    return f"{seen[0]}..{seen[-1]}" if seen else "none"


def resolve_test(test: Any, samples: int) -> tuple[int, ...] | None:
    """The rows of the inputs that are explained; None for all.

    Raises:
        QuestionError: rows that are not there, none, or repeated ones.
    """
    if test is None:
        return None
    expected = f"rows within 0..{samples - 1}: a slice, a list or a number"
    if isinstance(test, Sample):
        return tuple(test.draw(range(samples), "test"))
    if isinstance(test, slice):
        rows = list(_sliced(test, samples, "test"))
    else:
        rows = whole_numbers(test, "test rows are not whole numbers", "test", expected)
    outside = [row for row in rows if not 0 <= row < samples]
    if outside or not rows or len(set(rows)) < len(rows):
        what = "rows are outside the inputs" if outside else "a row is named twice" if rows else "no row is asked for"
        raise QuestionError(what, where="test", expected=expected, got=outside[:5] or test)
    return tuple(rows)
