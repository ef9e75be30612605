"""What is counted while a result is computed: one table of what each count means and how its parts are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["COUNTS", "Count", "totals"]


@dataclass(frozen=True)
class Count:
    """One number that is kept of every window.

    Attributes:
        name: in a window's contribution and, over ``step``, in a result.
        meaning: what it says of a window.
        dtype: of its array over ``step``.
        over_windows: how the numbers of several windows make one: a ufunc whose ``reduce`` does that.
        over_blocks: how those of several blocks of test samples do. A block that is joined twice, after a kill, counts
            once.
        attribute: what the one number of all windows is called in a result that does not keep ``step``; empty where
            there is none.
        along_step: whether a result that keeps ``step`` has it as a variable.

    Example:
        >>> COUNTS["nodes"].over_all_windows([2, 3]), COUNTS["nodes"].over_all_blocks([2, 3])
        (5, 3)
    """

    name: str
    meaning: str
    dtype: type[bool | int | float]
    over_windows: np.ufunc
    over_blocks: np.ufunc
    attribute: str = ""
    along_step: bool = True

    def array(self, values: Sequence[Any]) -> np.ndarray[Any, Any]:
        """The numbers of several windows.

        Args:
            values: one a window.

        Returns:
            Its array over ``step``: ``[windows]``.
        """
        return np.array(values, dtype=self.dtype)

    def over_all_windows(self, values: Sequence[Any]) -> Any:
        """The one number of several windows.

        Args:
            values: one a window, at least one.

        Returns:
            A number of Python's.
        """
        return self.over_windows.reduce(self.array(values)).item()

    def over_all_blocks(self, values: Sequence[Any]) -> Any:
        """The one number of several blocks of test samples, for the same window or windows.

        Args:
            values: one a block, at least one.

        Returns:
            A number of Python's.
        """
        return self.over_blocks.reduce(self.array(values)).item()


#: Every count by its name, in the order in which a result has them.
COUNTS: Mapping[str, Count] = {
    count.name: count
    for count in (
        Count("nodes", "nodes of the quadrature that were used", int, np.add, np.maximum, "nodes_used"),
        Count("evaluations", "nodes that were evaluated, refinements included", int, np.add, np.maximum,
              "nodes_evaluated"),
        Count("converged", "whether every segment met the tolerance", bool, np.logical_and, np.logical_and),
        Count("missed", "segments that missed the tolerance", int, np.add, np.maximum, "steps_not_converged",
              along_step=False),
        Count("update_error", "how much of a step its rule does not explain, at most", float, np.maximum, np.maximum,
              "update_error"),
        Count("correction", "the size of the secant that closes a step, at most; only where secants close steps", float,
              np.maximum, np.maximum, "correction"),
    )
}  # fmt: skip


def totals(counts: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The counts of all windows, as the attributes of a result that does not keep ``step``.

    Args:
        counts: name in :data:`COUNTS` -> one number a window.

    Returns:
        Attribute -> number, of those counts that have one.

    Example:
        >>> totals({"nodes": [2, 4], "converged": [True, False], "missed": [0, 1]})
        {'nodes_used': 6, 'steps_not_converged': 1}
    """
    return {
        COUNTS[name].attribute: COUNTS[name].over_all_windows(values)
        for name, values in counts.items()
        if COUNTS[name].attribute
    }
