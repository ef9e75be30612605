"""What a linear operator on one parameter tensor is, and how operators make others.

An operator maps a tensor of a parameter's shape to a tensor of that shape. It is *frozen*: it may have
been computed from any data, but it is taken as given, so it is linear in what it is applied to. Every
operator has an adjoint with respect to ``<x, y> = sum(x * y)``, and a dense matrix to be checked against.

Operators compose with ``@`` (``(P @ E).apply(x) == P.apply(E.apply(x))``), add with ``+`` and scale with ``*``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.errors import CoefficientError

__all__ = ["Composition", "LinearOperator", "Scalar", "Sum", "as_operator", "is_symbolic"]


class LinearOperator(ABC):
    """A linear map from tensors of one shape to tensors of the same shape."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """The image of ``x``, a tensor of ``x``'s shape."""

    @property
    @abstractmethod
    def adjoint(self) -> LinearOperator:
        """The operator A' with ``<A x, y> == <x, A' y>`` for all x and y."""

    def dense(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """The matrix ``[D, D]`` that acts on flattened tensors of ``shape`` (D elements).

        Slow on purpose: one application per basis vector. For tests and small tensors.

        Args:
            shape: of the parameter, D elements.
            dtype: of the matrix.

        Example:
            >>> Scalar(2.0).dense((2,))
            tensor([[2., 0.],
                    [0., 2.]], dtype=torch.float64)
        """
        size = torch.Size(shape)
        basis = torch.eye(size.numel(), dtype=dtype)
        return torch.stack([self.apply(column.reshape(size)).reshape(-1) for column in basis], dim=1)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        return Composition((self, other))

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum((self, other))

    def __mul__(self, factor: float) -> LinearOperator:
        return Composition((Scalar(factor), self))

    __rmul__ = __mul__


@dataclass(frozen=True)
class Scalar(LinearOperator):
    """``x -> factor * x``.

    Example:
        >>> Scalar(0.5).apply(torch.tensor([2.0]))
        tensor([1.])
    """

    factor: float

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return x if not is_symbolic(self.factor) and self.factor == 1 else x * self.factor

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return self


@dataclass(frozen=True, eq=False)
class Composition(LinearOperator):
    """``x -> factors[0](factors[1](... x))``: the rightmost acts first, as in a product of matrices.

    Example:
        >>> Composition((Scalar(2.0), Scalar(3.0))).apply(torch.tensor(1.0))
        tensor(6.)
    """

    factors: tuple[LinearOperator, ...]

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        for factor in reversed(self.factors):
            x = factor.apply(x)
        return x

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return Composition(tuple(factor.adjoint for factor in reversed(self.factors)))


@dataclass(frozen=True, eq=False)
class Sum(LinearOperator):
    """``x -> sum of terms[k](x)``; at least one term.

    Example:
        >>> Sum((Scalar(2.0), Scalar(3.0))).apply(torch.tensor(1.0))
        tensor(5.)
    """

    terms: tuple[LinearOperator, ...]

    def __post_init__(self) -> None:
        require(len(self.terms) > 0, "Sum needs at least one term", ">= 1 term", 0)

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        total = self.terms[0].apply(x)
        for term in self.terms[1:]:
            total = total + term.apply(x)
        return total

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return Sum(tuple(term.adjoint for term in self.terms))


def is_symbolic(value: object) -> bool:
    """Whether ``value`` is an expression of symbols, as in :mod:`explaind_core.symbolic`, and no number.

    Example:
        >>> is_symbolic(0.1)
        False
    """
    return hasattr(value, "free_symbols")  # sympy's own attribute, and nobody else's: sympy need not be imported


def as_operator(value: LinearOperator | float | Tensor, what: str) -> LinearOperator:
    """``value`` as an operator: numbers (and tensors with one element and no axis) become :class:`Scalar`.

    Args:
        value: what a rule declared.
        what: what it was declared as, for the error.

    Raises:
        CoefficientError: ``value`` is a tensor with axes (say ``Diagonal(value)``), or no number at all.

    Example:
        >>> as_operator(0.1, "preconditioner")
        Scalar(factor=0.1)
    """
    if isinstance(value, LinearOperator):
        return value
    if isinstance(value, Tensor) and value.ndim > 0:
        raise CoefficientError(
            f"{what} is a bare tensor of shape {tuple(value.shape)}",
            expected="a number or a LinearOperator",
            remedy="say what it does: operators.Diagonal(tensor) multiplies elementwise",
        )
    try:
        return Scalar(value if is_symbolic(value) else float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise CoefficientError(
            f"{what} is not an operator", expected="a number or a LinearOperator", got=type(value).__name__
        ) from None


def require(condition: bool, what: str, expected: object, got: object) -> None:
    """Refuse an operator that is no operator, or that does not fit its tensor.

    Args:
        condition: what must hold.
        what: is wrong otherwise.
        expected: for the error.
        got: for the error.

    Raises:
        CoefficientError: it does not hold.
    """
    if not condition:
        raise CoefficientError(what, expected=expected, got=got, remedy="correct the operator that the rule declares")
