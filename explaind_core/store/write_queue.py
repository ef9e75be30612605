"""Files written at once or, where that is asked for, behind the training loop: in order, a few at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from weakref import WeakSet

from explaind_core.store.locations import is_local, locate

__all__ = ["WriteQueue", "settle"]

#: Writes of fewer bytes are not worth waking a thread for: Python hands over to it for milliseconds.
SMALL = 2**20


class WriteQueue:
    """Runs the writes of one run, one after the other, at once or in a thread of their own.

    After a write that failed no other one is run, so that no gap appears, and every later call raises its error.
    Whatever is queued is written before the interpreter ends, unless it is killed.

    Args:
        path: of the run.
        waiting: how many may wait for the one that is being written; 0 to write at once. Each holds a step's parameters
            and gradients in memory, and is lost if the process is killed.

    Attributes:
        path: of the run, in full.
        waiting: how many may wait.

    Example:
        >>> done, queue = [], WriteQueue("runs/example", waiting=2)
        >>> for k in range(5):
        ...     queue.put(lambda k=k: done.append(k))
        >>> queue.flush()
        >>> done
        [0, 1, 2, 3, 4]
        >>> queue.close()
    """

    def __init__(self, path: str | os.PathLike[str], waiting: int = 0) -> None:
        self.path, self.waiting = _name(path), waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explaind-writer")
        self._pending: deque[Future[None]] = deque()
        self._error: BaseException | None = None
        _OPEN.add(self)

    def put(self, write: Callable[[], object], size: int = SMALL) -> None:
        """Queue a write; waits while as many others do as may.

        Args:
            write: what is called, with no argument.
            size: its bytes; a small one is run at once if none is waiting.

        Raises:
            StoreError: this or an earlier write failed.
        """
        self.check()
        if not self.waiting or (size < SMALL and not self._pending):
            self._run(write)
            self.check()
            return
        while len(self._pending) > self.waiting:  # one of them is being written
            self._pending.popleft().result()
        self.check()
        self._pending.append(self._thread.submit(self._run, write))

    def check(self) -> None:
        """Raise what a write raised; waits for nothing.

        Raises:
            StoreError: a write failed.
        """
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            StoreError: a write failed.
        """
        wait(list(self._pending))
        self.check()

    def close(self) -> None:
        """Flush, and end the thread.

        Raises:
            StoreError: a write failed.
        """
        self._thread.shutdown()
        self.check()

    def _run(self, write: Callable[[], object]) -> None:
        if self._error is None:
            try:
                write()
            except BaseException as error:
                self._error = error


def _name(path: str | os.PathLike[str]) -> str:
    found = locate(path)
    return os.path.abspath(found) if is_local(found) else str(found)


_OPEN: WeakSet[WriteQueue] = WeakSet()


def settle(path: str | os.PathLike[str]) -> None:
    """Wait until what this process has queued for the run at ``path`` is written: who reads it sees every step.

    Args:
        path: of the run.

    Example:
        >>> settle("runs/example")
    """
    here = _name(path)
    for queue in [queue for queue in _OPEN if queue.path == here]:
        wait(list(queue._pending))
