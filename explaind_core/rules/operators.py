"""Linear operators on one parameter tensor: what a preconditioner P_s or a frozen factor E_s is.

What an operator is, and how operators compose, says :mod:`explaind_core.rules.linear_operator`; here are the kinds
that optimizers need, beside those that are made of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.errors import CoefficientError
from explaind_core.rules.linear_operator import (
    Composition,
    LinearOperator,
    Scalar,
    Sum,
    as_operator,
    is_symbolic,
    require,
)

__all__ = [
    "Composition",
    "Diagonal",
    "Left",
    "LinearOperator",
    "OfReadout",
    "RankOne",
    "Right",
    "Rotated",
    "Scalar",
    "Sum",
    "apply_each",
    "as_operator",
    "is_elementwise",
    "is_symbolic",
]


@dataclass(frozen=True, eq=False)
class Diagonal(LinearOperator):
    """``x -> weight * x``, elementwise; ``weight`` broadcasts to the parameter's shape.

    Example:
        >>> Diagonal(torch.tensor([1.0, 2.0])).apply(torch.ones(3, 2))[0]
        tensor([1., 2.])
    """

    weight: Tensor

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        shape, weight = x.shape, self.weight.shape
        fits = len(weight) <= len(shape) and all(w in (1, n) for w, n in zip(weight[::-1], shape[::-1], strict=False))
        require(fits, "a Diagonal does not fit its tensor", f"a shape that broadcasts to {tuple(shape)}", tuple(weight))
        return x * self.weight

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return self


def _check_square(matrix: Tensor, name: str) -> None:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]
    require(square, f"{name} needs a square matrix", "[n, n]", tuple(matrix.shape))


def _multiply(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """``matrix`` times the fibres of ``x`` along ``axis``."""
    n = matrix.shape[0]
    require(
        -x.ndim <= axis < x.ndim and x.shape[axis] == n,
        f"a {n} x {n} matrix does not fit axis {axis} of its tensor",
        f"a tensor with {n} entries along axis {axis}",
        tuple(x.shape),
    )
    product: Tensor = torch.tensordot(matrix, x, dims=([1], [axis]))
    return product.movedim(0, axis)


@dataclass(frozen=True, eq=False)
class Left(LinearOperator):
    """``X -> matrix @ X`` along the first axis (matrix product from the left), as in Muon and Shampoo.

    Example:
        >>> Left(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).apply(torch.tensor([[1.0], [2.0]])).flatten()
        tensor([2., 1.])
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        _check_square(self.matrix, "Left")

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return _multiply(self.matrix, x, 0)

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return Left(self.matrix.mT)


@dataclass(frozen=True, eq=False)
class Right(LinearOperator):
    """``X -> X @ matrix`` along the last axis.

    Example:
        >>> Right(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).apply(torch.tensor([[1.0, 2.0]]))
        tensor([[2., 1.]])
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        _check_square(self.matrix, "Right")

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        return _multiply(self.matrix.mT, x, -1)

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return Right(self.matrix.mT)


@dataclass(frozen=True, eq=False)
class Rotated(LinearOperator):
    """An operator in rotated coordinates: ``x -> back(inner(forth(x)))``, as in SOAP.

    ``forth`` multiplies axis a by ``rotations[a].T`` and ``back`` by ``rotations[a]``, for every axis that
    has a matrix (None leaves an axis alone). With orthogonal matrices this is ``Q [inner] Q^T``.

    Attributes:
        inner: what acts in rotated coordinates.
        rotations: one entry an axis: a square matrix, or None.

    Example:
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> Rotated(Diagonal(torch.tensor([3.0, 5.0])), (quarter,)).apply(torch.ones(2))
        tensor([5., 3.])
    """

    inner: LinearOperator
    rotations: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        for matrix in self.rotations:
            if matrix is not None:
                _check_square(matrix, "Rotated")

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        require(
            len(self.rotations) == x.ndim, "Rotated needs one entry per axis", f"{x.ndim} entries", len(self.rotations)
        )
        for axis, matrix in enumerate(self.rotations):
            if matrix is not None:
                x = _multiply(matrix.mT, x, axis)
        x = self.inner.apply(x)
        for axis, matrix in enumerate(self.rotations):
            if matrix is not None:
                x = _multiply(matrix, x, axis)
        return x

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return Rotated(self.inner.adjoint, self.rotations)


@dataclass(frozen=True, eq=False)
class RankOne(LinearOperator):
    """``x -> left * <right, x>``, the outer product of two tensors of the parameter's shape.

    Attributes:
        left: what the image is a multiple of.
        right: what the argument is multiplied with and summed over; of ``left``'s shape.

    Example:
        >>> RankOne(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])).apply(torch.tensor([3.0, 4.0]))
        tensor([ 7., 14.])
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        same = self.left.shape == self.right.shape
        require(same, "RankOne needs two tensors of one shape", tuple(self.left.shape), tuple(self.right.shape))

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102
        fits = x.shape == self.left.shape
        require(fits, "a RankOne does not fit its tensor", tuple(self.left.shape), tuple(x.shape))
        return self.left * (self.right * x).sum()

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return RankOne(self.right, self.left)


@dataclass(frozen=True, eq=False)
class OfReadout(LinearOperator):
    """A preconditioner that is made from what the filter reads out, ``out_s``: ``lr sign(out) = (lr / |out|) out``.

    The engine calls ``make(out)`` and freezes the result. Made from the optimizer's own buffer instead, which rounds
    otherwise, 1 / |out| would blow that rounding up.

    Attributes:
        make: ``out_s`` -> the operator that is applied to it.

    Example:
        >>> OfReadout(lambda out: Diagonal(1 / out.abs())).make(torch.tensor([-2.0])).apply(torch.tensor([-2.0]))
        tensor([-1.])
    """

    make: Callable[[Tensor], LinearOperator]

    def apply(self, x: Tensor) -> Tensor:  # noqa: D102, ARG002
        raise CoefficientError(
            "an OfReadout was applied before it was made",
            expected="it stands alone as the preconditioner of StepCoefficients",
            remedy="put what is around it (a factor, a sum) into the operator that it makes",
        )

    @property
    def adjoint(self) -> LinearOperator:  # noqa: D102
        return OfReadout(lambda out: self.make(out).adjoint)


def apply_each(operator: LinearOperator, x: Tensor) -> Tensor:
    """``operator`` applied to every tensor of a stack ``[R, ...]``, in float64, returned in the stack's dtype.

    Args:
        operator: for tensors of the shape ``...``.
        x: the stack.

    Example:
        >>> apply_each(Diagonal(torch.tensor([1.0, 2.0])), torch.ones(2, 2))
        tensor([[1., 2.],
                [1., 2.]])
    """
    if isinstance(operator, Composition):
        for factor in reversed(operator.factors):
            x = apply_each(factor, x)
        return x
    if isinstance(operator, Scalar):
        return operator.apply(x)
    if isinstance(operator, Diagonal):  # broadcasts over the stack as it is
        weight = operator.weight.to(x.dtype)
        # A stack is large: it is not taken to float64, unless the weights need it.
        return x * weight if bool(torch.isfinite(weight).all()) else operator.apply(x).to(x.dtype)
    precise = x.double()
    try:
        found: Tensor = torch.vmap(operator.apply)(precise)
    except RuntimeError:  # an operator of somebody else's that looks at its tensor's numbers
        found = torch.stack([operator.apply(one) for one in precise])
    return found.to(x.dtype)


def is_elementwise(operator: LinearOperator | float) -> bool:
    """Whether every entry of the image depends on the same entry alone.

    Example:
        >>> is_elementwise(Scalar(2.0) @ Diagonal(torch.ones(2))), is_elementwise(Left(torch.eye(2)))
        (True, False)
    """
    if isinstance(operator, Composition):
        return all(map(is_elementwise, operator.factors))
    if isinstance(operator, Sum):
        return all(map(is_elementwise, operator.terms))
    return isinstance(operator, Scalar | Diagonal) or not isinstance(operator, LinearOperator)
