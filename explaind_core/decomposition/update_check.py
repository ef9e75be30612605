"""The refusal of a step whose update its rule does not explain."""

from __future__ import annotations

from explaind_core.decomposition.decompose import StepDecomposition
from explaind_core.decomposition.update_error import UpdateError
from explaind_core.errors import CoefficientError

__all__ = ["check_update"]


def check_update(split: StepDecomposition, limit: float | None, rule: str) -> None:
    """Refuse a step whose update is not explained.

    Args:
        split: the step.
        limit: the largest ``split.error`` that is accepted; None for rounding, parameter by parameter.
        rule: for the error.

    Raises:
        CoefficientError: more is missed than that.
    """
    if limit is not None:
        if not split.error <= limit:
            raise _unexplained(split, max(split.errors, key=lambda e: e.missed), rule, f"at most {limit:.3g}")
        return
    wrong = [e for e in split.errors if not e.missed <= e.allowed]
    if wrong:
        worst = max(wrong, key=lambda e: e.missed)
        raise _unexplained(split, worst, rule, f"|declared - recorded| <= {worst.allowed:.3g}, which is rounding")


def _unexplained(split: StepDecomposition, worst: UpdateError, rule: str, expected: str) -> CoefficientError:
    if not worst.updated:
        return CoefficientError(
            "a parameter moved that no optimizer updated",
            where=f"step {split.step}, parameter {worst.name!r}",
            expected="no change without a gradient",
            got=f"a change of norm {worst.moved:.3g}",
            remedy="let nothing but optimizers change parameters, or say max_update_error=, which leaves the change to "
            "the residual",
        )
    return CoefficientError(
        "the rule does not explain what the optimizer did",
        where=f"step {split.step}, parameter {worst.name!r}, {rule}",
        expected=expected,
        got=f"{worst.missed:.3g} of an update of norm {worst.moved:.3g}; all parameters together {split.error:.3g}",
        remedy="correct the rule (explaind check-plugin MODULE:RULE shows the smallest case), open the run with "
        "another one (rule=), or say max_update_error=, which leaves the rest to the residual",
    )
