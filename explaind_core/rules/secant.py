"""Closing a step by a rank-one secant, for preconditioners that are known only approximately."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.errors import CoefficientError
from explaind_core.rules.linear_operator import LinearOperator, Scalar
from explaind_core.rules.operators import Diagonal, RankOne

__all__ = ["Fitted", "closed"]

_KINDS = ("identity", "quotient")


@dataclass(frozen=True)
class Fitted(LinearOperator):
    """A preconditioner that is fitted, step by step, to what the filter read out and how the parameters moved.

    ``"identity"``: the multiple of the identity nearest to the update, ``<U, out> / <out, out>``. ``"quotient"``: the
    elementwise ``U / out``, 0 where it is negative or infinite, for no plausible preconditioner is.

    Attributes:
        kind: ``"identity"`` or ``"quotient"``.
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise CoefficientError(
                "there is no such fitted preconditioner", expected=f"one of {_KINDS}", got=repr(self.kind)
            )

    def fit(self, out: Tensor, update: Tensor) -> LinearOperator:
        """The operator that maps ``out`` nearly to ``update``.

        Args:
            out: what the filter read out.
            update: the observed U, of ``out``'s shape.

        Example:
            >>> Fitted("quotient").fit(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, -1.0])).weight
            tensor([0.5000, 0.0000, 0.0000])
        """
        if self.kind == "identity":
            size = float(out.square().sum())
            return Scalar(float((update * out).sum()) / size if size else 0.0)
        quotient = update / torch.where(out == 0, torch.ones_like(out), out)
        plausible = (out != 0) & (quotient > 0) & torch.isfinite(quotient)
        return Diagonal(torch.where(plausible, quotient, torch.zeros_like(out)))

    def apply(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """Refused: before it is fitted it maps nothing."""
        raise CoefficientError(
            "a fitted preconditioner was used before it was fitted",
            remedy="set closed_by_secant = True in the rule that declares it",
        )

    @property
    def adjoint(self) -> LinearOperator:
        """Itself: what is fitted is symmetric."""
        return self


def closed(preconditioner: LinearOperator, out: Tensor, update: Tensor) -> tuple[LinearOperator, float]:
    """``P[X] = P_0[X] + (U - P_0[out]) <out, X> / <out, out>``, with ``P[out] = U`` exactly, and ``||U - P_0[out]||``.

    Where ``out`` is zero no operator maps it to an update: P_0 stays, and what it misses remains an error.

    Args:
        preconditioner: P_0, plausible; a :class:`Fitted` one is fitted here.
        out: what the filter read out.
        update: U, the observed ``-(theta_s - theta_{s-1}) - rho_s theta_{s-1}``.

    Example:
        >>> P, missed = closed(Scalar(1.0), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))
        >>> P.apply(torch.tensor([1.0, 1.0])), missed
        (tensor([1., 2.]), 1.0)
    """
    start = preconditioner.fit(out, update) if isinstance(preconditioner, Fitted) else preconditioner
    missing = update - start.apply(out)
    missed, size = float(missing.norm()), float(out.square().sum())
    return (start + RankOne(missing / size, out) if size else start), missed
