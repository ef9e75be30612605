"""Rounds of several optimizers: which of their steps start from the same parameters and are one recorded step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from explaind_core.errors import RecordingError
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.gradient_origins import GradientOrigins
from explaind_core.recording.run_writer import RunWriter
from explaind_core.recording.seen_step import SeenStep
from explaind_core.recording.subject import Subject
from explaind_core.rules import OWNER
from explaind_core.tensors import check_parameters, copied

__all__ = ["Rounds"]


@dataclass
class _Round:
    """What was seen of a round that may not be over yet.

    Attributes:
        began: how many steps of any optimizer had been made. seen: all its steps so far, as one. skipped: optimizers
            that a gradient scaler kept from stepping. moved: the parameters of those that stepped, and where they
            stand. buffers: at the last step.
        told: the gradient's factor, and how it was clipped.
    """

    began: int
    moved: dict[str, Tensor] = field(default_factory=dict)
    seen: SeenStep = field(default_factory=SeenStep)
    skipped: set[int] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    told: tuple[float, list[list[Any]]] = field(default_factory=lambda: (1.0, []))

    @property
    def met(self) -> set[int]:
        return {*self.seen.stepped, *self.skipped}


class Rounds:
    """Collects the steps of several optimizers into rounds, and writes each as one step.

    A round begins with a step and holds at most one of each optimizer. All gradients of a round were taken at the
    parameters that the last one left: an optimizer whose gradient was taken after another one had stepped begins the
    next round, and one whose gradient is of several points is refused. A round ends when all optimizers have stepped,
    when one steps again, or when the batch of the next one is declared; those that did not step were idle.

    Args:
        subject: the model and its optimizers. writer: writes steps. batches: those of the round.
        discarded: called when a gradient scaler has kept all optimizers that met in a round from stepping.
    """

    def __init__(self, subject: Subject, writer: RunWriter, batches: BatchLog, discarded: Callable[[], object]) -> None:
        self._subject, self._writer, self._batches, self._discarded = subject, writer, batches, discarded
        self._origins = GradientOrigins(subject.parameters)
        self._round: _Round | None = None

    @property
    def pending(self) -> bool:
        """Whether a step was made in a round that is not over."""
        return self._round is not None and bool(self._round.seen.stepped)

    @property
    def fresh(self) -> bool:
        """Whether the next optimizer to step is the first of its round, as far as is known."""
        return self._round is None or not self._round.met

    @property
    def moved(self) -> dict[str, Tensor]:
        """The parameters that the steps of the pending round moved, and where they stand."""
        return {} if self._round is None else self._round.moved

    def enter(self, member: int, gradients: Mapping[str, Tensor], *, told: bool) -> None:
        """An optimizer is about to step: in the pending round, or in the next one.

        Args:
            member: which. gradients: what it is fed.
            told: whether a gradient factor, or clipping, was declared since the last step.

        Raises:
            RecordingError: its gradient is not of one point, or of an earlier one; something that belongs to a
                whole round was declared in its middle.
        """
        self._origins.look()
        if self._round is not None and member in self._round.met:
            self.end()
        taken, now = self._origins.of(gradients), self._origins.now
        anew = bool(taken) and all(points == {now} for points in taken.values())
        if self._round is not None and self._round.began != now and anew:
            self.end()
        began = now if self._round is None else self._round.began
        for name, points in taken.items():
            if points != {began}:
                raise self._not_of_one_point(member, name, points, began)
        if self._round is None:
            self._round = _Round(now)
        elif told and self._round.met:
            raise RecordingError(
                "a gradient factor was declared between the steps of two optimizers whose gradients belong together",
                where=f"step {self._writer.steps + 1}",
                expected="one factor, declared before the first of them steps",
                remedy="clip the gradients of all optimizers by their common norm, before any of them steps",
            )

    def _not_of_one_point(self, member: int, name: str, points: frozenset[int], began: int) -> RecordingError:
        kind = type(self._subject.optimizers[member]).__name__
        return RecordingError(
            f"the gradient that {kind} is about to be fed was not taken where this step begins",
            where=f"parameter {name!r}, step {self._writer.steps + 1}",
            expected=f"a gradient of the parameters after {began} steps of all optimizers together",
            got=f"parts taken after {', '.join(map(str, sorted(points)))} of them",
            remedy="take an optimizer's gradient anew in the round in which it steps: call its zero_grad() before "
            "backward() (gradients may be accumulated over micro-batches, but not while another optimizer steps), "
            "and declare the batch after the last step of the round before",
        )

    def add(self, member: int, seen: SeenStep, told: tuple[float, list[list[Any]]]) -> None:
        """Take in a finished step of one optimizer.

        Args:
            member: which optimizer. seen: its step. told: the gradient's factor, and how it was clipped; what was
                declared before the first optimizer met the round counts.

        Raises:
            NonFiniteError: a parameter became NaN or infinite.
        """
        found = self._round
        assert found is not None
        names = [name for group in seen.groups if group[OWNER] == member for name in group["params"]]
        theta = {name: copied(self._subject.parameters[name]) for name in names}
        check_parameters({name: theta[name] for name in seen.gradients}, self._writer.steps + 1)
        if not found.met:
            found.told = told
        groups = [group for group in found.seen.groups or seen.groups if group[OWNER] != member]
        groups += [group for group in seen.groups if group[OWNER] == member]
        found.seen.groups = sorted(groups, key=lambda group: int(group[OWNER]))
        found.seen.gradients |= seen.gradients
        found.seen.stepped = sorted([*found.seen.stepped, member])
        found.moved |= theta
        found.buffers = self._subject.buffers()
        self._origins.stepped(names)
        self._end_if_all_met()

    def skip(self, member: int, told: tuple[float, list[list[Any]]]) -> None:
        """A gradient scaler kept an optimizer from stepping."""
        if self._round is not None and member in self._round.met:
            self.end()
        if self._round is None:
            self._round = _Round(self._origins.now)
        if not self._round.met:
            self._round.told = told
        self._round.skipped.add(member)
        self._end_if_all_met()

    def _end_if_all_met(self) -> None:
        if self._round is not None and len(self._round.met) == len(self._subject.optimizers):
            self.end()

    def end(self) -> None:
        """End the round that is open, if one is: write it, or forget its batches where no optimizer stepped."""
        found, self._round = self._round, None
        if found is None or not found.met:
            return
        if found.seen.stepped:
            factor, found.seen.clips = found.told
            self._writer.finish(found.seen, found.moved, self._batches, factor, buffers=found.buffers)
        else:
            self._discarded()
        self._batches.clear()

    def close(self) -> None:
        """Stop following gradients."""
        self._origins.close()
