"""Momentum and averages as linear filters with scalar or operator coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind_core.errors import CoefficientError
from explaind_core.rules.linear_operator import LinearOperator, is_symbolic
from explaind_core.rules.operators import apply_each

__all__ = ["Coefficient", "FilterState", "LinearFilter"]

Coefficient = float | LinearOperator

FilterState = tuple[Tensor, ...]


def _times(coefficient: Coefficient, x: Tensor) -> Tensor:
    return coefficient.apply(x) if isinstance(coefficient, LinearOperator) else x * coefficient


def _is_zero(coefficient: Coefficient) -> bool:
    return isinstance(coefficient, float) and coefficient == 0


def _same(one: Coefficient, other: Coefficient) -> bool:
    return one is other or (isinstance(one, float) and isinstance(other, float) and one == other)


def _combine(terms: Iterator[tuple[Coefficient, Tensor]], like: Tensor) -> Tensor:
    total: Tensor | None = None
    for coefficient, x in terms:
        if not _is_zero(coefficient):
            total = _times(coefficient, x) if total is None else total + _times(coefficient, x)
    return torch.zeros_like(like) if total is None else total


def _combine_each(terms: Iterator[tuple[Coefficient, Tensor | None]], like: Tensor) -> Tensor:
    """:func:`_combine` for stacks of tensors; None is zero."""
    total: Tensor | None = None
    for coefficient, x in terms:
        if x is not None and not _is_zero(coefficient):
            part = apply_each(coefficient, x) if isinstance(coefficient, LinearOperator) else x * coefficient
            total = part if total is None else total + part
    return torch.zeros_like(like) if total is None else total


def _flip(coefficient: Coefficient) -> Coefficient:
    return coefficient.adjoint if isinstance(coefficient, LinearOperator) else coefficient


@dataclass(frozen=True)
class LinearFilter:
    """A linear filter with k states: ``out = C m + D u``, then ``m <- A m + B u``.

    It reads the PREVIOUS state: momentum, exponential averages, bias correction, Nesterov and mixtures of
    them all have this form. Coefficients are numbers, or operators where an optimizer needs that.

    Args:
        A: k rows of k coefficients, from states to new states.
        B: k coefficients, from the input to new states.
        C: k coefficients, from states to what is read out.
        D: one coefficient, from the input to what is read out.

    Raises:
        CoefficientError: the shapes do not agree, or a number is not finite.

    Example:
        >>> LinearFilter.momentum(0.9)
        LinearFilter(A=((0.9,),), B=(1.0,), C=(0.9,), D=1.0)
    """

    A: Sequence[Sequence[Coefficient]] = ()
    B: Sequence[Coefficient] = ()
    C: Sequence[Coefficient] = ()
    D: Coefficient = 1.0

    def __post_init__(self) -> None:
        k = len(self.B)
        shapes = (len(self.A), *(len(row) for row in self.A), len(self.C))
        if any(n != k for n in shapes):
            raise CoefficientError(
                "the coefficients of a LinearFilter do not agree on the number of states",
                expected=f"A: {k} x {k}, C: {k}, as B has {k} entries",
                got=f"A: {len(self.A)} rows of {[len(row) for row in self.A]}, C: {len(self.C)}",
            )
        object.__setattr__(self, "A", tuple(tuple(map(_checked, row)) for row in self.A))
        object.__setattr__(self, "B", tuple(map(_checked, self.B)))
        object.__setattr__(self, "C", tuple(map(_checked, self.C)))
        object.__setattr__(self, "D", _checked(self.D))

    @property
    def order(self) -> int:
        """The number k of states."""
        return len(self.B)

    def advance(self, state: FilterState, u: Tensor) -> tuple[Tensor, FilterState]:
        """Feed ``u`` to the filter in ``state``; return what it reads out and its next state.

        Args:
            state: the k states m before this step, each of ``u``'s shape.
            u: the input of this step.

        Example:
            >>> out, state = LinearFilter.ema(0.9).advance((torch.zeros(1),), torch.ones(1))
            >>> out
            tensor([0.1000])
        """
        out = _combine(zip((*self.C, self.D), (*state, u), strict=True), u)
        following = tuple(
            _combine(zip((*row, b), (*state, u), strict=True), u) for row, b in zip(self.A, self.B, strict=True)
        )
        return out, following

    def advance_each(self, state: FilterState, u: Tensor, *, read: bool = True) -> tuple[Tensor | None, FilterState]:
        """:meth:`advance` for a stack ``[R, ...]`` of inputs, each with a state of its own; None if it is not read.

        Args:
            state: the k states before this step, each ``[R, ...]``.
            u: the inputs of this step, ``[R, ...]``.
            read: whether the filter is read out.
        """
        following = tuple(
            _combine_each(zip((*row, b), (*state, u), strict=True), u) for row, b in zip(self.A, self.B, strict=True)
        )
        if not read:
            return None, following
        for row, b, new in zip(self.A, self.B, following, strict=True):
            if all(map(_same, (*row, b), (*self.C, self.D))):  # an average that is read out as it is
                return new, following
        return _combine_each(zip((*self.C, self.D), (*state, u), strict=True), u), following

    def adjoint(self, following: FilterState, psi: Tensor | None) -> tuple[Tensor, FilterState]:
        """The transpose of :meth:`advance`: ``u' = D^T psi + B^T z``, ``z <- A^T z + C^T psi`` (reverse time).

        Args:
            following: z, what later steps ask of this step's new states, each ``[R, ...]``; at least k of them.
            psi: what is asked of what the filter reads out, ``[R, ...]``; None for nothing.

        Returns:
            What is asked of the input u, and of the states before this step.

        Example:
            >>> u, z = LinearFilter.ema(0.75).adjoint((torch.zeros(1, 1),), torch.ones(1, 1))
            >>> u, z
            (tensor([[0.2500]]), (tensor([[0.7500]]),))
        """
        k = self.order
        like = psi if psi is not None else following[0]
        asked = following[:k]  # a state that appears later starts at zero, whatever came before
        u = _combine_each(zip(map(_flip, (*self.B, self.D)), (*asked, psi), strict=True), like)
        before = tuple(
            _combine_each(zip(map(_flip, (*(row[i] for row in self.A), self.C[i])), (*asked, psi), strict=True), like)
            for i in range(k)
        )
        return u, before

    @classmethod
    def ema(cls, beta: float, *, bias_correction: int | None = None) -> LinearFilter:
        """Exponential moving average ``m <- beta m + (1 - beta) u``, read out as ``m`` (``/ (1 - beta^t)``).

        Args:
            beta: decay, in [0, 1).
            bias_correction: the clock t (steps of this parameter so far, this one included), None for none.

        Example:
            >>> LinearFilter.ema(0.5, bias_correction=1).D
            1.0
        """
        correction = 1.0 if bias_correction is None else 1 - beta**bias_correction
        return cls(A=((beta,),), B=(1 - beta,), C=(beta / correction,), D=(1 - beta) / correction)

    @classmethod
    def momentum(
        cls, mu: float, *, dampening: float = 0.0, nesterov: bool = False, first: bool = False
    ) -> LinearFilter:
        """Momentum ``m <- mu m + (1 - dampening) u``, read out as ``m`` or, for Nesterov, as ``u + mu m``.

        Args:
            mu: decay of the buffer.
            dampening: how much less than ``u`` enters the buffer, as a fraction of it.
            nesterov: read out ``u + mu m``.
            first: the buffer is just being created, which takes ``u`` undampened.

        Example:
            >>> LinearFilter.momentum(0.9, nesterov=True).D
            1.9
        """
        b = 1.0 if first else 1.0 - dampening
        c, d = (mu * mu, 1 + mu * b) if nesterov else (mu, b)
        return cls(A=((mu,),), B=(b,), C=(c,), D=d)


def _checked(coefficient: Any) -> Coefficient:
    if isinstance(coefficient, LinearOperator) or is_symbolic(coefficient):
        return coefficient  # type: ignore[no-any-return]
    try:
        number = float(coefficient)
    except (TypeError, ValueError, RuntimeError):
        raise CoefficientError(
            "a filter coefficient is neither a number nor an operator", got=type(coefficient).__name__
        ) from None
    if not _is_finite(number):
        raise CoefficientError("a filter coefficient is not finite", got=number)
    return number


def _is_finite(number: float) -> bool:
    return is_symbolic(number) or math.isfinite(number)
