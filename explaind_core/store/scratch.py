"""Folders for what does not fit into memory while something is computed; gone afterwards, even after a kill."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from explaind_core.errors import StoreError
from explaind_core.store.locations import write_error

__all__ = ["WorkingFolder"]

_LOCK = "in-use.lock"
#: How ``tempfile`` calls such a folder.
_MADE = re.compile(r"explaind-[a-z]+-[a-z0-9_]{8}")
#: Seconds after which a folder whose lock nobody holds belongs to nobody: one that is just being made has none yet.
_ABANDONED = 60.0


class WorkingFolder:
    """A new folder in the system's temporary one (``TMPDIR``), removed when it is closed.

    A process that is killed cannot remove its folder, but no longer holds the lock in it either: whoever makes the next
    folder removes all such ones of the same user.

    Args:
        kind: what is kept in it; part of its name.

    Attributes:
        path: the folder.

    Raises:
        StoreError: it cannot be made.

    Example:
        >>> with WorkingFolder("example") as folder:
        ...     folder.path.is_dir()
        True
        >>> folder.path.exists()
        False
    """

    def __init__(self, kind: str) -> None:
        self._what = kind
        try:
            _remove_abandoned(Path(tempfile.gettempdir()))
            self.path = Path(tempfile.mkdtemp(prefix=f"explaind-{kind}-"))
            self._lock = filelock.FileLock(self.path / _LOCK)
            self._lock.acquire(timeout=0)
        except OSError as error:
            raise self.error(error) from error

    def error(self, error: OSError | StoreError) -> StoreError:
        """What a failed write into it is called.

        Args:
            error: what was raised, or a StoreError that it was the cause of.

        Returns:
            The error to raise.

        Raises:
            StoreError: what was given, where no write was the cause.
        """
        given = error.__cause__ if isinstance(error, StoreError) else error
        if not isinstance(given, OSError):
            raise error
        return write_error(
            given,
            getattr(self, "path", tempfile.gettempdir()),
            f"temporary files lie there ({self._what}): set the environment variable TMPDIR to a folder with more "
            "room. The run is untouched, and what was written to out= is kept",
        )

    def allocate(self, name: str, size: int) -> Path:
        """A file of ``size`` bytes that are there: writing to it later cannot fail for want of room.

        Args:
            name: of the file in the folder.
            size: in bytes.

        Returns:
            Its path.

        Raises:
            StoreError: there is no room.
        """
        path = self.path / name
        try:
            with path.open("xb") as file:
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self.error(error) from error
        return path

    def close(self) -> None:
        """Remove it."""
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"explaind-*/{_LOCK}"):
        with contextlib.suppress(OSError, filelock.Timeout):  # another user's, in use, or gone meanwhile
            if _is_own(path) and time.time() - path.lstat().st_mtime > _ABANDONED:
                with filelock.FileLock(path, timeout=0):
                    shutil.rmtree(path.parent)


def _is_own(lock: Path) -> bool:
    """Whether a lock lies in a folder that was made here by this user: others may plant links to his in such places."""
    folder, file = lock.parent.lstat(), lock.lstat()
    mine = not hasattr(os, "getuid") or folder.st_uid == file.st_uid == os.getuid()
    made = _MADE.fullmatch(lock.parent.name) and stat.S_ISDIR(folder.st_mode)
    return bool(mine and made and stat.S_ISREG(file.st_mode) and file.st_nlink == 1)
