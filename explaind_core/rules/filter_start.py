"""What a filter's states hold before their first step: zero, unless a rule declares otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from explaind_core.errors import CoefficientError

if TYPE_CHECKING:  # a rule declares starts, and asks nothing of this module
    from explaind_core.rules.rule import RecordedStep, UpdateRule

__all__ = ["checked_count", "started_states"]


def started_states(rule: UpdateRule, step: RecordedStep, order: int) -> tuple[Tensor | None, ...]:
    """m_0 of the filter's ``order`` states as ``rule`` declares it at ``step``, in float64; None for zero.

    A number is what the optimizer's own dtype holds of it: ``full_like(p, 0.1)`` is not 0.1 in float32.

    Raises:
        CoefficientError: there are more starts than states, or one is no number or tensor of the parameter's shape.
    """
    declared = checked_count(rule, step, rule.filter_start(step), order)
    found: list[Tensor | None] = []
    for j, start in enumerate(declared):
        try:
            whole = torch.as_tensor(start, dtype=torch.float64).to(step.dtype).double().broadcast_to(step.theta.shape)
        except (TypeError, ValueError, RuntimeError) as error:
            raise _malformed(rule, step, f"a tensor of shape {tuple(step.theta.shape)}, or a number", start) from error
        if not torch.isfinite(whole).all():
            raise _malformed(rule, step, "finite numbers", f"state {j}: {start}")
        found.append(whole.clone() if bool(whole.any()) else None)
    return (*found, *(None for _ in range(order - len(found))))


def checked_count(
    rule: UpdateRule, step: RecordedStep, declared: Sequence[Tensor | float], order: int
) -> Sequence[Tensor | float]:
    """``declared``, the starts of at most ``order`` states."""
    if len(declared) > order:
        raise _malformed(rule, step, f"at most {order} starts, one for each state of the filter", len(declared))
    return declared


def _malformed(rule: UpdateRule, step: RecordedStep, expected: object, got: object) -> CoefficientError:
    return CoefficientError(
        f"{type(rule).__name__}.filter_start does not fit the filter",
        where=f"parameter {step.name!r}, its step {step.clock}",
        expected=expected,
        got=got,
        remedy="return what each state of the filter holds before the step that creates it, in the order of the states",
    )
