"""Quadrature along a step: the nodes of phi_s, and how many a step gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from explaind_core.errors import QuestionError

__all__ = ["Climbed", "Quadrature", "climb", "gauss_legendre", "midpoints"]

#: What ``nodes`` of a rule of equal midpoints begins with; their number follows.
_MIDPOINT = "midpoint:"

#: The orders that refinement climbs through.
_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
#: Rounding of the explained function itself, in units of eps times its largest value, that no node can remove.
_NOISE = 8

T = TypeVar("T")


@lru_cache
def gauss_legendre(q: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights ``(t_j, w_j)`` of the q-point Gauss-Legendre rule on [0, 1].

    Example:
        >>> gauss_legendre(1)
        ((0.5, 1.0),)
    """
    t, w = np.polynomial.legendre.leggauss(q)
    return tuple(zip(((t + 1) / 2).tolist(), (w / 2).tolist(), strict=True))


@lru_cache
def midpoints(q: int) -> tuple[tuple[float, float], ...]:
    """The composite midpoint rule on [0, 1]: ``t_j = (j + 1/2) / q``, ``w_j = 1 / q`` for j = 0..q-1.

    The paper's "integration steps". Its error falls as 1/q^2 for a smooth function.

    Example:
        >>> midpoints(2)
        ((0.25, 0.5), (0.75, 0.5))
    """
    return tuple(((j + 0.5) / q, 1 / q) for j in range(q))


@dataclass(frozen=True)
class Quadrature:
    """How many nodes a step gets.

    Args:
        nodes: a number of Gauss-Legendre nodes, ``"adaptive"``, ``"left"``: one node at t = 0, the first-order
            approximation of older methods such as TracIn; or ``"midpoint:q"``: q equal midpoints, the paper's
            integration steps (``"midpoint:100"``).
        tolerance: adaptive only: a step is refined while its largest residual (over test samples and outputs)
            exceeds ``tolerance`` times the largest change of an output over all steps asked for, plus rounding
            of f (8 eps max |f|). Residuals add up over steps, so one bound for all of them gives the nodes to
            the steps that spoil the sum: the first ones, as a rule.
        most: adaptive only: the largest order tried. A step that misses the tolerance keeps its best order
            and is marked as not converged.

    Raises:
        QuestionError: not a positive number of nodes, or no positive tolerance.

    Example:
        >>> Quadrature(2).adaptive
        False
        >>> Quadrature("left").points(1)
        ((0.0, 1.0),)
        >>> Quadrature("midpoint:10").ladder
        (10,)
    """

    nodes: int | str = "adaptive"
    tolerance: float = 1e-3
    most: int = 32

    def __post_init__(self) -> None:
        whole = isinstance(self.nodes, int) and not isinstance(self.nodes, bool) and self.nodes >= 1
        if not whole and self.nodes not in ("adaptive", "left") and not self._midpoints:
            raise QuestionError(
                "nodes is not a number of nodes",
                expected="'adaptive', 'left', 'midpoint:q' or an integer >= 1",
                got=self.nodes,
            )
        if not (self.tolerance > 0):
            raise QuestionError("the tolerance is not positive", expected="> 0", got=self.tolerance)
        if self.most < 1:
            raise QuestionError("max_nodes is not positive", expected=">= 1", got=self.most)

    @property
    def _midpoints(self) -> int:
        """How many equal midpoints are asked for; 0 where none are."""
        if not isinstance(self.nodes, str) or not self.nodes.startswith(_MIDPOINT):
            return 0
        number = self.nodes.removeprefix(_MIDPOINT)
        # One way to write a number: results are told apart by what was asked.
        return int(number) if number.isascii() and number.isdecimal() and not number.startswith("0") else 0

    @property
    def adaptive(self) -> bool:
        """Whether the number of nodes is chosen step by step."""
        return self.nodes == "adaptive"

    @property
    def ladder(self) -> tuple[int, ...]:
        """The orders to try, rising."""
        if self.nodes == "left":
            return (1,)
        if not self.adaptive:
            return (self._midpoints or int(self.nodes),)
        return tuple(q for q in _LADDER if q <= self.most)

    def points(self, q: int) -> tuple[tuple[float, float], ...]:
        """Nodes and weights of order q."""
        if self.nodes == "left":
            return ((0.0, 1.0),)
        return midpoints(q) if self._midpoints else gauss_legendre(q)


@dataclass(frozen=True)
class Climbed(Generic[T]):
    """The best order found for a step.

    Attributes:
        best: what was evaluated with it.
        nodes: the order, a number of nodes.
        evaluations: how many nodes were evaluated, those of refinements included.
        converged: whether the residual met the tolerance (True for a fixed number of nodes).
        rung: position in the ladder to start the next step from.
    """

    best: T
    nodes: int
    evaluations: int
    converged: bool
    rung: int


def climb(
    quadrature: Quadrature,
    rung: int,
    bound: float,
    before: Tensor,
    after: Tensor,
    evaluate: Callable[[int], tuple[Tensor, T]],
    dtype: torch.dtype,
) -> Climbed[T]:
    """Raise the order until the tolerance is met; start where the last step ended, for steps are alike.

    Args:
        quadrature: whose ladder and tolerance are meant.
        rung: position in the ladder to start from.
        bound: the largest residual that is good enough; rounding of f is added to it.
        before: f before the step.
        after: f after it, of the same shape.
        evaluate: order -> (what it predicts ``after - before`` to be, anything).
        dtype: of the explained function, whose rounding no order removes.
    """
    change = after - before
    noise = _NOISE * torch.finfo(dtype).eps * float(torch.maximum(before.abs(), after.abs()).max())
    bound += noise
    ladder = quadrature.ladder
    evaluations, best, best_nodes, best_error = 0, None, 0, float("inf")
    for position in range(min(rung, len(ladder) - 1), len(ladder)):
        q = ladder[position]
        predicted, found = evaluate(q)
        evaluations += q
        error = float((change - predicted).abs().max())
        if best is None or error < best_error:
            best, best_nodes, best_error = found, q, error
        rung = position
        if error <= bound:
            break
    assert best is not None
    if quadrature.adaptive and best_error < bound / 4 and rung > 0:
        rung -= 1
    return Climbed(best, best_nodes, evaluations, not quadrature.adaptive or best_error <= bound, rung)
