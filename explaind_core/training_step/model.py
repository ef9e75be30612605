"""Calling a model, and what its parameters are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["ModelCall", "ParameterInfo", "run_model"]

ModelCall = Callable[[Any], Any]


def run_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``; a tuple or list of inputs is spread over the arguments, a dict over the keywords.

    Args:
        model: a module, or a function of its inputs.
        inputs: as a batch has them.

    Returns:
        What the model returns.

    Example:
        >>> run_model(lambda a, b: a + b, {"a": 1, "b": 2})
        3
    """
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the model.

    Attributes:
        shape: of its tensor.
        dtype: of its tensor.
        trained: whether the optimizer trained it at the start.
    """

    shape: torch.Size
    dtype: torch.dtype
    trained: bool
