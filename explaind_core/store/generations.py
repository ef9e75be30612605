"""Which continuation of a run a file belongs to: every time recording goes on, a new generation of files begins.

A run that is recorded in one go has the one generation, which has no name. Recording that goes on after step k, at the
end or further back, begins another one: the later files carry its name, drawn at random. ``generations.json`` lists
them in order. A step s belongs to the latest generation that began before it: files of a part of the run that was
recorded anew, or of a copy that was continued elsewhere, are known by carrying another name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from explaind_core.store.json_schema import COUNT, mismatch

__all__ = ["GENERATIONS_NAME", "Generations"]

GENERATIONS_NAME = "generations.json"
_PATTERN: Any = [{"name": str, "after": COUNT, "lost_lines?": COUNT}]


@dataclass(frozen=True)
class Generations:
    """The generations of a run, in the order in which they began.

    Attributes:
        begun: ``name``, and ``after`` which step it began; without the first one, which has no name.

    Example:
        >>> found = Generations().going_on(after=10, name="b").going_on(after=5, name="c")
        >>> [found.of_step(s) for s in (4, 5, 6, 11)], found.name
        (['', '', 'c', 'c'], 'c')
    """

    begun: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def stored(cls, found: Any) -> Generations:
        """What a file tells.

        Args:
            found: JSON.

        Returns:
            The generations.

        Raises:
            ValueError: it is something else.
        """
        words = mismatch(found, _PATTERN)
        if words:
            raise ValueError(words)
        return cls(tuple(found))

    @property
    def name(self) -> str:
        """Of the latest one."""
        return str(self.begun[-1]["name"]) if self.begun else ""

    def lost_lines(self, since: int = 0) -> int:
        """How many lines of the log were lost before recording went on.

        Args:
            since: count where it went on behind this step or a later one.

        Returns:
            Their number.
        """
        return sum(entry.get("lost_lines", 0) for entry in self.begun if entry["after"] >= since)

    def going_on(self, after: int, *, lost_lines: int = 0, name: str | None = None) -> Generations:
        """These and a new one.

        Args:
            after: the step behind which it begins.
            lost_lines: of the log, by then.
            name: drawn at random by default.

        Returns:
            All of them.
        """
        entry: dict[str, Any] = {"name": uuid4().hex if name is None else name, "after": after}
        return Generations((*self.begun, entry | ({"lost_lines": lost_lines} if lost_lines else {})))

    def _latest(self, fits: Iterable[bool]) -> str:
        names = [entry["name"] for entry, fit in zip(self.begun, fits, strict=True) if fit]
        return str(names[-1]) if names else ""

    def of_step(self, s: int) -> str:
        """Which one a step belongs to.

        Args:
            s: 1..N.

        Returns:
            Its name.
        """
        return self._latest(entry["after"] < s for entry in self.begun)

    def of_snapshot(self, s: int) -> str:
        """Which one a snapshot belongs to: each generation begins with one.

        Args:
            s: after which step.

        Returns:
            Its name.
        """
        return self._latest(entry["after"] <= s for entry in self.begun)

    def holds(self, name: str, s: int) -> bool:
        """Whether what a generation told of a step still counts: none that came later began before that step.

        Args:
            name: of the generation.
            s: the step, 0 for before the first.

        Returns:
            False where it was recorded anew since.

        Raises:
            LookupError: there is no such generation.
        """
        names = ["", *(entry["name"] for entry in self.begun)]
        if name not in names:
            raise LookupError(name)
        return all(entry["after"] >= s for entry in self.begun[names.index(name) :])
