"""The files of a run as bytes: read without following links, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["UNFINISHED", "NotPlainError", "append", "opened", "read_bytes", "replace", "write"]

# Where a platform lacks a flag it has nothing to be guarded against.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
#: How the names of files end that are still being written.
UNFINISHED = ".unfinished"
#: No file of JSON is longer.
_LONGEST_TEXT = 1 << 30


class NotPlainError(OSError):
    """A link, a folder, a pipe or a device lies where a plain file was expected."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file, opened for reading, and its length. A pipe is refused and not waited for.

    Raises:
        NotPlainError: there is something else at this path.
    """
    if path.is_symlink():
        raise NotPlainError("it is a symbolic link")
    descriptor = os.open(path, _READ)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotPlainError("it is no plain file")
        yield file, status.st_size


def read_bytes(path: Path) -> bytes:
    """The whole of a small file (errors as in :func:`opened`)."""
    with opened(path) as (file, size):
        if size > _LONGEST_TEXT:
            raise NotPlainError(f"it is {size} bytes long")
        return file.read()


def write(path: Path, parts: Iterable[Any]) -> None:
    """Write buffers into a file, one after the other."""
    with path.open("wb") as file:
        file.writelines(parts)


def append(path: Path, size: int, content: bytes) -> int:
    """Write behind the first ``size`` bytes of a file; returns how long it is then."""
    with path.open("ab") as file:
        file.truncate(size)
        file.write(content)
        return file.tell()


def replace(path: Path, parts: Iterable[Any]) -> None:
    """Put a file of these buffers into its place, whole or not at all; its folders are made.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    # Not Path.with_suffix: the name must not end like a finished file.
    temporary = path.parent / (path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary, parts)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
