"""Inner products of feature maps with weights, such that small numbers are not lost in single precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_core.tensors import flattened

__all__ = ["Matrices", "cosines", "gram_products"]

Matrices = np.ndarray[Any, Any]


def cosines(products: Matrices) -> Matrices:
    """Inner products ``[..., n, n]`` divided by both norms; NaN where one is zero.

    Example:
        >>> cosines(np.array([[4.0, 3.0], [3.0, 9.0]]))
        array([[1. , 0.5],
               [0.5, 1. ]])
    """
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Matrices = products / (norms[..., :, None] * norms[..., None, :])
    return found


def gram_products(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None],
) -> Matrices:  # fmt: skip
    """``sum_j phi(x)_j diag(weights) phi(x')_j^T`` of two blocks of test samples within a layer: ``[n', n'']``.

    A parameter without weights counts nothing: it had no gradient yet.
    """
    total = np.zeros(tuple(len(next(iter(phi.values()))) for phi in (left, right)))
    for name, mask in masks.items():
        if name in weights:
            root = weights[name].double().sqrt().reshape(-1)
            root = root if mask is None else root * mask.reshape(-1)
            size = float(root.max())
            if size > 0:
                a, one = _scaled(left[name], root / size)
                b, other = (a, one) if right is left else _scaled(right[name], root / size)
                total += ((a @ b.T).double() * (size * one * (size * other).T)).numpy()
    return total


def _scaled(phi: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """``phi diag(root)`` by row, ``[n', J' d]``, divided by each row's largest entry, ``[n', 1]``.

    In single precision, the squares of small numbers are zero.
    """
    rows = (flattened(phi, 2) * root.to(phi.dtype)).flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return rows.div_(largest), largest.double()
