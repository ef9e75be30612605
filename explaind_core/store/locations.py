"""The files of a run as bytes, in a folder or wherever fsspec reaches: not following links, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from upath import UPath

from explaind_core.errors import StoreError

__all__ = [
    "UNFINISHED",
    "NotPlainError",
    "append",
    "is_local",
    "locate",
    "look_again",
    "opened",
    "read_bytes",
    "remove",
    "replace",
    "write",
    "write_error",
]


# Where a platform lacks a flag it has nothing to be guarded against.
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
#: How the names of files end that are still being written.
UNFINISHED = ".unfinished"
#: No file of JSON is longer.
_LONGEST_TEXT = 1 << 30


def locate(path: str | os.PathLike[str] | UPath) -> Path:
    """Where a run lies.

    Args:
        path: a local path, an address that fsspec knows (``memory://runs/demo``, ``s3://bucket/run``), or a ``UPath``.

    Raises:
        StoreError: fsspec does not know that kind of address.

    Returns:
        A ``Path``; for addresses a ``UPath``, which has the same methods.

    Example:
        >>> locate("file:///tmp/run"), is_local(locate("memory://runs/demo"))
        (PosixPath('/tmp/run'), False)
    """
    if isinstance(path, os.PathLike) or (isinstance(path, str) and "://" not in path):
        return Path(path)
    try:
        found = UPath(path)
        _ = found.fs  # here, and not at the first step, it is told that a package is missing
    except (ImportError, ValueError) as error:
        raise StoreError(
            f"there is no such kind of address here: {error}",
            where=path,
            expected="a folder, or an address that fsspec knows",
            remedy="install the package that fsspec needs for it (s3fs for s3://, gcsfs for gs://)",
        ) from error
    return Path(found.path) if found.protocol in ("", "file", "local") else cast(Path, found)


def is_local(path: Path) -> bool:
    """Whether this is a path of this machine's own file system."""
    return isinstance(path, Path)


class NotPlainError(OSError):
    """A link, a folder, a pipe or a device lies where a plain file was expected."""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file, opened for reading, and its length. A pipe is refused and not waited for.

    Raises:
        NotPlainError: there is something else at this path.
    """
    if not is_local(path):
        with path.open("rb") as file:
            yield cast(BinaryIO, file), path.stat().st_size
        return
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


def _files(path: Path) -> Any:
    """Fsspec's file system of an address."""
    return cast(Any, path).fs


def look_again(path: Path) -> None:
    """Forget what is remembered of a listing elsewhere: somebody may be writing there."""
    if not is_local(path):
        _files(path).invalidate_cache()


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    if not is_local(path):
        _files(path).rm(cast(Any, path).path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write(path: Path, parts: Iterable[Any]) -> None:
    """Write buffers into a file, one after the other."""
    if not is_local(path):  # one put: who reads sees all of it or nothing
        _files(path).pipe_file(cast(Any, path).path, b"".join(map(bytes, parts)))
        return
    with path.open("wb") as file:
        file.writelines(parts)


def append(path: Path, size: int, content: bytes) -> int:
    """Write behind the first ``size`` bytes of a file; returns how long it is then."""
    if not is_local(path):  # most stores of objects cannot append: small logs are written again
        known = read_bytes(path)[:size] if size else b""
        write(path, [known + content])
        return size + len(content)
    with path.open("ab") as file:
        file.truncate(size)
        file.write(content)
        return file.tell()


def replace(path: Path, parts: Iterable[Any]) -> None:
    """Put a file of these buffers into its place, whole or not at all; its folders are made.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    if not is_local(path):
        write(path, parts)
        return
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


def write_error(error: OSError, where: object, kept: str) -> StoreError:
    """What a failed write is called; ``kept`` says what is safe and how to go on."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return StoreError(
        "the disk is full" if full else f"this cannot be written: {error.strerror or error}",
        where=where,
        remedy=f"{'free some space' if full else 'check the permissions of the folder'}; {kept}",
    )
