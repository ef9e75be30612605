"""Amounts of bytes, as people write and read them."""

from __future__ import annotations

import re

__all__ = ["parse_size", "readable_size"]

_BINARY = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_DECIMAL = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
_UNITS = {**_BINARY, **_DECIMAL, "KB": 10**3, "B": 1}


def readable_size(size: float, *, disk: bool = False) -> str:
    """Bytes with a unit that fits.

    Args:
        size: how many.
        disk: in units of 1000, as disks are sold, to three digits; by default in units of 1024, as memory is.

    Returns:
        The number and its unit, which :func:`parse_size` reads.

    Example:
        >>> readable_size(3 * 2**29), readable_size(3 * 2**29, disk=True), readable_size(100)
        ('1.5 GiB', '1.61 GB', '100 B')
    """
    for unit, bytes_of_it in (_DECIMAL if disk else _BINARY).items():
        # What rounds up to 1000 of a unit is one of the next.
        if size >= bytes_of_it * (0.9995 if disk else 1):
            return f"{size / bytes_of_it:{'.3g' if disk else '.1f'}} {unit}"
    return f"{size:.3g} B" if disk else f"{size} B"


def parse_size(text: str | int) -> int:
    """Bytes, from a number with or without a unit.

    Args:
        text: a number of bytes, or a string such as ``"4GiB"``, ``"1.5 MB"``.

    Returns:
        How many bytes that are.

    Raises:
        ValueError: it is no such thing.

    Example:
        >>> parse_size("4GiB"), parse_size("1.5 kB"), parse_size(7)
        (4294967296, 1500, 7)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(text), re.ASCII)
    unit = _UNITS.get(match.group(2) or "B") if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no amount of bytes")
    return int(float(match.group(1)) * unit)
