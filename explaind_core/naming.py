"""Wrapped models by the names of the plain ones: a compiler, several devices, a framework change how a module runs.

Not what it is: parameters, buffers and submodules of a run are called as they are where nothing is wrapped.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

__all__ = ["COMPILED", "held_by", "inner_name", "plain", "plain_name", "plain_optimizer", "qualified_name", "wrapping"]

#: Under this name a compiled module holds the plain one.
COMPILED = "_orig_mod"
#: Wrappers of frameworks, by the module and name of their class, and what they call the module inside.
_BY_NAME = {
    ("lightning.fabric.wrappers", "_FabricModule"): "_forward_module",
    ("lightning_fabric.wrappers", "_FabricModule"): "_forward_module",
}


def inner_name(module: nn.Module) -> str | None:
    """Under which name a wrapper holds the module that it runs; None for what is no wrapper.

    Args:
        module: any.

    Returns:
        The attribute's name.

    Example:
        >>> inner_name(nn.DataParallel(nn.Linear(1, 1))), inner_name(nn.Linear(1, 1))
        ('module', None)
    """
    if COMPILED in module._modules:
        return COMPILED
    if isinstance(module, DataParallel | DistributedDataParallel):
        return "module"
    names = (_BY_NAME.get((kind.__module__, kind.__name__)) for kind in type(module).__mro__)
    return next((name for name in names if name is not None), None)


def wrapping(module: nn.Module) -> list[nn.Module]:
    """The module, what it wraps, what that wraps, and so on to the plain one.

    A running average (``torch.optim.swa_utils.AveragedModel``) wraps the copy that it keeps.

    Args:
        module: any.

    Returns:
        From the outermost to the plain one; the module alone where it wraps nothing.

    Example:
        >>> [type(each).__name__ for each in wrapping(AveragedModel(nn.DataParallel(nn.Linear(1, 1))))]
        ['AveragedModel', 'DataParallel', 'Linear']
    """
    found = [module]
    while True:
        name = "module" if isinstance(found[-1], AveragedModel) else inner_name(found[-1])
        inner = None if name is None else found[-1]._modules[name]
        if inner is None:
            return found
        found.append(inner)


def plain(module: nn.Module) -> nn.Module:
    """The module inside all wrappers, the one that ``torch.compile`` was given; any other module itself.

    Args:
        module: any.

    Returns:
        The same object, not a copy.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1)
        >>> plain(torch.compile(layer, backend="eager")) is layer
        True
    """
    return wrapping(module)[-1]


def plain_name(name: str, model: nn.Module) -> str:
    """The name that a parameter, buffer or module of ``model`` has where no part of it is wrapped.

    Args:
        name: with the prefixes that wrappers bring, or without.
        model: the module that it is a name in.

    Returns:
        The name without them.

    Example:
        >>> model = nn.Sequential(nn.DataParallel(nn.Linear(1, 1)))
        >>> [plain_name(name, model) for name, _ in model.named_parameters()]
        ['0.weight', '0.bias']
    """
    parts: list[str] = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != inner_name(module):
            parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer inside a framework's shell (accelerate's, Lightning Fabric's), whose own hooks nobody calls.

    Args:
        optimizer: any; what is no optimizer is returned as it is.

    Returns:
        The same object that the shell steps, not a copy.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> inside = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> plain_optimizer(SimpleNamespace(optimizer=inside)) is inside
        True
    """
    while isinstance(inner := held_by(optimizer, "optimizer"), Optimizer):
        optimizer = inner
    return optimizer


def held_by(wrapper: Any, name: str) -> Any:
    """An attribute of a wrapper; None where it has none, or raises something else when it is asked.

    Args:
        wrapper: any object.
        name: of the attribute.
    """
    try:
        return getattr(wrapper, name, None)
    except Exception:  # whatever somebody's property raises
        return None


def qualified_name(kind: type) -> str:
    """``module.Class``, by which a class is recorded and found again.

    Args:
        kind: any class.

    Returns:
        Its name.

    Example:
        >>> import torch
        >>> qualified_name(torch.optim.SGD)
        'torch.optim.sgd.SGD'
    """
    return f"{kind.__module__}.{kind.__qualname__}"
