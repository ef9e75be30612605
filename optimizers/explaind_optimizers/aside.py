"""What the rules for optimizers of other packages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from explaind_core import RecordedStep, UpdateRule
from explaind_core.operators import LinearOperator

__all__ = ["Centred", "OptionsAside", "ascent", "cautious_mask", "decays", "ticks"]


class OptionsAside(UpdateRule):
    """A rule for optimizers that keep constructor options as attributes of themselves, outside their groups.

    A rule and a recording look at the groups. So claiming such an optimizer writes these options into its groups too,
    where it never looks itself, and into its defaults, so that they are checked, recorded and given to the constructor
    like all the others when the run is replayed.

    Attributes:
        aside: constructor option -> attribute that holds it.
    """

    aside: ClassVar[Mapping[str, str]] = {"maximize": "maximize"}

    def claims(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this rule speaks for ``optimizer``; if so, its options aside become visible in its groups."""
        claimed = super().claims(optimizer)
        for option, attribute in self.aside.items():
            if claimed and hasattr(optimizer, attribute):
                for group in (optimizer.defaults, *optimizer.param_groups):
                    group[option] = getattr(optimizer, attribute)
        return claimed


class Centred(LinearOperator):
    """Gradient centralisation: subtracts the mean over all axes but the first; vectors are left alone.

    Example:
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
