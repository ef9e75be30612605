"""What ``coefficients`` is shown on symbols: an entry that is missing says what the rule has to write for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explaind_core.errors import ProofError
from explaind_core.rules import OptimizerState
from explaind_core.symbolic.tensor import SymbolicTensor

__all__ = ["GroupAfter", "ShownEntries", "counted_after"]


class ShownEntries(OptimizerState):
    """Entries of a group or a state, by name.

    Args:
        parameter: whose they are.
        entries: name -> symbol or value.
        kind: what they are entries of, in words.
        remedy: what to write where one is missing; ``{key}`` stands for its name.

    Example:
        >>> ShownEntries("parameter", {}, "parameter group", "list {key!r} in options")["k"]
        Traceback (most recent call last):
        ...
        explaind_core.errors.ProofError: the parameter group has no entry 'k'
          expected: one of []
          got:      k
          remedy:   list 'k' in options
    """

    def __init__(self, parameter: str, entries: Mapping[str, Any], kind: str, remedy: str) -> None:
        super().__init__(parameter, entries, kind)
        self._remedy = remedy

    def __getitem__(self, key: str) -> Any:
        if key not in self._entries:
            raise ProofError(
                f"the {self._kind} has no entry {key!r}",
                expected=f"one of {sorted(self._entries)}",
                got=key,
                remedy=self._remedy.format(key=key),
            )
        return super().__getitem__(key)


class GroupAfter(ShownEntries):
    """The group after the step: what the recursion wrote, counters one further, and all else as before the step.

    Attributes:
        unwritten: what was read that neither the recursion wrote nor counts: it is taken to be as before the step.
    """

    def __init__(
        self, parameter: str, before: Mapping[str, Any], counted: Mapping[str, Any], written: Mapping[str, Any]
    ) -> None:
        super().__init__(
            parameter,
            {**before, **counted, **written},
            "parameter group after the step",
            "let recursion() set it to what the optimizer leaves there: step.hyper_after[{key!r}] = ...",
        )
        self._before = frozenset(before) - frozenset(counted) - frozenset(written)
        self.unwritten: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        found = super().__getitem__(key)
        self.unwritten |= {key} & self._before
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """The entry, or ``default`` where there is none."""
        return self[key] if key in self else default  # noqa: SIM401


def counted_after(configuration: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """The counters of a group behind the optimizer's ``step``: what a rule's ``proved_for`` has as functions of it."""
    after = SymbolicTensor(step) + 1
    return {name: value(after) for name, value in configuration.items() if callable(value)}
