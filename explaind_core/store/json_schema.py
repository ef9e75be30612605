"""The shape of stored JSON, checked before anything is taken from it: the language in which patterns are written.

A pattern is a type, None, one of the scalars below, ``[pattern of every entry]``, ``{key: pattern}`` (a key that ends
with ``?`` may be missing; more keys may be there, but for :class:`Only`), a tuple of alternatives, :class:`Row`,
:class:`Every`, :class:`OneOf` or :class:`Both`. The patterns of a run's files are in
:mod:`explaind_core.store.run_schema`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from explaind_core.errors import StoreError

__all__ = [
    "ANY_NUMBER",
    "COUNT",
    "DEVICE",
    "DEVICES",
    "JSON",
    "NUMBER",
    "POSITIVE",
    "THREADS",
    "TREE",
    "Both",
    "Every",
    "OneOf",
    "Only",
    "Row",
    "check_json",
    "mismatch",
]


@dataclass(frozen=True)
class Scalar:
    """One value.

    Attributes:
        words: what it is called.
        fits: whether a value is one.
    """

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Nested:
    """A value of any depth.

    Attributes:
        fault: value, place -> the first place where it is something else, in words; None if it fits.
    """

    fault: Callable[[Any, str], str | None]


@dataclass(frozen=True)
class Every:
    """A mapping with any keys.

    Attributes:
        value: the pattern of all of its values.
    """

    value: Any


@dataclass(frozen=True)
class Both:
    """A value that fits two patterns.

    Attributes:
        first: one of them.
        second: the other.
    """

    first: Any
    second: Any


class OneOf(tuple[Any, ...]):
    """One of these strings or numbers, by value and type."""


class Row(tuple[Any, ...]):
    """A list of this length, with a pattern for each entry."""


class Only(dict[str, Any]):
    """A mapping with these keys and no others."""


_DEVICE = re.compile(r"[a-z]{2,16}(:[0-9]{1,4})?")


def _whole(value: Any, first: int, last: int) -> bool:
    return type(value) is int and first <= value <= last


def _number(value: Any) -> bool:
    return _whole(value, -(1 << 63), (1 << 64) - 1) or type(value) is float


#: What fits a size.
COUNT = Scalar("whole number", lambda value: _whole(value, 0, (1 << 62) - 1))
POSITIVE = Scalar("positive whole number", lambda value: _whole(value, 1, (1 << 62) - 1))
#: No machine has more, and so many do not harm one.
THREADS = Scalar("number of threads", lambda value: _whole(value, 1, 4096))
NUMBER = Scalar("finite number", lambda value: _number(value) and math.isfinite(value))
#: What torch computes on, by the names that it gives.
DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "ipu", "maia", "privateuseone")
DEVICE = Scalar("device", lambda value: isinstance(value, str) and bool(_DEVICE.fullmatch(value)))
#: NaN and infinity, too: what was measured, or is a user's option.
ANY_NUMBER = Scalar("number", _number)


def _json_fault(value: Any, place: str) -> str | None:
    """Any JSON, of numbers that Python's and torch's arithmetic take."""
    if isinstance(value, dict):
        return _first(_json_fault(entry, f"{place}.{key}") for key, entry in value.items())
    if isinstance(value, list):
        return _first(_json_fault(entry, f"{place}[{index}]") for index, entry in enumerate(value))
    return None if value is None or isinstance(value, str | bool) or _number(value) else _said(place, value, "number")


def _tree_fault(value: Any, place: str) -> str | None:
    """What :func:`explaind_core.trees.flatten` makes."""
    if isinstance(value, list):
        return _first(_tree_fault(entry, f"{place}[{index}]") for index, entry in enumerate(value))
    if not isinstance(value, dict):
        return _json_fault(value, place)
    marks = [key for key in value if key.startswith("#")]
    if not marks:
        return _first(_tree_fault(entry, f"{place}.{key}") for key, entry in value.items())
    if len(value) > 1 or marks[0] not in _MARKS:
        return f"{place or 'it'} is marked by {list(value)[:3]!r} where one of {list(_MARKS)} was expected"
    return _mismatch(value[marks[0]], _MARKS[marks[0]], f"{place}.{marks[0]}")


JSON = Nested(_json_fault)
#: Nested data with tensors inside.
TREE = Nested(_tree_fault)
_MARKS: dict[str, Any] = {
    "#tensor": str,
    "#tuple": [TREE],
    "#items": [Row((TREE, TREE))],
    "#sparse": Row((Only({"#tensor": str}), Only({"#tensor": str}), [COUNT], bool)),
}


def mismatch(value: Any, pattern: Any, place: str = "") -> str | None:
    """The first place where a value is not as a pattern says.

    Args:
        value: what JSON was read as.
        pattern: see the top of this file.
        place: where the value stands in what it is part of.

    Returns:
        The place in words; None if the value fits.

    Example:
        >>> mismatch({"steps": [1, "a"]}, {"steps": [int], "name?": str})
        "steps[1] is 'a' where int was expected"
        >>> mismatch({"factor": float("nan")}, {"factor": NUMBER})
        'factor is nan where finite number was expected'
    """
    try:
        return _mismatch(value, pattern, place)
    except RecursionError:
        return f"{place or 'it'} is nested too deeply"


def check_json(value: Any, pattern: Any, *, what: str, where: object) -> None:
    """Refuse what is not as a pattern says.

    Args:
        value: what JSON was read as.
        pattern: see :func:`mismatch`.
        what: what it is, for the error.
        where: the file.

    Raises:
        StoreError: it is something else; the field is named.

    Example:
        >>> check_json({"steps": -1}, {"steps": COUNT}, what="closed.json", where="run/closed.json")
        Traceback (most recent call last):
        explaind_core.errors.StoreError: closed.json is not as it must be: steps is -1 where whole number was expected
        ...
    """
    words = mismatch(value, pattern)
    if words:
        raise StoreError(
            f"{what} is not as it must be: {words}",
            where=where,
            remedy="do not use this store: it was not written by explaind",
        )


def _mismatch(value: Any, pattern: Any, place: str) -> str | None:
    if isinstance(pattern, OneOf):
        return (
            None if any(type(v) is type(value) and v == value for v in pattern) else _said(place, value, list(pattern))
        )
    if isinstance(pattern, Both):
        return _mismatch(value, pattern.first, place) or _mismatch(value, pattern.second, place)
    if isinstance(pattern, Row):
        if not isinstance(value, list) or len(value) != len(pattern):
            return _said(place, value, f"a list of {len(pattern)}")
        return _first(_mismatch(v, p, f"{place}[{k}]") for k, (v, p) in enumerate(zip(value, pattern, strict=True)))
    if isinstance(pattern, tuple):
        found = [_mismatch(value, alternative, place) for alternative in pattern]
        return None if None in found else found[-1]
    if isinstance(pattern, list):
        if not isinstance(value, list):
            return _said(place, value, "a list")
        return _first(_mismatch(entry, pattern[0], f"{place}[{index}]") for index, entry in enumerate(value))
    if isinstance(pattern, dict | Every):
        return _mapping_fault(value, pattern, place)
    if isinstance(pattern, Nested):
        return pattern.fault(value, place)
    if isinstance(pattern, Scalar):
        return None if pattern.fits(value) else _said(place, value, pattern.words)
    if pattern is None:
        return None if value is None else _said(place, value, "null")
    return None if type(value) is pattern else _said(place, value, pattern.__name__)


def _mapping_fault(value: Any, pattern: dict[str, Any] | Every, place: str) -> str | None:
    if not isinstance(value, dict):
        return _said(place, value, "a mapping")
    inside = f"{place}." if place else ""
    if isinstance(pattern, Every):
        return _first(_mismatch(entry, pattern.value, f"{inside}{key}") for key, entry in value.items())
    names = {key.removesuffix("?"): key for key in pattern}
    for name, key in names.items():
        if name not in value and not key.endswith("?"):
            return f"{inside}{name} is missing"
        words = _mismatch(value[name], pattern[key], f"{inside}{name}") if name in value else None
        if words:
            return words
    more = [key for key in value if key not in names] if isinstance(pattern, Only) else []
    return f"{inside}{more[0][:100]} is there where nothing was expected" if more else None


def _first(faults: Iterable[str | None]) -> str | None:
    return next((words for words in faults if words), None)


def _said(place: str, value: Any, expected: object) -> str:
    if isinstance(value, dict | list):
        shown = f"a {type(value).__name__}"
    elif type(value) is int and abs(value) > sys.maxsize:
        shown = f"a whole number of {value.bit_length()} bits"  # too long for Python to print, perhaps
    else:
        shown = repr(value)
    return f"{place or 'it'} is {shown[:100]} where {expected} was expected"
