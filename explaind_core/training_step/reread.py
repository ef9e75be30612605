"""A batch's inputs and targets, read again from the dataset instead of the store: they must be as they were seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_128

from explaind_core import trees
from explaind_core.data import IndexedDataset
from explaind_core.errors import ExplaindError, QuestionError, StoreError

__all__ = ["content_hash", "read_again", "row_hashes"]


def content_hash(structure: Any, tensors: Mapping[str, Tensor]) -> str:
    """Of a batch's content, split by ``trees.flatten``: names, dtypes, shapes and every byte."""
    digest = xxh3_128(repr(structure).encode())
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor).data if tensor.numel() else b"")
    return digest.hexdigest()


def row_hashes(content: Any, samples: int) -> Tensor:
    """A hash of each sample's part of a batch: int64 ``[n]``. It tells which samples are not as they were.

    Example:
        >>> a, b = row_hashes(torch.tensor([[1.0], [2.0]]), 2), row_hashes((torch.tensor([[1.0], [3.0]]), None), 2)
        >>> (a == b).tolist()
        [True, False]
    """
    digests = [xxh3_64() for _ in range(samples)]
    for tensor in trees.leaves(content):
        if tensor.ndim and len(tensor) == samples and tensor.numel():
            for digest, row in zip(digests, _bytes(tensor).reshape(samples, -1), strict=True):
                digest.update(row.data)
    numbers = [int.from_bytes(digest.digest(), "little", signed=True) for digest in digests]
    return torch.tensor(numbers, dtype=torch.int64)


def _bytes(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_again(
    dataset: IndexedDataset | None, ids: Tensor, draws: Tensor | None, key: str, rows: Tensor, *, step: int
) -> tuple[Any, Any]:
    """Inputs and targets of a micro-batch that was not stored.

    Args:
        dataset: where to read it. ids, draws: which samples. key, rows: what :func:`content_hash` and
            :func:`row_hashes` gave of it. step: for errors.

    Raises:
        QuestionError: there is no dataset.
        StoreError: a sample cannot be read, or is not as it was.
    """
    if dataset is None:
        raise QuestionError(
            "the inputs of this run were not stored, and are to be read again",
            where=f"the batch of step {step}",
            remedy="open_run(..., dataset=explaind_core.data.IndexedDataset(...)), with its seed and collator; while "
            "recording, Recorder(..., inputs=dataset)",
        )
    where = f"the batch of step {step}"
    try:
        batch = dataset.batch(ids, draws)
    except ExplaindError:
        raise
    except Exception as error:
        raise StoreError(
            f"the samples cannot be read again: {type(error).__name__}: {error}",
            where=f"{where}: samples {_some(ids)}",
            remedy="open the run with the dataset that it was recorded with",
        ) from error
    content = {"inputs": batch.inputs, "targets": batch.targets}
    structure, tensors = trees.flatten(content, where)
    if content_hash(structure, tensors) != key:
        other = ids[row_hashes(content, len(ids)) != rows]
        raise StoreError(
            "samples that were read again are not as they were when the run was recorded",
            where=f"{where}: samples {_some(other)}" if len(other) else where,
            expected="the content that was recorded, bit by bit"
            if len(other)
            else "names, dtypes and shapes as recorded",
            got=f"{len(other)} of {len(ids)} samples differ" if len(other) else "the same numbers, arranged otherwise",
            remedy="open the run with the dataset, seed, collator and targets that it was recorded with; randomness in "
            "the dataset must come from the global generators of Python, numpy (legacy) or torch",
        )
    return batch.inputs, batch.targets


def _some(ids: Tensor) -> str:
    shown = ids[:5].tolist()
    return f"{shown}{' ...' if len(ids) > 5 else ''}"
