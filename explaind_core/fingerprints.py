"""One hash over named tensors: whether a step that is computed again is, bit by bit, the one that was recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from xxhash import xxh3_128

__all__ = ["fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The xxh3-128 hash of all names, dtypes, shapes and bytes, whatever the order of the names.

    Example:
        >>> zero = torch.zeros(2)
        >>> fingerprint({"a": zero, "b": zero}) == fingerprint({"b": zero, "a": zero})
        True
        >>> fingerprint({"a": zero}) == fingerprint({"a": -zero})  # zeros have signs
        False
    """
    digest = xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    return digest.hexdigest()
