"""The optimizer classes that a program itself handed to this library: it may be asked to make more of them."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch

from explaind_core.naming import qualified_name

__all__ = ["hand_over", "handed_over"]

_BY_NAME: WeakValueDictionary[str, type[torch.optim.Optimizer]] = WeakValueDictionary()


def hand_over(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Remember the classes of optimizers that were given to be recorded, or to be restored, in this process.

    Args:
        optimizers: as the program made them.

    Example:
        >>> hand_over([torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)])
        >>> handed_over("torch.optim.sgd.SGD")
        <class 'torch.optim.sgd.SGD'>
    """
    for optimizer in optimizers:
        _BY_NAME[qualified_name(type(optimizer))] = type(optimizer)


def handed_over(name: str) -> type[torch.optim.Optimizer] | None:
    """The class of that name that was handed over last.

    Args:
        name: qualified, as a run holds it.

    Returns:
        The class; None where the program gave no optimizer of it.
    """
    return _BY_NAME.get(name)
