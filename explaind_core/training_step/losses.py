"""Training losses: how a recorded run remembers one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses

from explaind_core.errors import StoreError
from explaind_core.naming import qualified_name
from explaind_core.training_step import transformers_losses

__all__ = ["LossFunction", "describe_loss", "rebuild_loss"]

#: The losses of ``transformers``' models, by the module that holds them now and by the one of earlier releases.
_OF_TRANSFORMERS = (transformers_losses.__name__, "explaind_core.integrations.losses")
LossFunction = Callable[[Any, Any], Tensor]
#: torch's losses that are functions.
_FUNCTIONS = {
    "cross_entropy", "nll_loss", "kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits", "ctc_loss",
    *(name for name in vars(torch.nn.functional) if name.endswith("_loss") and not name.startswith("_")),
}  # fmt: skip


def describe_loss(loss: Callable[..., Tensor] | None) -> dict[str, Any] | None:
    """What the store keeps of a loss: its name and, for torch's own loss modules, their settings.

    Args:
        loss: a module or a function; None where there is none.

    Returns:
        JSON; None where there is none.

    Example:
        >>> describe_loss(torch.nn.functional.cross_entropy)
        {'name': 'torch.nn.functional.cross_entropy'}
    """
    if loss is None:
        return None
    if isinstance(loss, nn.Module):
        plain = not list(loss.parameters()) and all(buffer is None for buffer in loss._buffers.values())
        settings = {k: v for k, v in vars(loss).items() if not k.startswith("_") and k != "training"}
        known = type(loss).__module__ == torch_losses.__name__ and plain
        return {"name": qualified_name(type(loss))} | ({"settings": settings} if known else {})
    module, name = getattr(loss, "__module__", "?"), getattr(loss, "__qualname__", type(loss).__qualname__)
    return {"name": f"{module}.{name}"}


def rebuild_loss(description: dict[str, Any] | None) -> LossFunction | None:
    """The loss that :func:`describe_loss` described.

    Only names of torch's losses and of our integrations' few are looked up, so a store cannot make this run other code.

    Args:
        description: as stored.

    Returns:
        The loss; None where it is another one than these.

    Raises:
        StoreError: the settings are not those of that loss.

    Example:
        >>> rebuild_loss(describe_loss(torch.nn.MSELoss(reduction="sum")))
        MSELoss()
    """
    if description is None:
        return None
    module, _, name = description["name"].rpartition(".")
    if module == torch_losses.__name__ and "settings" in description and name in torch_losses.__all__:
        try:
            kind = getattr(torch_losses, name)
            loss: LossFunction = _with_settings(kind, description["settings"])
            _check_settings(kind, description["settings"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"the recorded loss cannot be built again: {error}",
                where=f"{name}, manifest.json",
                got=description["settings"],
                remedy="pass open_run(..., loss=)",
            ) from error
        return loss
    if module == "torch.nn.functional" and name in _FUNCTIONS:
        function: LossFunction = getattr(torch.nn.functional, name)
        return function
    return transformers_losses.LOSSES.get(name) if module in _OF_TRANSFORMERS else None


def _with_settings(kind: Callable[..., nn.Module], settings: Mapping[str, Any]) -> nn.Module:
    """A loss with its settings, if these are what :func:`describe_loss` keeps of one: plain values."""
    for name, value in settings.items():
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"{name} is a {type(value).__name__}")
    return kind(**settings)


def _check_settings(kind: Callable[..., Any], settings: dict[str, Any]) -> None:
    """Settings of the kinds that the loss has by default: most losses look at them only when they are called.

    Raises:
        ValueError: one is something else.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        value, default = settings.get(name, parameter.default), parameter.default
        if name == "reduction":
            fits = value in ("none", "mean", "sum")
        elif type(default) is int and name != "p":  # the exponent of a distance may be any number
            fits = type(value) is int and abs(value) < 1 << 63
        elif type(default) in (int, float):
            fits = type(value) in (int, float) and math.isfinite(value)
        else:
            fits = type(value) is bool or type(default) is not bool
        if not fits:
            raise ValueError(f"{name} is {value!r} where {default!r} is the default")
