"""What Python objects hold: everything that a part of a model may be reached through.

The garbage collector knows what an object refers to, whatever its class keeps it in. Three things are taken otherwise:
of functions, only the globals that they read count; weak references are followed; results that were cached are not.
"""

from __future__ import annotations

import copy
import dis
import functools
import gc
import logging
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_core.copies.not_copied import NotCopied

__all__ = [
    "ATOMS",
    "LRU_CACHE",
    "TRANSPARENT",
    "WEAK",
    "behind",
    "cloned_generator",
    "content",
    "global_parts",
    "is_free",
    "is_of_a_library",
    "is_the_programs",
    "names_in",
    "parts_of",
    "slots",
]

#: What has no parts, or is never a part of one model alone.
ATOMS = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, property, type),
    *(types.ModuleType, types.CodeType, np.dtype),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
LRU_CACHE = type(functools.lru_cache(len))
WEAK = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
#: What is no object of its own on the way to a part of the model.
TRANSPARENT = (
    *(types.FunctionType, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, functools.partial),
    *(weakref.ReferenceType, LRU_CACHE, dict, list, tuple, set, frozenset, deque, *WEAK),
)


def parts_of(value: Any) -> list[Any]:
    """What a value holds.

    Args:
        value: any object.

    Returns:
        What its attributes, entries and cells are, one level deep; nothing that has no parts itself.
    """
    return [part for part in _parts(value) if not _WITHOUT_PARTS[type(part)]]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, types.FunctionType):
        contents = (content(cell) for cell in value.__closure__ or ())
        inside = [found[0] for found in contents if found is not None]
        return [*inside, value.__defaults__, value.__kwdefaults__, vars(value), *global_parts(value).values()]
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    if type(value) in weakref.ProxyTypes:
        return [behind(value)]
    if isinstance(value, LRU_CACHE):
        return [value.__wrapped__, vars(value)]
    if isinstance(value, np.ndarray):
        return value.flat if value.dtype.hasobject else ()
    return gc.get_referents(value)


class _Kinds(dict[type, bool]):
    """Which classes are derived from some others, looked up once each.

    Args:
        kinds: the others.
    """

    def __init__(self, *kinds: type) -> None:
        super().__init__()
        self._kinds = kinds

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, self._kinds)
        return self[kind]


_WITHOUT_PARTS = _Kinds(*ATOMS, NotCopied)
_THE_PROGRAMS = _Kinds(torch.optim.Optimizer, logging.Filterer, threading.Thread, Tensor)


def behind(proxy: Any) -> Any:
    """What a weak proxy stands for.

    Args:
        proxy: made by ``weakref.proxy``.

    Returns:
        The object; None where it is gone.
    """
    try:
        return proxy.__repr__.__self__
    except ReferenceError:
        return None


def global_parts(function: types.FunctionType) -> Mapping[str, Any]:
    """The globals that a function reads, and those of modules and classes that it reads by an attribute.

    Functions of libraries read none that a program's model could be.

    Args:
        function: any.

    Returns:
        By name, ``name.attribute`` of the latter.
    """
    space, code = function.__globals__, function.__code__
    if is_of_a_library(space):
        return {}
    found: dict[str, Any] = {}
    for name in _globals_read(code):
        value = space.get(name)
        if not isinstance(value, types.ModuleType | type):
            found[name] = value
        elif not is_of_a_library(vars(value)):
            found |= {f"{name}.{inner}": vars(value)[inner] for inner in names_in(code) if inner in vars(value)}
    return found


def is_of_a_library(space: Mapping[str, Any]) -> bool:
    """Whether the namespace of a module, or of a class, is that of an installed library.

    Args:
        space: ``vars`` of it, or ``function.__globals__``.
    """
    name = str(space.get("__module__", space.get("__name__", "")))
    root = name.partition(".")[0]
    if root == "__main__":
        return False
    file = str(getattr(sys.modules.get(name), "__file__", None) or "")
    return root in _LIBRARIES or "site-packages" in file or "dist-packages" in file


_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}


def is_the_programs(value: Any) -> bool:
    """Whether a value is none of a model's, whatever it leads to: an optimizer, a logger, a thread, an array's numbers.

    Args:
        value: any object.
    """
    if issubclass(type(value), np.ndarray):
        return not value.dtype.hasobject
    return _THE_PROGRAMS[type(value)]


def is_free(function: types.BuiltinFunctionType) -> bool:
    """Whether a function that is written in C is no method of an object.

    Args:
        function: any.
    """
    return isinstance(function.__self__, types.ModuleType | type | None)


def cloned_generator(value: Any) -> Any:
    """A random generator that draws the numbers that another one would, which goes on to draw them, too.

    Args:
        value: torch's, numpy's or Python's.

    Returns:
        The new one.
    """
    if not isinstance(value, torch.Generator):
        return copy.deepcopy(value)
    made = torch.Generator(device=value.device)
    made.set_state(value.get_state())
    return made


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


@functools.lru_cache(maxsize=10000)
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function reads, those of functions inside it as well."""
    own = [step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _globals_read(part)]
    return tuple(dict.fromkeys([*own, *inner]))


def names_in(code: types.CodeType) -> tuple[str, ...]:
    """All names that a function mentions, of globals and of attributes, those of functions inside it as well.

    Args:
        code: the function's.

    Returns:
        Each name once.
    """
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in names_in(part)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


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
