"""Compiled models by the names of the plain ones: ``torch.compile`` changes how a module runs, not what it is."""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["plain", "plain_copy", "plain_name", "qualified_name"]


#: Under this name a compiled module holds the plain one.
_INNER = "_orig_mod"


def plain(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given; any other module itself.

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
    while (inner := module._modules.get(_INNER)) is not None:
        module = inner
    return module


def plain_name(name: str) -> str:
    """The name that a parameter, buffer or module has where nothing is compiled.

    Args:
        name: with the prefixes that compiling brings, or without.

    Returns:
        The name without them.

    Example:
        >>> plain_name("encoder._orig_mod.0.weight")
        'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != _INNER)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a module in which nothing is compiled, in no part of it.

    Args:
        model: any module; it is left as it is.

    Returns:
        The copy.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.compile(torch.nn.Linear(1, 1), backend="eager"))
        >>> [type(layer).__name__ for layer in plain_copy(model)], [type(layer).__name__ for layer in model]
        (['Linear'], ['OptimizedModule'])
    """
    copied = copy.deepcopy(plain(model))
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = plain(child)
    return copied


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
