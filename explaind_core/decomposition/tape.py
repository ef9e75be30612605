"""A run's decomposition in reverse order: what the reverse-time adjoint walks along.

An optimizer replays forwards only. The tape runs forwards once and keeps its state every few steps, on disk;
walking back, it loads the nearest state and replays the segment behind it, whose steps alone are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from torch import Tensor

from explaind_core import trees
from explaind_core.decomposition.decompose import Decomposer, StepDecomposition
from explaind_core.errors import StoreError
from explaind_core.run import Run
from explaind_core.store import RunStore, WorkingFolder

__all__ = ["Tape"]


class Tape:
    """The steps 1..last of a run, to be walked through backwards, more than once if need be.

    Args:
        run: the recorded run.
        last: the step to start from.
        segment: steps held at a time; about sqrt(last) by default.
        seen: called with every step in the pass forwards, in order (a progress bar).

    Example:
        >>> from explaind_core.testing import record_example
        >>> with Tape(record_example(steps=5), 4, segment=2) as tape:
        ...     [step.step for step in tape.backwards()]
        [4, 3, 2, 1]
    """

    def __init__(
        self, run: Run, last: int, *, segment: int | None = None, seen: Callable[[StepDecomposition], object] = id
    ) -> None:
        self.last = last
        self.segment = max(1, segment if segment is not None else math.isqrt(last))
        self._folder = WorkingFolder("tape")
        self._store = RunStore(self._folder.path, compress=False)
        self._decomposer = Decomposer(run)
        self._held: list[StepDecomposition] = []
        try:
            for start in range(0, last, self.segment):
                self._keep(start)
                for step in self._decomposer.steps(start=start, until=min(start + self.segment, last)):
                    seen(step)
                    if start + self.segment >= last:  # the last segment is walked back through first
                        self._held.append(step)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Tape:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete what was kept on disk."""
        self._folder.close()

    def backwards(self) -> Iterator[StepDecomposition]:
        """The steps last, last - 1, ..., 1."""
        for start in reversed(range(0, self.last, self.segment)):
            held, self._held = self._held, []
            if not held:
                self._load(start)
                held = list(self._decomposer.steps(start=start, until=min(start + self.segment, self.last)))
            while held:
                yield held.pop()

    # ------------------------------------------------------------------ kept states
    def _path(self, start: int) -> Path:
        return self._store.snapshot_path(start)

    def _keep(self, start: int) -> None:
        structure, tensors = trees.flatten(self._decomposer.state(), "the optimizer's state")
        # Filter states may be one tensor under two names, which the file format refuses.
        copies: dict[str, Tensor] = {key: tensor.clone() for key, tensor in tensors.items()}
        try:
            self._store.write_tensors(self._path(start), structure, copies)
        except StoreError as error:
            raise self._folder.error(error) from error

    def _load(self, start: int) -> None:
        stored = self._store.read_tensors(self._path(start), what=f"the state after step {start}")
        self._decomposer.load(trees.unflatten(stored.header, stored.tensors))
