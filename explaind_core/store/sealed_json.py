"""Small JSON files and log lines that carry a checksum of what they say and of which file of which run they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from xxhash import xxh3_128_hexdigest

__all__ = ["CHECKSUM", "document", "line", "parse", "sealed", "unsealed"]

CHECKSUM = "checksum"


def sealed(value: Mapping[str, Any], *place: object) -> dict[str, Any]:
    """A mapping with its checksum.

    Args:
        value: JSON.
        place: what else it must be found with: the run, the file, the line.

    Returns:
        The mapping as it will be read, with ``checksum``.

    Example:
        >>> unsealed(sealed({"steps": 3}, "run", "closed.json"), "run", "closed.json")
        {'steps': 3}
    """
    plain = json.loads(json.dumps(value))  # tuples become lists and keys strings, as they will be when read
    return {**plain, CHECKSUM: _digest(plain, place)}


def unsealed(value: Mapping[str, Any], *place: object) -> dict[str, Any]:
    """What :func:`sealed` was given.

    Args:
        value: a mapping with its checksum.
        place: what it was sealed with.

    Returns:
        The mapping without its checksum.

    Raises:
        ValueError: it was changed, stems from another place, or has no checksum.
    """
    rest = {key: entry for key, entry in value.items() if key != CHECKSUM}
    if CHECKSUM not in value:
        raise ValueError("it carries no checksum")
    if value[CHECKSUM] != _digest(rest, place):
        raise ValueError("it does not have the checksum that was stored")
    return rest


def parse(text: bytes) -> dict[str, Any]:
    """A JSON mapping.

    Args:
        text: of a file or a line.

    Returns:
        The mapping.

    Raises:
        ValueError: it is none, or nested too deeply for Python.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__} where a mapping was expected")
    return value


def document(value: Mapping[str, Any], *place: object) -> bytes:
    """A whole file.

    Args:
        value: JSON.
        place: what it is sealed with.

    Returns:
        The content of the file.
    """
    return (json.dumps(sealed(value, *place), indent=1) + "\n").encode()


def line(value: Mapping[str, Any], *place: object) -> bytes:
    """One line of a log.

    Args:
        value: JSON.
        place: what it is sealed with.

    Returns:
        The line, with its end.
    """
    return (json.dumps(sealed(value, *place)) + "\n").encode()


def _digest(value: Any, place: tuple[object, ...]) -> str:
    return xxh3_128_hexdigest(json.dumps([place, value], sort_keys=True, separators=(",", ":")).encode())
