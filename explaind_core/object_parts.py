"""What Python objects hold: the parts of functions, containers and instances, on the way to a part of a model."""

from __future__ import annotations

import dis
import functools
import logging
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "ATOMS",
    "LRU_CACHE",
    "TRANSPARENT",
    "WEAK",
    "content",
    "globals_read",
    "is_the_programs",
    "parts_of",
    "slots",
]

#: What has no parts, or is never a part of one model alone.
ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, property, type),
    *(types.ModuleType, types.CodeType, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
#: So many entries of a container are looked at.
_ENTRIES = 1000
LRU_CACHE = type(functools.lru_cache(len))
WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
#: What is no object of its own on the way to a part of the model.
TRANSPARENT = (
    *(types.FunctionType, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, functools.partial),
    *(weakref.ReferenceType, LRU_CACHE, dict, list, tuple, set, frozenset, deque, *WEAK),
)


def parts_of(value: Any) -> Iterator[Any]:
    """What a value holds.

    Args:
        value: any object.

    Yields:
        What its attributes, entries and cells are, one level deep.
    """
    if isinstance(value, types.FunctionType):
        contents = (content(cell) for cell in value.__closure__ or ())
        yield from (found[0] for found in contents if found is not None)
        yield from (value.__defaults__, value.__kwdefaults__, vars(value))
        yield from _global_parts(value)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords, vars(value))
    elif isinstance(value, weakref.ReferenceType):
        yield value()
    elif isinstance(value, LRU_CACHE):
        yield value.__wrapped__
    elif isinstance(value, ATOMS):
        return
    elif isinstance(value, Mapping | weakref.WeakKeyDictionary | weakref.WeakValueDictionary):
        yield from (part for item in islice(value.items(), _ENTRIES) for part in item)
    elif isinstance(value, list | tuple | set | frozenset | deque | weakref.WeakSet):
        yield from islice(value, _ENTRIES)
    if not isinstance(value, types.FunctionType | functools.partial):
        yield from list(getattr(value, "__dict__", {}).values())
        yield from (getattr(value, name) for name in slots(type(value)) if hasattr(value, name))


def _global_parts(function: types.FunctionType) -> Iterator[Any]:
    """Globals that a function reads, as far as these are of a model, or functions beside it that may read some."""
    for name in globals_read(function.__code__):
        value = function.__globals__.get(name)
        beside = isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__
        if beside or isinstance(value, nn.Module | Tensor | types.MethodType | functools.partial):
            yield value


def is_the_programs(value: Any) -> bool:
    """Whether a value is none of a model's: an optimizer, a logger, what ends something when it is deleted.

    Args:
        value: any object.
    """
    ends = hasattr(type(value), "__del__")
    return ends or isinstance(value, torch.optim.Optimizer | logging.Filterer | threading.Thread | Tensor | np.ndarray)


def content(cell: types.CellType) -> tuple[Any] | None:
    """What a closure's cell holds.

    Args:
        cell: of a function's ``__closure__``.

    Returns:
        It, in a tuple; None where the cell holds nothing yet.
    """
    try:
        return (cell.cell_contents,)
    except ValueError:  # empty
        return None


def globals_read(code: types.CodeType) -> list[str]:
    """The global names that a function reads, those of functions inside it as well.

    Args:
        code: the function's.

    Returns:
        Each name once.
    """
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in globals_read(part)]
    return list(dict.fromkeys([*own, *inner]))


def slots(kind: type) -> list[str]:
    """The attributes that instances of a class keep outside of ``__dict__``.

    Args:
        kind: any class.

    Returns:
        Their names.
    """
    found = [name for each in kind.__mro__ for name in _as_tuple(vars(each).get("__slots__", ()))]
    return [name for name in found if name not in ("__dict__", "__weakref__") and not name.startswith("__")]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
