"""One writer a run: a lock that the system itself releases when its process dies, however it dies."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import filelock

from explaind_core.errors import StoreError
from explaind_core.store.locations import write_error

__all__ = ["LOCK_NAME", "WritingLock"]

LOCK_NAME = "writing.lock"


class WritingLock:
    """Held by whoever records into a folder; readers neither take it nor wait for it.

    The file says who holds it. One that was left behind by a killed process is nobody's, and is taken over.

    Args:
        folder: the run's folder, which is made.

    Raises:
        StoreError: somebody else holds it, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lock = WritingLock(Path(folder))
        ...     try:
        ...         WritingLock(Path(folder))
        ...     except StoreError as error:
        ...         print(error.what)
        ...     lock.release()
        this run is being recorded already
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._lock = filelock.FileLock(self._path, timeout=0)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._path.write_text(f"process {os.getpid()} on {platform.node()}\n")
        except filelock.Timeout:
            holder = self._holder()
            own = holder.startswith(f"process {os.getpid()} ")
            raise StoreError(
                "this run is being recorded already",
                where=folder,
                got=f"{LOCK_NAME} is held by {'another Recorder of this process' if own else holder}",
                remedy="close() that Recorder first, or stop() it if its training was interrupted"
                if own
                else "wait until it has finished, or choose another path; "
                "a process that was killed may have left children that still hold it: end them",
            ) from None
        except OSError as error:
            self._lock.release()
            raise write_error(error, self._path, "nothing was written") from error

    def _holder(self) -> str:
        try:
            return self._path.read_text().strip() or "another process"
        except (OSError, ValueError):
            return "another process"

    def release(self) -> None:
        """Let others write; may be called again."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
            self._lock.release()
