"""Refuses NaN and infinity as early as they are seen."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from explaind_core.errors import NonFiniteError

__all__ = ["check_gradients", "check_parameters", "copied", "flattened", "to_dense", "tolerance"]

#: In single precision some kinks of a ReLU are decided otherwise. What is to be found (another batch, another loss)
#: differs much more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def _bad(values: Tensor) -> int:
    # One reduction per tensor; a sum is not finite where an entry is not.
    return 0 if math.isfinite(values.sum().item()) else int((~torch.isfinite(values)).sum())


def check_gradients(gradients: Mapping[str, Tensor], step: int) -> None:
    """Refuse gradients that are not finite.

    Args:
        gradients: by parameter name; sparse ones may be among them.
        step: the number of the step that is fed them.

    Raises:
        NonFiniteError: naming the parameter and the step.

    Example:
        >>> check_gradients({"weight": torch.tensor([1.0, float("nan")])}, 3)
        Traceback (most recent call last):
        explaind_core.errors.NonFiniteError: the gradient is not finite: ...
          where:    parameter 'weight', step 3
          ...
    """
    for name, gradient in gradients.items():
        values = gradient.detach().coalesce().values() if gradient.is_sparse else gradient.detach()
        if bad := _bad(values):
            raise NonFiniteError(
                "the gradient is not finite: the loss is NaN or infinite, or its derivative is",
                where=f"parameter {name!r}, step {step}",
                expected="finite numbers",
                got=f"{bad} of {values.numel()} entries are NaN or infinite",
                remedy=f"training has diverged; the {step - 1} steps recorded so far are intact",
            )


def check_parameters(theta: Mapping[str, Tensor], step: int) -> None:
    """Refuse parameters that a step made NaN or infinite.

    Args:
        theta: by parameter name.
        step: the number of the step that made them.

    Raises:
        NonFiniteError: naming the parameter and the step.
    """
    for name, value in theta.items():
        if _bad(value):
            raise NonFiniteError(
                "the step made a parameter NaN or infinite",
                where=f"parameter {name!r}, step {step}",
                expected="finite numbers",
                remedy=f"lower the learning rate; the {step - 1} steps recorded so far are intact",
            )


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same gradients or outputs may differ, relative to their size.

    Args:
        dtype: what both are computed in.

    Returns:
        A fraction.

    Example:
        >>> tolerance(torch.float64)
        1e-09
    """
    return _TOLERANCE.get(dtype, 32 * torch.finfo(dtype).eps)


def copied(tensor: Tensor) -> Tensor:
    """A copy in main memory that later changes do not reach.

    Args:
        tensor: on any device.

    Returns:
        The copy, contiguous and without a gradient.
    """
    return tensor.detach().to("cpu", copy=True).contiguous()


def flattened(tensor: Tensor, axes: int) -> Tensor:
    """A stack of tensors behind ``axes`` axes, each of them flattened; one entry where they are scalars.

    Args:
        tensor: ``[..., *shape]``; the shape may be ().
        axes: how many axes stand before it.

    Returns:
        ``[..., numbers]``.

    Example:
        >>> flattened(torch.zeros(5, 2, 3), 1).shape, flattened(torch.zeros(5), 1).shape
        (torch.Size([5, 6]), torch.Size([5, 1]))
    """
    return tensor.flatten(axes) if tensor.ndim > axes else tensor.unsqueeze(-1)


def to_dense(tensor: Tensor) -> Tensor:
    """A sparse tensor with its zeros filled in, a dense one as it is.

    Args:
        tensor: sparse or dense.

    Returns:
        A dense tensor.
    """
    return tensor.to_dense() if tensor.is_sparse else tensor
