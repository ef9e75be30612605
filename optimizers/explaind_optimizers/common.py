"""What the rules for optimizers of other packages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from explaind_core import RecordedStep
from explaind_core.operators import LinearOperator

__all__ = ["MAXIMIZE", "Centred", "ascent", "cautious_mask", "decays", "ticks"]


#: pytorch_optimizer keeps this option as an attribute of its optimizers, not in their groups.
MAXIMIZE: Mapping[str, str] = {"maximize": "maximize"}


class Centred(LinearOperator):
    """Gradient centralisation: subtracts the mean over all axes but the first; vectors are left alone.

    Example:
        >>> import torch
        >>> Centred().apply(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])
    """

    def apply(self, x: Tensor) -> Tensor:
        """``x`` without its mean per channel."""
        return x - x.mean(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else x

    @property
    def adjoint(self) -> LinearOperator:
        """Itself: it is a projection."""
        return self


def ascent(hyper: Mapping[str, Any]) -> float:
    """-1 where the optimizer maximizes, else 1."""
    return -1.0 if hyper.get("maximize") else 1.0


def ticks(step: RecordedStep) -> int:
    """The group's own count of steps, this one included: it ticks for parameters without gradient too."""
    return int(step.hyper.get("step", 0)) + 1


def decays(hyper: Mapping[str, Any], *, decoupled: bool = False) -> dict[str, float]:
    """W and rho where ``weight_decouple`` chooses between them and ``fixed_decay`` drops the rate from rho.

    Args:
        hyper: the group. decoupled: what holds where it does not say.

    Example:
        >>> decays({"lr": 0.5, "weight_decay": 0.1, "weight_decouple": True})
        {'coupled_decay': 0.0, 'decoupled_decay': 0.05}
    """
    decay = float(hyper["weight_decay"])
    if not hyper.get("weight_decouple", decoupled):
        return {"coupled_decay": decay, "decoupled_decay": 0.0}
    return {"coupled_decay": 0.0, "decoupled_decay": decay * (1.0 if hyper.get("fixed_decay") else float(hyper["lr"]))}


def cautious_mask(update: Tensor, u: Tensor) -> Tensor:
    """Cautious optimizers (Liang et al., 2024) drop what disagrees in sign with ``u``, and scale up the rest."""
    mask = (update * u > 0).to(u.dtype)
    return mask * (mask.numel() / (mask.sum() + 1))
