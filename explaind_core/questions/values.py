"""The explained function after a step: finite, and reduced to the kept axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.derivatives import examine
from explaind_core.errors import NonFiniteError
from explaind_core.questions.output_check import check_outputs
from explaind_core.questions.question import Question

__all__ = ["Ends", "finite_values", "reduced"]


def reduced(values: Tensor, question: Question) -> Tensor:
    """``[n, J]`` summed over the axes that are not kept, which stay with size 1."""
    for axis, name in enumerate(("test", "output")):
        if not question.keeps(name):
            values = values.sum(axis, keepdim=True)
    return values


def finite_values(
    question: Question, theta: Mapping[str, Tensor], s: int, block: slice | None = None, *, buffers: int | None = None
) -> Tensor:
    """The explained function after step s: ``[n, J]``.

    Args:
        question: what is explained.
        theta: the parameters after step s.
        s: the step.
        block: of the test samples, all by default.
        buffers: the step whose buffers are held; s by default.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    values = question.function.at(s if buffers is None else buffers).values(theta, block)
    if not torch.isfinite(values).all():
        raise NonFiniteError("the explained function is NaN or infinite", where=f"theta after step {s}")
    return values


@dataclass(frozen=True)
class Ends:
    """The explained function where the path that is asked about begins, and where it ends.

    Attributes:
        initial: before the first step, ``[n, J]``.
        final: after the last one.
    """

    initial: Tensor
    final: Tensor

    @classmethod
    def of(cls, question: Question) -> Ends:
        """Evaluate it there, once it is known to be the trained function, and whether its samples are coupled."""
        run, function = question.run, question.function
        check_outputs(run)
        first, last = question.steps[0] - 1, question.steps[-1]
        return cls(*examine(function.at(first), run.theta(first), function.at(last), run.theta(last)))

    @property
    def outputs(self) -> int:
        """J."""
        return self.initial.shape[1]

    @property
    def change(self) -> Tensor:
        """What the explained function changed by, ``[n, J]``."""
        return self.final - self.initial

    def scale(self, question: Question) -> float:
        """The largest change over the kept axes."""
        return float(reduced(self.change, question).abs().max())
