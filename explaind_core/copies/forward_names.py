"""What the ``forward`` of a module's class reads from outside of the module: globals, and attributes of classes."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from explaind_core.copies.object_parts import global_parts, is_of_a_library, names_in

__all__ = ["outside_names"]


def outside_names(kind: type) -> Iterator[tuple[str, str, Any]]:
    """What ``forward`` reads that is no attribute of the module itself, and what the methods read that it mentions.

    Classes and functions of libraries are not looked into.

    Args:
        kind: a class of modules.

    Yields:
        The function that reads something, the name that it reads it by, and what stands there.

    Example:
        >>> class Net(nn.Module):
        ...     factor = 2
        ...     def forward(self, x):
        ...         return self.factor * self.scaled(x)
        ...     def scaled(self, x):
        ...         return offset + x
        >>> [(function, name) for function, name, _ in outside_names(Net)]
        [('Net.forward', 'factor'), ('Net.scaled', 'offset')]
    """
    pending, seen = [_in_class(kind, "forward")], set()
    while pending:
        for function in _functions(pending.pop()):
            if function in seen or is_of_a_library(function.__globals__):
                continue
            seen.add(function)
            named = f"{kind.__qualname__}.{function.__name__}"
            yield from ((named, name, value) for name, value in global_parts(function).items())
            for name in names_in(function.__code__):
                value = _in_class(kind, name)
                if list(_functions(value)):
                    pending.append(value)
                elif value is not None:
                    yield named, name, value


def _in_class(kind: type, name: str) -> Any:
    """An attribute of a class as it stands there; None where a library's class, or none, has it."""
    found = next((each for each in kind.__mro__ if name in vars(each)), None)
    return None if found is None or found is nn.Module or is_of_a_library(vars(found)) else vars(found)[name]


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions that an attribute of a class is made of."""
    if isinstance(value, types.FunctionType):
        yield value
        if hasattr(value, "__wrapped__"):
            yield from _functions(value.__wrapped__)
    elif isinstance(value, staticmethod | classmethod):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        yield from _functions(value.fget)
