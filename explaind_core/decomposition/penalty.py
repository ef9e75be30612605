"""Terms of the loss that depend on the parameters alone: what they are in the gradient that a step was fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from explaind_core.errors import QuestionError, RecordingError
from explaind_core.run import ReplayedStep, Run

__all__ = ["Penalty", "penalty_gradients"]

#: ``penalty(parameters by name) -> 0-d``: all that the parameters alone add to the loss of one optimizer step.
Penalty = Callable[[Mapping[str, Tensor]], Tensor]


def penalty_gradients(run: Run, replayed: ReplayedStep) -> dict[str, Tensor] | None:
    """``c d penalty / d theta``, where the step's gradient was taken, c being the clip coefficient that was told.

    Args:
        run: the run, which knows the penalty.
        replayed: the step.

    Returns:
        The gradients of the parameters that were fed one, in the run's dtype. None for a run without a penalty.

    Raises:
        QuestionError: the run was recorded with a penalty and opened without it, or it does not return a number.
        RecordingError: single entries of the gradient were clipped: no part of them is the penalty's.
    """
    if run.penalty is None:
        if run.manifest.get("penalty"):
            raise QuestionError(
                "the run was recorded with a penalty in its loss, and opened without it",
                where=run.path,
                expected=run.manifest["penalty"],
                got="penalty=None",
                remedy="say open_run(..., penalty=...)",
            )
        return None
    s = replayed.step
    if any(kind == "value" for kind, *_ in run.clips(s)):
        raise RecordingError(
            "the gradient was clipped entry by entry, so that no part of it is the penalty's",
            where=f"step {s}",
            remedy="open the run without penalty=, and record without declaring one: it is then part of the kernel",
        )
    point = replayed.theta_before if replayed.gradient_point is None else replayed.gradient_point
    with torch.enable_grad():
        theta = {n: t.detach().clone().requires_grad_() for n, t in point.items()}
        value = run.penalty(theta)
        if not isinstance(value, Tensor) or value.ndim:
            raise QuestionError(
                "the penalty is not one number",
                where="penalty",
                expected="a 0-d tensor",
                got=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
            )
        names = [n for n in theta if n in replayed.gradients]
        found: tuple[Tensor | None, ...] = (None,) * len(names)
        if value.requires_grad:
            found = torch.autograd.grad(value, [theta[n] for n in names], allow_unused=True)
    factor = run.gradient_factor(s)
    return {n: torch.zeros_like(point[n]) if g is None else factor * g for n, g in zip(names, found, strict=True)}
