"""Rounds of several optimizers: which of their steps start from the same parameters and are one recorded step.

An optimizer takes part in a round by a step, or by a gradient scaler's keeping it from one. The point of a gradient is
the number of steps that all optimizers together had made when a part of it was taken; a round begins at the point of
its first gradients, and ``now`` is the point where the model stands. What happens when::

    state      event                                              next state  action, or refusal
    ---------  -------------------------------------------------  ----------  ----------------------------------------
    no round   begin_step, all its gradients taken now            begun       -
    no round   begin_step, any other gradient                     no round    refused: not taken where the step begins
    no round   skip_step                                          under way   that it took part is kept
    begun      begin_step (the step before raised an error)       begun       as for no round
    begun      end_step, skip_step                                under way   its parameters, groups, gradients kept
    under way  begin_step of one that took part                   begun       the round ends; then as for no round
    under way  begin_step of another, all its gradients taken     begun       the round ends; then as for no round
               now, behind a step of the round
    under way  begin_step of another, all its gradients taken     under way   refused where a factor or clipping was
               where the round begins                                         declared since the round's first step
    under way  begin_step of another, any other gradient          under way   refused: not taken where the step begins
    under way  end_step                                           under way   its parameters, groups, gradients kept
    under way  skip_step of one that took part                    under way   the round ends, and the next has begun
    under way  skip_step of another                               under way   that it took part is kept
    under way  the last optimizer has taken part                  no round    the round ends
    any        end: the next batch is declared or discarded, or   no round    the round ends
               recording ends

Where a round ends, it is written as one step. Where a scaler kept all that took part from stepping, its batches are
forgotten instead; where nobody took part, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from explaind_core.errors import RecordingError
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.gradient_origins import GradientOrigins
from explaind_core.recording.run_writer import RunWriter, SeenStep
from explaind_core.recording.subject import Subject
from explaind_core.rules import OWNER
from explaind_core.tensors import check_parameters, copied

__all__ = ["Rounds"]


@dataclass
class _Round:
    """What was seen of a round that may not be over yet.

    Attributes:
        point: how many steps of any optimizer had been made where it begins.
        seen: all its steps so far, as one.
        skipped: the optimizers that a gradient scaler kept from stepping.
        moved: the parameters of those that stepped, and where they stand.
        buffers: copies of the buffers after the last step.
        factor: what multiplied the gradient, as declared before the first optimizer took part.
        clips: how it was clipped, likewise.
    """

    point: int
    seen: SeenStep = field(default_factory=SeenStep)
    skipped: set[int] = field(default_factory=set)
    moved: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    factor: float = 1.0
    clips: list[list[Any]] = field(default_factory=list)

    @property
    def took_part(self) -> set[int]:
        """The optimizers that stepped, or were kept from it."""
        return {*self.seen.stepped, *self.skipped}


class Rounds:
    """Collects the steps of several optimizers into rounds, and writes each as one step.

    A round begins with a step and holds at most one of each optimizer. All gradients of a round were taken at the
    parameters that the last one left: an optimizer whose gradient was taken after another one had stepped begins the
    next round, and one whose gradient is of several points is refused. A round ends when all optimizers have stepped,
    when one steps again, or when the batch of the next one is declared; those that did not step were idle.

    Args:
        subject: the model and its optimizers.
        writer: writes steps.
        batches: those of the round.
        discarded: called when a gradient scaler has kept all optimizers that took part in a round from stepping.
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
    def at_beginning(self) -> bool:
        """Whether the next optimizer to step is the first of its round, as far as is known."""
        return self._round is None or not self._round.took_part

    @property
    def moved(self) -> dict[str, Tensor]:
        """The parameters that the steps of the pending round moved, and where they stand."""
        return {} if self._round is None else self._round.moved

    def begin_step(self, member: int, gradients: Mapping[str, Tensor], *, declared: bool) -> None:
        """An optimizer is about to step: in the pending round, or in the next one.

        Args:
            member: which, counted from 0.
            gradients: what it is fed.
            declared: whether a gradient factor, or clipping, was declared since the last step.

        Raises:
            RecordingError: its gradient is not of one point, or of an earlier one; something that belongs to a
                whole round was declared in its middle.
        """
        self._origins.follow()
        if self._round is not None and member in self._round.took_part:
            self.end()
        points_of, now = self._origins.points_of(gradients), self._origins.now
        taken_now = bool(points_of) and all(points == {now} for points in points_of.values())
        if self._round is not None and self._round.point != now and taken_now:
            self.end()
        begins_at = now if self._round is None else self._round.point
        for name, points in points_of.items():
            if points != {begins_at}:
                raise self._not_of_one_point(member, name, points, begins_at)
        if self._round is None:
            self._round = _Round(now)
        elif declared and self._round.took_part:
            raise RecordingError(
                "a gradient factor was declared between the steps of two optimizers whose gradients belong together",
                where=f"step {self._writer.steps + 1}",
                expected="one factor, declared before the first of them steps",
                remedy="clip the gradients of all optimizers by their common norm, before any of them steps",
            )

    def _not_of_one_point(self, member: int, name: str, points: frozenset[int], begins_at: int) -> RecordingError:
        kind = type(self._subject.optimizers[member]).__name__
        return RecordingError(
            f"the gradient that {kind} is about to be fed was not taken where this step begins",
            where=f"parameter {name!r}, step {self._writer.steps + 1}",
            expected=f"a gradient of the parameters after {begins_at} steps of all optimizers together",
            got=f"parts taken after {', '.join(map(str, sorted(points)))} of them",
            remedy="take an optimizer's gradient anew in the round in which it steps: call its zero_grad() before "
            "backward() (gradients may be accumulated over micro-batches, but not while another optimizer steps), "
            "and declare the batch after the last step of the round before",
        )

    def end_step(self, member: int, seen: SeenStep, factor: float) -> None:
        """Take in a finished step of one optimizer.

        Args:
            member: which, counted from 0.
            seen: its step.
            factor: what multiplied its gradient, as declared; of a round, what was declared before the first step
                counts, and so do its clips.

        Raises:
            NonFiniteError: a parameter became NaN or infinite.
        """
        this = self._round
        assert this is not None
        names = [name for group in seen.groups if group[OWNER] == member for name in group["params"]]
        reached = {name: copied(self._subject.parameters[name]) for name in names}
        check_parameters({name: reached[name] for name in seen.gradients}, self._writer.steps + 1)
        if not this.took_part:
            this.factor, this.clips = factor, seen.clips
        # The groups of the others as they stood before their own steps.
        groups = [group for group in this.seen.groups or seen.groups if group[OWNER] != member]
        groups += [group for group in seen.groups if group[OWNER] == member]
        this.seen.groups = sorted(groups, key=lambda group: int(group[OWNER]))
        this.seen.gradients |= seen.gradients
        this.seen.calls = max(this.seen.calls, seen.calls)
        this.seen.stepped = sorted([*this.seen.stepped, member])
        this.moved |= reached
        this.buffers = self._subject.buffers()
        self._origins.count_step(names)
        self._end_if_complete()

    def skip_step(self, member: int, factor: float, clips: list[list[Any]]) -> None:
        """A gradient scaler kept an optimizer from stepping.

        Args:
            member: which, counted from 0.
            factor: what multiplied its gradient, as declared.
            clips: how its gradient was clipped, as declared.
        """
        if self._round is not None and member in self._round.took_part:
            self.end()
        if self._round is None:
            self._round = _Round(self._origins.now)
        if not self._round.took_part:
            self._round.factor, self._round.clips = factor, clips
        self._round.skipped.add(member)
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if self._round is not None and len(self._round.took_part) == len(self._subject.optimizers):
            self.end()

    def end(self) -> None:
        """End the round that is open, if one is: write it, or forget its batches where no optimizer stepped."""
        ended, self._round = self._round, None
        if ended is None or not ended.took_part:
            return
        if ended.seen.stepped:
            ended.seen.clips = ended.clips
            self._writer.finish(ended.seen, ended.moved, self._batches, ended.factor, buffers=ended.buffers)
        else:
            self._discarded()
        self._batches.clear()

    def close(self) -> None:
        """Stop following gradients."""
        self._origins.close()
