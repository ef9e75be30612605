"""The memory budget of a question."""

from __future__ import annotations

from explaind_core.errors import QuestionError
from explaind_core.store import parse_size, readable_size

__all__ = ["check_fits", "parse_memory"]


def parse_memory(memory: str | int) -> int:
    """A memory budget in bytes.

    Args:
        memory: a number of bytes, or a string such as ``"4GiB"``.

    Returns:
        How many bytes that are.

    Raises:
        QuestionError: not a number of bytes with a unit.

    Example:
        >>> parse_memory("4GiB")
        4294967296
    """
    try:
        return parse_size(memory)
    except ValueError:
        raise QuestionError(
            "memory is no amount of memory", expected='bytes, or a string such as "4GiB"', got=memory
        ) from None


def check_fits(memory: int, needed: int, where: str, remedy: str) -> None:
    """Refuse what takes more than the budget.

    Args:
        memory: the budget in bytes.
        needed: what is taken, in bytes.
        where: what takes it, for the error.
        remedy: what to do about it, for the error.

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
