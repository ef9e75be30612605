"""The check of a whole store: every byte of every file is read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

from explaind_core.errors import StoreError
from explaind_core.progress import track
from explaind_core.store.json_schema import mismatch
from explaind_core.store.run_schema import step_pattern
from explaind_core.store.run_store import LOG_NAME, RunStore

__all__ = ["damages"]

#: So many missing steps are told one by one.
_TOLD = 1000


def damages(store: RunStore, *, progress: bool = False) -> tuple[StoreError, ...]:
    """What is damaged or missing in a store.

    Args:
        store: any run.
        progress: show a bar.

    Returns:
        An error each; empty where all is well.

    Example:
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=2)  # its files go with it
        >>> damages(run.store)
        ()
    """
    found: list[StoreError] = []

    def tried(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except StoreError as error:
            found.append(error)
            return None

    if tried(store.read_manifest) is None:
        try:
            store.read_manifest(damaged=True)
        except StoreError:  # without either there is nothing to compare the others with
            return tuple(found)
    tried(store.look_up_generations)
    if found:  # the others are compared with the copy
        store.look_up_generations(damaged=True)
    closed, steps = tried(store.closed) or {}, tried(store.found_steps) or []
    last = max([*steps, closed.get("steps", 0)])
    # What is declared is told step by step as far as files go; any number may be declared.
    lost = last - len(steps)
    wanted = steps if lost > _TOLD else range(1, last + 1)
    if lost > _TOLD:
        found.append(
            StoreError(
                f"{lost} steps are missing",
                where=store.path / "steps",
                expected=f"steps 1..{last}",
                got=f"{len(steps)} of them",
                remedy="copy the run again from where it was recorded",
            )
        )
    names = {store.start_path: "the start of the run"}
    snapshots = {*store.found_snapshots(), *closed.get("snapshots", [])}
    names |= {store.snapshot_path(s): f"the snapshot after step {s}" for s in sorted(snapshots)}
    names |= dict.fromkeys(store.found_batches(), "a batch")
    lines = closed.get("lines", 0)
    todo = chain(((0, path) for path in list(names)), ((s, store.step_path(s)) for s in wanted))
    for s, path in track(todo, len(names) + len(wanted), "checking files", enabled=progress):
        stored = tried(partial(store.read_tensors, path, what=f"step {s}" if s else names[path]))
        header = (
            stored.header if s and stored is not None and mismatch(stored.header, step_pattern("steps")) is None else {}
        )
        lines = max(lines, header.get("lines", 0) - store.generations.lost_lines(s))
        for entry in header.get("batches", []):
            batch = tried(partial(store.batch_path, entry["key"]))
            if batch is not None and batch not in names and not entry.get("reread"):
                names[batch] = ""  # one that is missing is told once
                tried(partial(store.check_file, batch, what=f"the batch of step {s}"))
    tried(partial(store.read_lines, LOG_NAME, expected=lines, whole=bool(closed)))
    return tuple(found)
