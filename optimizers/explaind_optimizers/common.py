"""What the rules for optimizers of other packages share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from explaind_core import RecordedStep
from explaind_core.operators import LinearOperator, is_symbolic

__all__ = [
    "ABSENT",
    "COUNTED",
    "DECAYS",
    "MAXIMIZE",
    "Centred",
    "ascent",
    "cautious_mask",
    "decayed",
    "decays",
    "exp",
    "lengthened",
    "lengthening",
    "log",
    "number",
    "root",
    "ticks",
]

#: In ``proved_for``: an option that a package does not have, and a count of the optimizer's steps before this one.
ABSENT: Any = NotImplemented
COUNTED: tuple[object, ...] = (lambda step: step - 1,)


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


def number(x: Any) -> float:
    """``x``, which may be a tensor of one element, as Python's number; a proof's symbol stays one."""
    return x if is_symbolic(x) else float(x)


def root(x: Any) -> float:
    """The square root of a number."""
    return x.sqrt() if is_symbolic(x) else math.sqrt(x)


def log(x: Any) -> float:
    """The natural logarithm of a number."""
    return x.log() if is_symbolic(x) else math.log(x)


def exp(x: Any) -> float:
    """The exponential of a number."""
    return x.exp() if is_symbolic(x) else math.exp(x)


def ascent(hyper: Mapping[str, Any]) -> float:
    """-1 where the optimizer maximizes, else 1."""
    return -1.0 if hyper.get("maximize") else 1.0


def ticks(step: RecordedStep) -> int:
    """The group's own count of steps, this one included: it ticks for parameters without gradient too."""
    count = step.hyper.get("step", 0)
    return (count if is_symbolic(count) else int(count)) + 1


def decays(hyper: Mapping[str, Any], *, decoupled: bool = False) -> dict[str, float]:
    """W and rho where ``weight_decouple`` chooses between them and ``fixed_decay`` drops the rate from rho.

    Args:
        hyper: the group's hyper-parameters.
        decoupled: whether decay is decoupled where the group does not say.

    Example:
        >>> decays({"lr": 0.5, "weight_decay": 0.1, "weight_decouple": True})
        {'coupled_decay': 0.0, 'decoupled_decay': 0.05}
    """
    decay = number(hyper["weight_decay"])
    if not hyper.get("weight_decouple", decoupled):
        return {"coupled_decay": decay, "decoupled_decay": 0.0}
    return {"coupled_decay": 0.0, "decoupled_decay": decay * (1.0 if hyper.get("fixed_decay") else number(hyper["lr"]))}


#: What every rule with these two options is proved for.
DECAYS: Mapping[str, tuple[object, ...]] = {
    "weight_decouple fixed_decay": ((False, False), (True, False), (True, True))
}


def decayed(step: Any, *, decoupled: bool = False) -> tuple[Any, Any]:
    """For a ``recursion``: theta after decoupled decay, and the gradient to descend along with coupled decay in it."""
    hyper, theta = step.hyper, step.theta
    g = -step.gradient if hyper.get("maximize") else step.gradient
    if not hyper.get("weight_decouple", decoupled):
        return theta, g + hyper["weight_decay"] * theta
    rate = 1 if hyper.get("fixed_decay") else hyper["lr"]
    return theta * (1 - rate * hyper["weight_decay"]), g


def lengthening(step: RecordedStep, u: Tensor) -> float:
    """AdaNorm's factor of ``u``, which is never to be shorter than gradients used to be."""
    if not step.hyper.get("adanorm") or not u.any():
        return 1.0
    usual, size = number(step.after["exp_grad_adanorm"]), number(u.norm())
    return usual / size if usual > size else 1.0


def lengthened(step: Any, g: Any) -> Any:
    """For a ``recursion``: the gradient as AdaNorm makes it longer, and its average length in the state."""
    if not step.hyper["adanorm"]:
        return g
    r, size, state = step.hyper["adanorm_r"], step.norm(g), step.state
    usual = state["exp_grad_adanorm"] = r * state["exp_grad_adanorm"] + (1 - r) * size
    return g * usual / size if usual > size else g


def cautious_mask(update: Tensor, u: Tensor) -> Tensor:
    """Cautious optimizers (Liang et al., 2024) drop what disagrees in sign with ``u``, and scale up the rest."""
    mask = (update * u > 0).to(u.dtype)
    return mask * (mask.numel() / (mask.sum() + 1))
