"""Amounts of memory, as users say them and read them."""

from __future__ import annotations

import re

from explaind_core.errors import QuestionError

__all__ = ["check_fits", "parse_memory", "readable_size"]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_memory(memory: str | int) -> int:
    """A memory budget in bytes.

    Raises:
        QuestionError: not a number of bytes with a unit.

    Example:
        >>> parse_memory("4GiB")
        4294967296
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(memory), re.ASCII)
    unit = _UNITS.get(match.group(2) or "B") if match else None
    if match is None or unit is None:
        raise QuestionError("memory is no amount of memory", expected='bytes, or a string such as "4GiB"', got=memory)
    return int(float(match.group(1)) * unit)


def readable_size(size: int) -> str:
    """Bytes with a unit that fits.

    Example:
        >>> readable_size(3 * 2**29), readable_size(100)
        ('1.5 GiB', '100 B')
    """
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size} B"


def check_fits(memory: int, needed: int, where: str, remedy: str) -> None:
    """Refuse what takes more than the budget.

    Raises:
        QuestionError: it does.

    Example:
        >>> check_fits(100, 100, "a table", "raise memory=")
    """
    if needed > memory:
        raise QuestionError(
            "the question does not fit into the memory budget",
            where=where,
            expected=f"at most {readable_size(memory)}",
            got=readable_size(needed),
            remedy=remedy,
        )
