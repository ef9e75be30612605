"""One hash over named tensors: whether a step that is computed again is, bit by bit, the one that was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

__all__ = ["fingerprint"]

#: What numpy has a name for too: the bytes are hashed where they lie.
_KNOWN = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The xxh3-128 hash of all names, dtypes, shapes and bytes, whatever the order of the names.

    Args:
        tensors: by name, on any device.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> zero = torch.zeros(2)
        >>> fingerprint({"a": zero, "b": zero}) == fingerprint({"b": zero, "a": zero})
        True
        >>> fingerprint({"a": zero}) == fingerprint({"a": -zero})  # zeros have signs
        False
    """
    digest: Any = xxh3_128()  # its stubs do not know that arrays are buffers
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel() == 0:
            continue
        if tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in _KNOWN:
            digest.update(tensor.numpy())
        else:
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return str(digest.hexdigest())
