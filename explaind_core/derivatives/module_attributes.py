"""What a model's modules hold beside parameters and buffers: what a pass through them changed, put back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ModuleAttributes"]

#: What torch itself keeps of every module: hooks, parameters, submodules.
_TORCHS_OWN = frozenset(vars(nn.Module()))


class ModuleAttributes:
    """The plain attributes of all modules of a model, as they are now: hidden states, caches, counters.

    Args:
        model: the model.
        compared: whether it is to be asked what changed; putting back takes less.

    Example:
        >>> class Counting(nn.Module):
        ...     calls = 0
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x
        >>> model = nn.Sequential(Counting())
        >>> before = ModuleAttributes(model)
        >>> _ = model(torch.ones(1))
        >>> before.changed()
        ["'calls' of module '0' (Counting)"]
        >>> before.restore()
        >>> before.changed()
        []
    """

    def __init__(self, model: nn.Module, *, compared: bool = True) -> None:
        self._model = model
        self._values = {module: _plain(module) for module in model.modules()}
        marked = self._values if compared else {}
        self._marks = {module: {n: _mark(v) for n, v in values.items()} for module, values in marked.items()}
        self._contents = {
            module: {n: _contents(v) for n, v in values.items() if isinstance(v, list | dict | set | deque)}
            for module, values in self._values.items()
        }

    def changed(self) -> list[str]:
        """Which attributes are others now, in words."""
        names = {module: name for name, module in self._model.named_modules()}
        found = []
        for module, before in self._marks.items():
            now = _plain(module)
            for attribute in sorted({*before, *now}):
                same = attribute in before and attribute in now and before[attribute] == _mark(now[attribute])
                if not same:
                    where = f"module {names[module]!r}" if names.get(module) else "the model"
                    found.append(f"{attribute!r} of {where} ({type(module).__name__})")
        return found

    def restore(self) -> None:
        """Put attributes back, and what lists, dicts and sets held. Tensors changed in place stay as they are."""
        for module, before in self._values.items():
            # Not by setattr: a tensor may stand where a parameter once did.
            held = vars(module)
            for attribute in _plain(module).keys() - before.keys():
                del held[attribute]
            held.update(before)
            for attribute, contents in self._contents[module].items():
                value: Any = before[attribute]
                value.clear()
                (value.extend if isinstance(value, list | deque) else value.update)(contents)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}


def _contents(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value)


def _mark(value: Any, depth: int = 2) -> Any:
    """What tells a value from what it was: its content where that is small, who it is and how often it was written."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        return type(value), repr(value)
    for kind, state in _GENERATORS.items():
        if isinstance(value, kind):
            return id(value), state(value)
    if depth and isinstance(value, dict):
        return id(value), [(repr(k), _mark(v, depth - 1)) for k, v in value.items()]
    if depth and isinstance(value, list | tuple | deque):
        return [_mark(v, depth - 1) for v in value]
    return id(value)


#: Generators of a module's own.
_GENERATORS: dict[type, Callable[[Any], str]] = {
    torch.Generator: lambda g: str(g.get_state().tolist()),
    np.random.Generator: lambda g: repr(g.bit_generator.state),
    np.random.RandomState: lambda g: repr(g.get_state()),
    random.Random: lambda g: repr(g.getstate()),
}
