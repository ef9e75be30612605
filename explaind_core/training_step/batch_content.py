"""What a batch holds, split and hashed once: its structure, its tensors, and by which hashes it is known again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_128

from explaind_core import trees

__all__ = ["BatchContent"]


@dataclass(frozen=True, eq=False)  # it holds tensors; two contents are the same where their hashes are
class BatchContent:
    """The inputs and targets of one declared batch.

    Attributes:
        structure: how the tensors are nested, as JSON (:func:`explaind_core.trees.flatten`).
        tensors: by their keys in the structure.

    Example:
        >>> content = BatchContent.of(torch.tensor([[1.0], [2.0]]), None)
        >>> content.structure
        {'inputs': {'#tensor': '0'}, 'targets': None}
        >>> content.inputs.tolist(), content.targets
        ([[1.0], [2.0]], None)
    """

    structure: Any
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, inputs: Any, targets: Any, where: str = "the batch") -> BatchContent:
        """Split a batch; its tensors are not copied.

        Args:
            inputs: what the model was called with: tensors, numbers, strings, None, nested in tuples, lists and dicts.
            targets: the loss's second argument, nested likewise.
            where: what the batch is, for the error.

        Returns:
            The content.

        Raises:
            RecordingError: it holds something that cannot be stored.
        """
        return cls(*trees.flatten({"inputs": inputs, "targets": targets}, where))

    @cached_property
    def hash(self) -> str:
        """32 hexadecimal digits, over names, dtypes, shapes and every byte: the name under which a run stores it."""
        digest = xxh3_128(repr(self.structure).encode())
        for key, tensor in self.tensors.items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor).data if tensor.numel() else b"")
        return digest.hexdigest()

    def row_hashes(self, samples: int) -> Tensor:
        """A hash of each sample's part of the batch, which tells the samples that are not as they were.

        Args:
            samples: how many there are, n; tensors of another length are no part of a sample.

        Returns:
            int64 ``[n]``.

        Example:
            >>> a = BatchContent.of(torch.tensor([[1.0], [2.0]]), None)
            >>> b = BatchContent.of(torch.tensor([[1.0], [3.0]]), None)
            >>> (a.row_hashes(2) == b.row_hashes(2)).tolist()
            [True, False]
        """
        digests = [xxh3_64() for _ in range(samples)]
        for tensor in self.tensors.values():
            if tensor.ndim and len(tensor) == samples and tensor.numel():
                for digest, row in zip(digests, _bytes(tensor).reshape(samples, -1), strict=True):
                    digest.update(row.data)
        numbers = [int.from_bytes(digest.digest(), "little", signed=True) for digest in digests]
        return torch.tensor(numbers, dtype=torch.int64)

    @property
    def inputs(self) -> Any:
        """What the model was called with, of the content's own tensors."""
        return trees.unflatten(self.structure["inputs"], self.tensors)

    @property
    def targets(self) -> Any:
        """The loss's second argument, of the content's own tensors."""
        return trees.unflatten(self.structure["targets"], self.tensors)


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
