"""Whether an object leads to a part of a model, over however many other objects."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from explaind_core.copies.object_parts import TRANSPARENT, is_the_programs, parts_of

__all__ = ["Search", "leads_over"]


class Search:
    """Finds what leads to some objects, and remembers what does and what does not.

    What was looked at is kept alive, so that its id stays its own.

    Args:
        targets: the ids of the objects that are looked for.

    Example:
        >>> target = [1]
        >>> search = Search({id(target)})
        >>> search.leads({"a": ({"b": target},)}), search.leads(lambda: target), search.leads([[1]])
        (True, True, False)
    """

    def __init__(self, targets: Set[int]) -> None:
        self._targets = targets
        self._known: dict[int, bool] = {}
        self._kept: list[Any] = []

    def leads(self, value: Any) -> bool:
        """Whether a value is one of the targets, or holds one, or holds what holds one, and so on.

        Args:
            value: any object. What is the program's (:func:`explaind_core.copies.object_parts.is_the_programs`) leads
                nowhere.
        """
        came_from: dict[int, int | None] = {id(value): None}
        pending, seen = [value], [value]
        while pending:
            each = pending.pop()
            known = self._known.get(id(each))
            if known or id(each) in self._targets:
                self._kept.extend(seen)
                at: int | None = id(each)
                while at is not None:
                    self._known[at] = True
                    at = came_from[at]
                return True
            if known is False or is_the_programs(each):
                continue
            for part in parts_of(each):
                if id(part) not in came_from and (id(part) in self._targets or not is_the_programs(part)):
                    came_from[id(part)] = id(each)
                    pending.append(part)
                    seen.append(part)
        self._kept.extend(seen)
        self._known |= dict.fromkeys(came_from, False)
        return False


def leads_over(objects: int, value: Any, found: Callable[[Any], bool]) -> bool:
    """Whether a value leads to something over at most so many objects; functions and containers do not count.

    Args:
        objects: how many.
        value: any object.
        found: whether an object is what is looked for.

    Example:
        >>> leads_over(0, [("a", print)], callable), leads_over(0, [1, 2], callable)
        (True, False)
    """
    seen: set[int] = set()
    level = [value]
    for _ in range(objects + 1):
        following: list[Any] = []
        while level:
            each = level.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if found(each):
                return True
            if not is_the_programs(each):
                (level if isinstance(each, TRANSPARENT) else following).extend(parts_of(each))
        level = following
    return False
