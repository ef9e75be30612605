"""Options that an optimizer holds outside of its parameter groups, as attributes or callables of its own.

Groups tell every option that is in them. The others are found by the constructor's arguments: as an attribute of the
same name, and, in an optimizer that has not stepped yet, as any attribute that differs from that of one made anew.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

__all__ = ["REQUIRED", "HeldOption", "constructor_options", "found_value", "held_options", "is_same", "made_anew"]

#: In the place of a default value, for an argument that has none.
REQUIRED = inspect.Parameter.empty
#: Arguments that are no options.
_ASIDE = ("self", "params", "param_groups", "model", "named_parameters", "defaults")
_MISSING = object()


@dataclass(frozen=True)
class HeldOption:
    """An option that is held aside and is not at its default.

    Attributes:
        option: the constructor's argument, or several that it may be, joined by "or".
        attribute: where the optimizer holds it.
        value: what it holds.
        default: what it would hold by default.
    """

    option: str
    attribute: str
    value: Any
    default: Any


def constructor_options(kind: type[torch.optim.Optimizer]) -> Mapping[str, Any]:
    """The options that the constructor of ``kind`` takes, with their defaults, through ``**kwargs`` to its bases too.

    Example:
        >>> class Mine(torch.optim.SGD):
        ...     def __init__(self, params, scale=1.0, **rest):
        ...         super().__init__(params, **rest)
        >>> list(constructor_options(Mine))[:3]
        ['scale', 'lr', 'momentum']
    """
    hashable: Any = kind
    return _constructor_options(hashable)


@lru_cache(maxsize=256)
def _constructor_options(kind: Any) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base is torch.optim.Optimizer:
            break
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[2:]
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return {name: default for name, default in found.items() if name not in _ASIDE}


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same; a list and a tuple may be, functions only themselves.

    Example:
        >>> is_same([0.9, 0.99], (0.9, 0.99)), is_same(float("nan"), float("nan")), is_same(abs, round)
        (True, True, False)
    """
    if one is other:
        return True
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        a, b = torch.as_tensor(one), torch.as_tensor(other)
        return a.shape == b.shape and bool((a == b).all())
    try:
        return bool(one == other) or bool(one != one and other != other)
    except Exception:  # what cannot be compared is not known to be the same
        return False


def found_value(optimizer: torch.optim.Optimizer, option: str) -> tuple[str, Any]:
    """The attribute that holds ``option`` by its own name, and its value; ``""`` where none does."""
    held = vars(optimizer)
    name = next((name for name in (option, f"_{option}") if name in held), "")
    return name, held.get(name)


def held_options(
    optimizer: torch.optim.Optimizer, modelled: Collection[str], *, unused: bool = False
) -> Iterator[HeldOption]:
    """The options that ``optimizer`` holds aside, that are not ``modelled`` and not at their defaults.

    Args:
        optimizer: the optimizer.
        modelled: options that need no look.
        unused: whether the optimizer has not stepped yet, so that nothing in it but options differs from one made anew:
            attributes of any name are compared too.
    """
    kind = type(optimizer)
    group = {key: value for one in optimizer.param_groups[:1] for key, value in one.items()}
    aside = {o: d for o, d in constructor_options(kind).items() if o not in group and o not in modelled}
    if not aside:
        return
    anew: Mapping[str, Any] | None = None
    nameless = []
    for option, default in aside.items():
        attribute, value = found_value(optimizer, option)
        if not attribute:
            nameless.append(option)
        elif default is not REQUIRED and not is_same(value, default):
            # What a constructor makes of its defaults may be something else than they are.
            anew = made_anew(kind, group) if anew is None else anew
            if attribute not in anew or not is_same(value, anew[attribute]):
                yield HeldOption(option, attribute, value, default)
    if nameless and unused:
        named = {found_value(optimizer, option)[0] for option in constructor_options(kind)}
        anew = made_anew(kind, group) if anew is None else anew
        yield from _nameless(vars(optimizer), anew, {o: aside[o] for o in nameless}, named)


def _nameless(
    held: Mapping[str, Any], anew: Mapping[str, Any], options: Mapping[str, Any], named: Collection[str]
) -> Iterator[HeldOption]:
    for attribute, default in anew.items():
        value = held.get(attribute, _MISSING)
        if attribute in named or value is _MISSING or not (_is_option(default) and _is_option(value)):
            continue
        if not is_same(value, default):
            likely = [option for option, usual in options.items() if is_same(usual, default)]
            yield HeldOption(" or ".join(likely or options), attribute, value, default)


def _is_option(value: Any) -> bool:
    """Whether an attribute is of a kind that options are of: plain data, or a function."""
    if isinstance(value, list | tuple):
        return all(map(_is_option, value))
    return value is None or isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType | type)


def made_anew(kind: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The attributes of an optimizer with these options in its group and all others at their defaults."""
    given = {name: group[name] for name in constructor_options(kind) if name in group}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kind([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], **given)
    except Exception:  # one that needs more than parameters and options
        return {}
    return dict(vars(made))
