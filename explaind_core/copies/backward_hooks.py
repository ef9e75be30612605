"""Hooks of the backward pass: what looks at gradients, or changes them, is no part of the function that a model is."""

from __future__ import annotations

from torch import nn

__all__ = ["without_backward_hooks"]


def without_backward_hooks(model: nn.Module) -> nn.Module:
    """Take the backward hooks from a private copy that derivatives are taken of.

    torch's transforms (``vmap``, ``jvp``) refuse them. Where they changed the gradients of a training, these are not
    those of its loss, which shows when they are split by samples.

    Args:
        model: a copy.

    Returns:
        The same module.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> _ = layer.register_full_backward_hook(print)
        >>> len(without_backward_hooks(layer)._backward_hooks)
        0
    """
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return model
