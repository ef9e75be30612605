"""What the loop logged, as one table over steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import xarray as xr

from explaind_core.store import LINE, check_json

__all__ = ["metrics_of"]


def metrics_of(lines: Iterable[Mapping[str, Any]], *, until: int, where: object) -> xr.Dataset:
    """The logged numbers of the steps 1..until.

    Args:
        lines: of the log: ``step``, and numbers by their names. Of a number that a step was told twice the later holds.
        until: the last step that counts.
        where: the log, for errors.

    Returns:
        One variable a metric over ``step``, NaN where none was logged.

    Raises:
        StoreError: a line holds something else.

    Example:
        >>> found = metrics_of([{"step": 1, "loss": 0.5}, {"step": 2, "norm": 3.0}], until=2, where="metrics.jsonl")
        >>> found.step.values.tolist(), found.loss.values.tolist()
        ([1, 2], [0.5, nan])
    """
    rows: dict[int, dict[str, float]] = {}
    for number, entry in enumerate(lines, 1):
        check_json(entry, LINE, what="a line of metrics.jsonl", where=f"{where}, line {number}")
        if entry["step"] <= until:
            rows.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if k != "step"})
    steps = sorted(rows)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = {name: ("step", [rows[s].get(name, float("nan")) for s in steps]) for name in names}
    return xr.Dataset(columns, coords={"step": steps})
