"""Which rows of a model's inputs belong to which sample: one each, some of them, or none because all share the tensor.

A tensor whose first axis is as long as there are samples has a row for each, and that need not be said. What need be is
said where inputs are given, to ``recorder.batch`` and to questions alike: ``Shared(mask)``, ``PerRow(nodes, graph)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.errors import QuestionError

__all__ = ["InputRows", "PerRow", "Shared"]


@dataclass(frozen=True, eq=False)
class Shared:
    """An input that no sample owns: a mask ``[T, T]``, an adjacency, edges, a table of prices.

    The model is given it whole, whichever samples are passed through it.

    Args:
        value: a tensor, or several nested in tuples, lists and dicts.

    Example:
        >>> inputs = (torch.zeros(8, 5, 4), Shared(torch.ones(5, 5).tril()))
        >>> InputRows.split(inputs)[1].shared
        frozenset({1})
    """

    value: Any


@dataclass(frozen=True, eq=False)
class PerRow:
    """An input of which each sample owns some rows: the nodes of graphs, the tokens of bags, points of clouds.

    Samples of such a batch pass through the model together: nobody but the model knows how to cut it. Its outputs have
    one row per sample.

    Args:
        value: ``[rows, ...]``.
        sample: whose a row is, int64 ``[rows]``: positions in the batch, 0 to n - 1.

    Raises:
        QuestionError: there is not one position per row, or one is negative.

    Example:
        >>> nodes = PerRow(torch.zeros(5, 3), torch.tensor([0, 0, 1, 1, 1]))
        >>> InputRows.split({"nodes": nodes})[1].samples({"nodes": nodes.value})
        2
    """

    value: Tensor
    sample: Tensor

    def __post_init__(self) -> None:
        owners = torch.as_tensor(self.sample)
        fits = owners.ndim == 1 and not owners.is_floating_point() and owners.dtype != torch.bool
        if not fits or self.value.ndim == 0 or len(owners) != len(self.value) or bool((owners < 0).any()):
            raise QuestionError(
                "it is not said whose sample each row is",
                where="PerRow(value, sample)",
                expected=f"one position per row, {len(self.value) if self.value.ndim else 'and rows'}, none negative",
                got=f"shape {tuple(owners.shape)}, {owners.dtype}",
            )
        object.__setattr__(self, "sample", owners.to(torch.int64))


@dataclass(frozen=True, eq=False)
class InputRows:
    """What was said of the rows of some inputs, by the numbers of their tensors (:func:`explaind_core.trees.leaves`).

    Attributes:
        shared: those that no sample owns.
        owners: those of which samples own some rows: whose each is.

    Example:
        >>> plain, rows = InputRows.split((torch.zeros(3, 2), Shared(torch.ones(3, 3))))
        >>> [t.shape[0] for t in rows.take(plain, slice(0, 1))]
        [1, 3]
    """

    shared: frozenset[int] = frozenset()
    owners: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def split(cls, inputs: Any) -> tuple[Any, InputRows]:
        """Inputs as the model takes them, and what was said of their rows.

        Args:
            inputs: tensors, some of them in :class:`Shared` or :class:`PerRow`, nested in tuples, lists and dicts.
        """
        shared: set[int] = set()
        owners: dict[int, Tensor] = {}
        count = 0

        def visit(tree: Any) -> Any:
            nonlocal count
            if isinstance(tree, Shared):
                inside = len(trees.leaves(tree.value))
                shared.update(range(count, count + inside))
                count += inside
                return tree.value
            if isinstance(tree, PerRow):
                owners[count] = tree.sample
                count += 1
                return tree.value
            if isinstance(tree, Tensor):
                count += 1
                return tree
            if isinstance(tree, tuple | list):
                return type(tree)(visit(value) for value in tree) if type(tree) in (tuple, list) else tree
            if isinstance(tree, Mapping) and type(tree) is dict:
                return {key: visit(value) for key, value in tree.items()}
            count += len(trees.leaves(tree))
            return tree

        plain = visit(inputs)
        return plain, cls(frozenset(shared), owners)

    def __bool__(self) -> bool:
        return bool(self.shared or self.owners)

    @property
    def ragged(self) -> bool:
        """Whether samples own differing numbers of rows, so that only the model can cut the batch."""
        return bool(self.owners)

    def samples(self, inputs: Any, where: str = "inputs") -> int:
        """How many samples inputs hold: the common length of all tensors of which nothing else was said.

        Args:
            inputs: as the model takes them.
            where: for the error.

        Raises:
            QuestionError: there are none, or tensors tell different numbers.
        """
        lengths = {len(t) if t.ndim else 0 for i, t in self._leaves(inputs) if self._owned(i)}
        owned = {int(o.max()) + 1 if len(o) else 0 for o in self.owners.values()}
        found = lengths or ({max(owned)} if owned else set())
        if len(found) != 1 or 0 in found or any(n > max(found) for n in owned):
            raise QuestionError(
                "the test inputs are not a batch",
                where=where,
                expected="tensors with the same, non-zero number of samples",
                got=sorted(found | owned) or type(inputs).__name__,
                remedy="say explaind.Shared(tensor) of one that belongs to no sample, "
                "explaind.PerRow(tensor, sample) of one whose rows belong to samples",
            )
        return found.pop()

    def check(self, n: int, where: str) -> None:
        """Refuse owners that are no samples of a batch of ``n`` (QuestionError)."""
        for index, owners in self.owners.items():
            if len(owners) and int(owners.max()) >= n:
                raise QuestionError(
                    "a row belongs to a sample that is not in the batch",
                    where=f"{where}, tensor {index}",
                    expected=f"positions below {n}",
                    got=int(owners.max()),
                )

    def take(self, inputs: Any, rows: slice | Tensor, n: int | None = None) -> Any:
        """The inputs of some samples, shared ones whole.

        Args:
            inputs: as the model takes them.
            rows: which samples.
            n: how many there are: a tensor of another length is shared, too. None: no length is another one.
        """
        index = iter(range(len(trees.leaves(inputs))))

        def of(tensor: Tensor) -> Tensor:
            number = next(index)
            return tensor[rows] if self.per_sample(number, tensor, len(tensor) if n is None else n) else tensor

        return trees.map_tensors(of, inputs)

    def per_sample(self, index: int, tensor: Tensor, n: int) -> bool:
        """Whether a tensor has a row for each of ``n`` samples.

        Args:
            index: its number.
            tensor: itself.
            n: how many samples there are.
        """
        return self._owned(index) and tensor.ndim > 0 and len(tensor) == n

    def _owned(self, index: int) -> bool:
        return index not in self.shared and index not in self.owners

    @staticmethod
    def _leaves(inputs: Any) -> list[tuple[int, Tensor]]:
        return list(enumerate(trees.leaves(inputs)))

    # ------------------------------------------------------------------ in a store
    def header(self) -> dict[str, list[int]]:
        """The numbers of the tensors; :meth:`stored` is the inverse, given :attr:`owners` themselves."""
        return {"shared": sorted(self.shared), "owned": sorted(self.owners)}

    @classmethod
    def stored(cls, header: Mapping[str, Any] | None, owners: Mapping[int, Tensor]) -> InputRows:
        """What :meth:`header` described.

        Args:
            header: JSON; None where nothing was said.
            owners: by the numbers of their tensors.
        """
        return cls() if header is None else cls(frozenset(header["shared"]), {i: owners[i] for i in header["owned"]})
