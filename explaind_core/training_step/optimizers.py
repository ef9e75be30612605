"""Builds an optimizer again from its class and its parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from explaind_core.errors import StoreError
from explaind_core.naming import qualified_name

__all__ = ["constructor_arguments", "rebuild_optimizer"]


def constructor_arguments(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> dict[str, Any]:
    """Those values of a parameter group that the constructor of ``kind`` has arguments for.

    Args:
        kind: the class.
        group: a parameter group.

    Returns:
        Argument -> value; the parameters themselves are left out.

    Example:
        >>> constructor_arguments(torch.optim.SGD, {"params": [], "lr": 0.5, "initial_lr": 1.0})
        {'lr': 0.5}
    """
    wanted = inspect.signature(kind).parameters
    return {key: value for key, value in group.items() if key in wanted and key != "params"}


def rebuild_optimizer(
    kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], *, where: object = None
) -> torch.optim.Optimizer:
    """``kind`` over ``groups``, called with those of the first group's values that its constructor has arguments for.

    Args:
        kind: its class.
        groups: the parameter groups, each with ``params``.
        where: which run it is of, for the error.

    Returns:
        The optimizer, with an empty state.

    Raises:
        StoreError: the constructor refuses them.

    Example:
        >>> group = {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5, "initial_lr": 1.0}
        >>> rebuild_optimizer(torch.optim.SGD, [group]).param_groups[0]["lr"]
        0.5
    """
    options = constructor_arguments(kind, groups[0])
    try:
        return kind(groups, **options)
    except Exception as error:
        raise StoreError(
            f"{qualified_name(kind)} cannot be rebuilt from the recorded hyper-parameters: {error}",
            where=where,
            got=options,
            remedy="pass open_run(..., make_optimizer=lambda groups: ...)",
        ) from error
