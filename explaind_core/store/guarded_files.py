"""The one way in which files of a store are opened and made: links, pipes and devices are never followed or waited for.

Whoever can write into a folder can plant things in it. What is read is a plain file, looked at without waiting; what is
written is a new file under a name that nobody can guess, renamed into its place: nothing that lay there is written
through, neither a symbolic link nor a hard one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "NotPlainError",
    "appended",
    "check_below",
    "check_tree",
    "fresh_name",
    "opened_plain",
    "overwrite_plain",
]

# Where a platform lacks a flag it has nothing to be guarded against.
_ALWAYS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class NotPlainError(OSError):
    """A link, a folder, a pipe or a device lies where a plain file was expected.

    Attributes:
        path: where, if it was looked for in a whole folder.
    """

    path: str | None = None


# ---------------------------------------------------------------------- names
def fresh_name(path: Path, ending: str) -> Path:
    """Beside a file, where it is written before it is renamed: a name that nobody can have planted.

    Args:
        path: the file.
        ending: of the name.

    Returns:
        Another path at every call.

    Example:
        >>> fresh_name(Path("a.json"), ".unfinished").name[:7], len(fresh_name(Path("a.json"), ".unfinished").name)
        ('a.json.', 34)
    """
    # Not Path.with_suffix: the name must not end like a finished file.
    return path.parent / f"{path.name}.{secrets.token_hex(8)}{ending}"


# ---------------------------------------------------------------------- looking
def check_below(folder: Path, path: Path) -> None:
    """Refuse a path on which a folder below ``folder`` is a link: it would lead out.

    Args:
        folder: where a store lies, which may itself be a link.
        path: inside of it.

    Raises:
        NotPlainError: naming the link.
    """
    for parent in path.parents:
        if parent == folder:
            return
        if parent.is_symlink():
            raise NotPlainError(f"its folder {parent.name} is a symbolic link")


def check_tree(folder: Path, *, follow_links: bool = False) -> None:
    """Refuse a folder in which, or in whose folders, there is anything else than folders and plain files.

    Args:
        folder: which may itself be a link; nothing need be there.
        follow_links: let symbolic links to plain files pass.

    Raises:
        NotPlainError: naming what there is, in its ``path``.
        OSError: a folder cannot be read.
    """
    for place, folders, files in os.walk(folder, onerror=_raise):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            linked = follow_links and stat.S_ISLNK(status.st_mode) and os.path.isfile(path)
            if linked or stat.S_ISDIR(status.st_mode):
                continue
            try:
                _check_plain(status)
            except NotPlainError as error:
                error.path = path
                raise


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextlib.contextmanager
def opened_plain(path: Path, *, follow_links: bool = False) -> Iterator[tuple[BinaryIO, int]]:
    """A plain file of this machine, opened for reading.

    Args:
        path: the file.
        follow_links: read what a symbolic link leads to, which is refused otherwise.

    Yields:
        The file, and its length in bytes.

    Raises:
        NotPlainError: there is something else at this path.
        OSError: it is missing, or cannot be read.
    """
    # Looked at before it is opened: opening alone may do something to a device.
    _check_plain(path.stat() if follow_links else path.lstat())
    descriptor = os.open(path, os.O_RDONLY | _ALWAYS | (0 if follow_links else _NO_LINK))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_plain(status)
        yield file, status.st_size


def _check_plain(status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise NotPlainError("it is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise NotPlainError("it is no plain file")


# ---------------------------------------------------------------------- writing
def appended(path: Path, size: int, content: bytes) -> bool:
    """Write behind the beginning of a plain file that goes by no other name.

    Args:
        path: the file.
        size: how many of its bytes are kept.
        content: what comes behind these.

    Returns:
        False, and nothing is written, where it is missing or a hard link: then it must be written anew.

    Raises:
        NotPlainError: there is something else at this path.
        OSError: it cannot be written.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    _check_plain(status)
    if status.st_nlink > 1:
        return False
    with _opened_for_writing(path, os.O_APPEND) as file:
        file.truncate(size)
        file.write(content)
    return True


def overwrite_plain(path: Path, content: bytes) -> None:
    """Write a small plain file that is there and goes by no other name, in its place.

    Args:
        path: the file.
        content: all that it holds then.

    Raises:
        NotPlainError: there is something else at this path.
        OSError: it cannot be written.
    """
    _check_plain(path.lstat())
    with _opened_for_writing(path, 0) as file:
        file.truncate(0)
        file.write(content)


@contextlib.contextmanager
def _opened_for_writing(path: Path, flags: int) -> Iterator[BinaryIO]:
    descriptor = os.open(path, os.O_WRONLY | flags | _ALWAYS | _NO_LINK)
    with os.fdopen(descriptor, "ab" if flags else "wb") as file:
        status = os.fstat(descriptor)
        _check_plain(status)
        if status.st_nlink > 1:
            raise NotPlainError("it goes by another name, too")
        yield file
