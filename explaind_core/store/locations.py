"""Where runs and results lie, a folder or wherever fsspec reaches: files as bytes, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from upath import UPath

from explaind_core.errors import StoreError
from explaind_core.store import remote_files as remote
from explaind_core.store.durable import sync_file, sync_folders
from explaind_core.store.guarded_files import NotPlainError, appended, fresh_name, opened_plain
from explaind_core.store.remote_files import StorageError

__all__ = [
    "LONGEST_JSON",
    "UNFINISHED",
    "NotPlainError",
    "append",
    "is_local",
    "locate",
    "opened",
    "read_bytes",
    "reason",
    "remove",
    "remove_unfinished",
    "replace",
    "write",
    "write_error",
]


#: How the names of files end that are still being written.
UNFINISHED = ".unfinished"
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose a file system that holds larger ones",
}
#: No log is longer, and no file that is one JSON value: parsed, that takes twenty times as much memory.
_LONGEST_TEXT = 1 << 30
LONGEST_JSON = 1 << 26


# ---------------------------------------------------------------------- addresses
def locate(path: str | os.PathLike[str] | UPath) -> Path:
    """Where a run or a result lies.

    Args:
        path: a local path, an address that fsspec knows (``memory://runs/demo``, ``s3://bucket/run``), or a ``UPath``.

    Returns:
        A ``Path``; for addresses a ``UPath``, which has the same methods.

    Raises:
        StoreError: fsspec does not know that kind of address.

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
    """Whether this is a path of this machine's own file system.

    Args:
        path: what :func:`locate` returned, or a path below it.

    Returns:
        True for a folder of this machine, False for an address elsewhere.
    """
    return isinstance(path, Path)


# ---------------------------------------------------------------------- reading
@contextlib.contextmanager
def opened(path: Path, *, follow_links: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file, opened for reading. A pipe is refused and not waited for.

    Args:
        path: the file.
        follow_links: read what a symbolic link leads to, which is refused otherwise.

    Yields:
        The file, and its length in bytes.

    Raises:
        NotPlainError: there is something else at this path.
        OSError: it is missing, or cannot be read.
    """
    if not is_local(path):
        file, size = remote.opened(path)
        with file:
            yield file, size
        return
    with opened_plain(path, follow_links=follow_links) as found:
        yield found


def read_bytes(path: Path, *, follow_links: bool = False, longest: int = _LONGEST_TEXT) -> bytes:
    """The whole of a small file.

    Args:
        path: the file.
        follow_links: see :func:`opened`.
        longest: the most bytes that are read; 1 GiB by default.

    Returns:
        Its content.

    Raises:
        NotPlainError: there is something else at this path, or more than that.
        OSError: it is missing, or cannot be read.
    """
    with opened(path, follow_links=follow_links) as (file, size):
        if size > longest:
            raise NotPlainError(f"it is {size} bytes long, and no such file has more than {longest}")
        return file.read(size)


# ---------------------------------------------------------------------- writing and removing
def write(path: Path, parts: Iterable[Any]) -> None:
    """Write a new file; elsewhere than on this machine whole or not at all, and in the place of one that is there.

    Args:
        path: the file, whose folder is there; on this machine nothing may lie there, and no link is followed.
        parts: buffers, which are written one after the other.

    Raises:
        OSError: it cannot be written.
    """
    if not is_local(path):  # one put: who reads sees all of it or nothing
        remote.write(path, b"".join(map(bytes, parts)))
        return
    with path.open("xb") as file:
        file.writelines(parts)


def replace(path: Path, parts: Iterable[Any], *, ending: str = UNFINISHED, durable: bool = False) -> None:
    """Put a file into its place, whole or not at all; its folders are made.

    Args:
        path: the file, which may be there already.
        parts: buffers, which are written one after the other.
        ending: of the file's name while it is written.
        durable: have it on disk, and its name, before this returns: a loss of power leaves the old file or the new one.

    Raises:
        OSError: it cannot be written; what was there before is intact.
    """
    if not is_local(path):
        write(path, parts)
        return
    temporary = fresh_name(path, ending)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary, parts)
        if durable:
            sync_file(temporary)
        temporary.replace(path)
        if durable:
            sync_folders([path.parent])
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def append(path: Path, size: int, content: bytes) -> int:
    """Write behind the beginning of a file.

    Args:
        path: the file.
        size: how many of its bytes are kept.
        content: what comes behind these.

    Returns:
        How long the file is then.

    Raises:
        OSError: it cannot be written.
    """
    if not is_local(path):  # most stores of objects cannot append: small logs are written again
        known = read_bytes(path)[:size] if size else b""
        write(path, [known + content])
    elif not appended(path, size, content):  # new, or a hard link, through which nothing is written
        replace(path, [read_bytes(path)[:size] if size else b"", content])
    return size + len(content)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it.

    Args:
        path: what is there; a link is deleted, and not what it leads to.

    Raises:
        OSError: it is not there, or cannot be deleted.
    """
    if not is_local(path):
        remote.remove(path)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_unfinished(folder: Path, *, ending: str = UNFINISHED) -> None:
    """Delete what a kill left half written in a folder and in the folders below it.

    Args:
        folder: whoever else writes there must have been kept out.
        ending: see :func:`replace`.

    Raises:
        OSError: it cannot be deleted.
    """
    if is_local(folder):  # elsewhere a file is there or it is not
        for path in folder.rglob("*" + ending):
            if path.is_symlink() or not path.is_dir():  # a link goes, and not what it leads to
                path.unlink(missing_ok=True)


# ---------------------------------------------------------------------- errors
def reason(error: OSError) -> str:
    """Why a file could not be read or written, in the system's words.

    Args:
        error: what was raised.

    Returns:
        A clause.

    Example:
        >>> reason(FileNotFoundError()), reason(NotPlainError("it is a symbolic link"))
        ('not found', 'it is a symbolic link')
    """
    if isinstance(error, StorageError):
        return str(error.got)
    if error.strerror:
        return error.strerror
    return "not found" if isinstance(error, FileNotFoundError) else str(error)


def write_error(error: OSError, where: object, kept: str, *, what: str = "this") -> StoreError:
    """What a failed write is called.

    Args:
        error: what was raised.
        where: the file or folder.
        kept: what is safe, and how to go on.
        what: what was to be written.

    Returns:
        The error to raise.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = error.remedy if isinstance(error, StorageError) else _REMEDIES.get(error.errno or 0)
    return StoreError(
        "the disk is full" if full else f"{what} cannot be written: {reason(error)}",
        where=where,
        remedy=(remedy or "check the folder's permissions") + f"; {kept}",
    )
