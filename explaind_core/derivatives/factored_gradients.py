"""Gradients of samples as factors: sums of a few terms each, of which the gradients themselves need not be formed.

With factors ``g_k = sum_t delta_kt (x) a_kt``, the product with a direction is
``<D, g_k> = sum_t delta_kt . (D a_kt)``: no ``g_k`` is written to memory where that is cheaper.
"""

# ruff: noqa: D102 (what the methods do is said once, in Factors)

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.tensors import flattened

__all__ = ["Factors", "Outer", "Scatter", "Sum", "slices"]

#: What writing and reading an entry of a per-sample gradient costs, in multiplications of a matrix product.
MEMORY_COST = 32


def slices(count: int, size: int) -> list[slice]:
    """``range(count)`` in pieces of ``size``, at least 1.

    Example:
        >>> slices(3, 2)
        [slice(0, 2, None), slice(2, 3, None)]
    """
    size = max(1, size)
    return [slice(a, min(a + size, count)) for a in range(0, count, size)]


class Factors(ABC):
    """The gradients ``g_k`` of one parameter tensor for b samples, as factors."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def samples(self) -> Tensor:
        """``[b, *shape]``: the gradients themselves."""

    @abstractmethod
    def merged(self) -> Tensor:
        """``[*shape]``: their sum, without them."""

    @abstractmethod
    def square_norms(self) -> Tensor:
        """0-d: the sum of the squared norms of all terms of all samples: the scale of rounding in their sum."""

    @abstractmethod
    def take(self, rows: slice) -> Factors:
        """Those of some samples."""

    @abstractmethod
    def plan(self, directions: int) -> tuple[bool, int]:
        """Whether :meth:`direct` pays for so many directions, and how many numbers a sample then needs."""

    def direct(self, directions: Tensor) -> Tensor:
        """``<D_r, g_k>`` without ``g_k``: ``[b, R]`` for directions ``[R, *shape]``."""
        raise NotImplementedError

    def inner(self, directions: Tensor, memory: int) -> tuple[Tensor, Tensor]:
        """``<D_r, g_k>``, ``[b, R]`` for directions ``[R, *shape]``, and ``sum_k g_k``; ``memory`` bytes at a time."""
        direct, numbers = self.plan(len(directions))
        if direct:
            pieces = map(self.take, slices(len(self), memory // (numbers * directions.element_size())))
            return torch.cat([piece.direct(directions) for piece in pieces]), self.merged()
        flat, blocks, total = flattened(directions, 1).T, [], torch.zeros_like(directions[0])
        for rows in slices(len(self), memory // (numbers * directions.element_size())):
            gradients = self.take(rows).samples()
            blocks.append(flattened(gradients, 1) @ flat)
            total += gradients.sum(0)
        return torch.cat(blocks), total


@dataclass
class Sum(Factors):
    """``g_k = sum_t v_kt``: biases, and the scales of normalisations. ``terms``: ``[b, T, *shape]``."""

    terms: Tensor

    def __len__(self) -> int:
        return len(self.terms)

    def samples(self) -> Tensor:
        return self.terms[:, 0] if self.terms.shape[1] == 1 else self.terms.sum(1)

    def merged(self) -> Tensor:
        return self.terms.sum((0, 1))

    def square_norms(self) -> Tensor:
        norm: Tensor = self.terms.norm()  # without another tensor of this size
        return norm.square()

    def take(self, rows: slice) -> Sum:
        return Sum(self.terms[rows])

    def plan(self, directions: int) -> tuple[bool, int]:  # noqa: ARG002
        return False, self.terms[0, 0].numel()


@dataclass
class Outer(Factors):
    """``g_k = sum_t left_kt (x) right_kt``, a matrix: ``[b, T, o]`` and ``[b, T, i]``."""

    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    def samples(self) -> Tensor:
        return self.left.transpose(1, 2) @ self.right

    def merged(self) -> Tensor:
        return self.left.flatten(0, 1).T @ self.right.flatten(0, 1)

    def square_norms(self) -> Tensor:
        return (self.left.square().sum(-1) * self.right.square().sum(-1)).sum()

    def take(self, rows: slice) -> Outer:
        return Outer(self.left[rows], self.right[rows])

    def plan(self, directions: int) -> tuple[bool, int]:
        # Per entry of the matrix: T R multiplications, or T + R and the entry itself, written and read.
        (_, T, o), i = self.left.shape, self.right.shape[2]
        work = T * directions
        direct = work <= min(max(o, i), T + directions + MEMORY_COST)
        return direct, work * min(o, i) if direct else o * i

    def direct(self, directions: Tensor) -> Tensor:
        (b, T, o), i, R = self.left.shape, self.right.shape[2], len(directions)
        # D is applied to the wider side, so that what it gives is narrow: [b T, R * narrow].
        if o <= i:
            given, moved = self.left, self.right.flatten(0, 1) @ directions.permute(2, 0, 1).reshape(i, R * o)
        else:
            given, moved = self.right, self.left.flatten(0, 1) @ directions.permute(1, 0, 2).reshape(o, R * i)
        return (moved.view(b, T, R, -1) * given.unsqueeze(2)).sum((1, 3))


@dataclass
class Scatter(Factors):
    """``g_k = sum_t e_{row_kt} (x) v_kt``, an embedding's table. ``rows``: ``[b, T]``, ``terms``: ``[b, T, width]``."""

    rows: Tensor
    terms: Tensor
    count: int

    def __len__(self) -> int:
        return len(self.terms)

    def samples(self) -> Tensor:
        b, T, width = self.terms.shape
        table = self.terms.new_zeros(b, self.count, width)
        return table.scatter_add_(1, self.rows.unsqueeze(2).expand(b, T, width), self.terms)

    def merged(self) -> Tensor:
        table = self.terms.new_zeros(self.count, self.terms.shape[2])
        return table.index_add_(0, self.rows.flatten(), self.terms.flatten(0, 1))

    def square_norms(self) -> Tensor:
        norm: Tensor = self.terms.norm()  # without another tensor of this size
        return norm.square()

    def take(self, rows: slice) -> Scatter:
        return Scatter(self.rows[rows], self.terms[rows], self.count)

    def plan(self, directions: int) -> tuple[bool, int]:
        positions, width = self.terms.shape[1:]
        direct = directions * positions <= self.count
        return direct, (directions * positions if direct else self.count) * width

    def direct(self, directions: Tensor) -> Tensor:
        return torch.einsum("rbtw,btw->br", directions[:, self.rows], self.terms)
