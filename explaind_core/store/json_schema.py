"""The shape of stored JSON, checked before anything is taken from it."""

from __future__ import annotations

from typing import Any

__all__ = ["MANIFEST", "STEP", "mismatch"]


class _Count:
    """A whole number from 0 to what fits a size."""

    __name__ = "whole number"


COUNT = _Count()
_NUMBER = (int, float)

#: What every manifest holds. A key with ``?`` may be missing; more keys may be there.
MANIFEST: Any = {
    "format": str,
    "version": int,
    "model": str,
    "optimizer": str,
    "rule": {"name": str, "package": str, "inferred?": bool, "closed_by_secant?": bool, "settings?": dict},
    "loss": (None, {"name": str, "settings?": dict}),
    "train_size": (None, COUNT),
    "parameters": [{"name": str, "shape": [COUNT], "dtype": str, "trained": bool}],
    "buffers": [str],
    "evaluates_elsewhere?": bool,
    "outside?": [str],
    "provenance?": {"libraries": dict, "git_commit": (None, str)},
}
#: What the header of every step holds.
STEP: Any = {
    "groups": [{"params": [str]}],
    "batches": [{"key": str, "weight": _NUMBER}],
    "gradient_factor": _NUMBER,
    "closure_losses?": [_NUMBER],
    "calls?": COUNT,
    "lines?": COUNT,
}


def mismatch(value: Any, pattern: Any, place: str = "") -> str | None:
    """The first place where a value is not as a pattern says.

    Args:
        value: what JSON was read as.
        pattern: a type, None, ``[pattern of every entry]``, ``{key: pattern}`` (a key that ends with ``?`` may be
            missing) or a tuple of alternatives.
        place: where the value stands in what it is part of.

    Returns:
        The place in words; None if the value fits.

    Example:
        >>> mismatch({"steps": [1, "a"]}, {"steps": [int], "name?": str})
        "steps[1] is 'a' where int was expected"
    """
    if isinstance(pattern, tuple):
        found = [mismatch(value, alternative, place) for alternative in pattern]
        return None if None in found else found[-1]
    if isinstance(pattern, list):
        if not isinstance(value, list):
            return _said(place, value, "a list")
        entries = (mismatch(entry, pattern[0], f"{place}[{index}]") for index, entry in enumerate(value))
        return next((words for words in entries if words), None)
    if isinstance(pattern, dict):
        if not isinstance(value, dict):
            return _said(place, value, "a mapping")
        for key, inner in pattern.items():
            name = key.removesuffix("?")
            at = f"{place}.{name}" if place else name
            if name not in value and not key.endswith("?"):
                return f"{at} is missing"
            words = mismatch(value[name], inner, at) if name in value else None
            if words:
                return words
        return None
    if pattern is COUNT:
        return None if type(value) is int and 0 <= value < 1 << 62 else _said(place, value, COUNT.__name__)
    if pattern is None:
        return None if value is None else _said(place, value, "null")
    return None if type(value) is pattern else _said(place, value, pattern.__name__)


def _said(place: str, value: Any, expected: str) -> str:
    shown = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return f"{place or 'it'} is {shown[:100]} where {expected} was expected"
