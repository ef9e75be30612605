"""One writer at a time, of a run or of a result: a lock that the system itself releases when its process dies."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock

from explaind_core.errors import StoreError
from explaind_core.store.guarded_files import NotPlainError, opened_plain, overwrite_plain
from explaind_core.store.locations import write_error

__all__ = ["LockWords", "WritingLock"]


#: What a lock says, or a part of that, or zeros: while it is made, on a full disk, after a loss of power.
_SAID = re.compile(rb"(process \d+ on [^\n\0]*\n?|process \d+( (on?)?)?|process \d*|(p(r(o(c(e(ss?)?)?)?)?)?)?)\0*")
_LONGEST = 1024


@dataclass(frozen=True)
class LockWords:
    """What is said to whom a lock keeps out.

    Attributes:
        taken: that another one writes, in a sentence.
        remedy: what to do where another process does.
        kept: what is safe where the lock itself cannot be written.
        same_process: who the other one is where it belongs to this process.
        same_process_remedy: what to do then; as for another process where it is empty.
    """

    taken: str
    remedy: str
    kept: str
    same_process: str = "this process"
    same_process_remedy: str = ""


class WritingLock:
    """Held by whoever writes into a folder; readers neither take it nor wait for it.

    The file says who holds it. One that was left behind by a killed process is nobody's, and is taken over. It is for
    folders of this machine; elsewhere nobody can tell.

    Args:
        path: the lock's file; its folder is made.
        where: what is written, for errors.
        words: what is said to whom it keeps out.
        former: the lock's file in earlier releases, whose processes may still hold it; it is looked at, and never
            written or deleted.

    Raises:
        StoreError: somebody else holds it, something else than a lock lies there, or the folder cannot be written.

    Example:
        >>> import tempfile
        >>> words = LockWords("this is being written already", "wait until it has finished", "nothing was written")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with WritingLock(Path(folder) / "writing.lock", where=folder, words=words):
        ...         try:
        ...             WritingLock(Path(folder) / "writing.lock", where=folder, words=words)
        ...         except StoreError as error:
        ...             print(error.what, error.got, sep="; ")
        this is being written already; writing.lock is held by this process
    """

    def __init__(self, path: Path, *, where: object, words: LockWords, former: Path | None = None) -> None:
        self._path = path
        self._lock = filelock.FileLock(path, timeout=0)
        if former is not None and _is_held(former):
            raise _taken(former, where, words)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _words_in(path) is None:
                raise StoreError(
                    "something else than a lock lies where the lock must be",
                    where=path,
                    expected="nothing, or a file that says which process holds it",
                    remedy="move it away",
                )
            self._lock.acquire()
        except filelock.Timeout:
            raise _taken(path, where, words) from None
        except OSError as error:
            raise write_error(error, path, words.kept) from error
        with contextlib.suppress(OSError):  # held is held: what a full disk lacks is told by what is written next
            overwrite_plain(path, f"process {os.getpid()} on {platform.node()}\n".encode())

    def release(self) -> None:
        """Let others write; may be called again."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _words_in(path: Path) -> bytes | None:
    """What a lock says; None where something else than a lock lies there."""
    try:
        with opened_plain(path) as (file, size):
            said = file.read(_LONGEST)
            alone = os.fstat(file.fileno()).st_nlink <= 1  # 0: its holder has just released it
    except FileNotFoundError:
        return b""
    except NotPlainError:
        return None
    return said if size < _LONGEST and alone and _SAID.fullmatch(said) else None


def _is_held(path: Path) -> bool:
    """Whether a process holds a lock that says so. Anything else there is somebody's file, and not even locked."""
    try:
        if not _words_in(path):
            return False
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # of another user, who may hold it
        return True


def _taken(path: Path, where: object, words: LockWords) -> StoreError:
    holder = (_words_in(path) or b"").decode(errors="replace").strip() or "another process"
    own = holder.startswith(f"process {os.getpid()} ")
    return StoreError(
        words.taken,
        where=where,
        got=f"{path.name} is held by {words.same_process if own else holder}",
        remedy=(own and words.same_process_remedy) or words.remedy,
    )
