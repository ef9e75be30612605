"""Files wherever fsspec reaches: what fails is tried again, and nothing is missing but what is known not to be there.

Fsspec's own ``exists``, ``glob``, ``find`` and recursive ``rm`` take any failure for "nothing there". Here only
``info`` and ``ls`` are asked, and only their :class:`FileNotFoundError` says so.
"""

from __future__ import annotations

import contextlib
import errno
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from explaind_core.errors import StoreError

__all__ = ["Entry", "StorageError", "below", "entries", "forget", "kind", "opened", "remove", "total_bytes", "write"]

T = TypeVar("T")
#: Seconds before each further attempt.
PAUSES = (0.1, 0.5, 2.0)
#: What is no failure but an answer.
_NOTHING_THERE = (FileNotFoundError, NotADirectoryError)
#: What another attempt does not change.
_FINAL = (PermissionError, IsADirectoryError, FileExistsError, NotImplementedError)
#: How much is read at once where little is asked for.
_BUFFER = 2**20


class StorageError(StoreError, OSError):
    """Where files lie could not be asked, or refused; nothing is known of what is there.

    An ``OSError``, too, so that whoever reads or writes can say which step it was.

    Args:
        what: a sentence.
        where: the file or folder.
        got: what was raised, in words.
        remedy: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: object, got: str, remedy: str) -> None:
        super().__init__(what, where=where, got=got, remedy=remedy)


@dataclass(frozen=True)
class Entry:
    """What a folder holds.

    Attributes:
        name: in the folder.
        folder: whether it is a folder itself.
        size: in bytes; 0 of a folder.
    """

    name: str
    folder: bool
    size: int


def _files(path: Path) -> Any:
    """Fsspec's file system of an address."""
    return cast(Any, path).fs


def _name(path: Path) -> str:
    """What an address is called in its file system."""
    return cast(str, cast(Any, path).path)


def _tried(path: Path, what: str, call: Callable[[], T]) -> T:
    """What a call returns, which may be made again without harm: a few times."""
    failure: Exception | None = None
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            return call()
        except _NOTHING_THERE:
            raise
        except Exception as error:  # whatever the storage's own package raises
            failure = error
            if isinstance(error, _FINAL):
                break
    refused = isinstance(failure, _FINAL)
    raise StorageError(
        f"the storage does not let us {what}" if refused else f"the storage cannot be reached to {what}",
        where=path,
        got=f"{failure} ({type(failure).__name__}{'' if refused else f', {1 + len(PAUSES)} attempts'})",
        remedy="check the address and its permissions" if refused else "try again when it answers; nothing is lost",
    ) from failure


def forget(path: Path) -> None:
    """Forget what is remembered of a listing: somebody may be writing there.

    Args:
        path: an address.
    """
    _files(path).invalidate_cache(_name(path))


# ---------------------------------------------------------------------- what is there
def _info(path: Path) -> dict[str, Any] | None:
    def asked() -> dict[str, Any] | None:
        forget(path)
        return cast(dict[str, Any], _files(path).info(_name(path)))

    try:
        return _tried(path, "look what is there", asked)
    except _NOTHING_THERE:
        return None


def kind(path: Path) -> tuple[str, int] | None:
    """What is at an address.

    Args:
        path: an address.

    Returns:
        ``("file", bytes)``, or ``("directory", 0)``; None where it is known that nothing is there.

    Raises:
        StorageError: nobody knows.
    """
    found = _info(path)
    return None if found is None else (str(found["type"]), int(found["size"] or 0))


def entries(folder: Path) -> list[Entry]:
    """What a folder holds.

    Args:
        folder: an address.

    Returns:
        Files and folders; none where it is known that there is no folder.

    Raises:
        StorageError: nobody knows.
    """

    def asked() -> list[dict[str, Any]]:
        forget(folder)
        return cast(list[dict[str, Any]], _files(folder).ls(_name(folder), detail=True))

    try:
        listed = _tried(folder, "list a folder", asked)
    except _NOTHING_THERE:
        return []
    own = _name(folder).strip("/")
    found = {e["name"].strip("/"): e for e in listed}  # a file lists itself, and so do markers of empty folders
    return [
        Entry(name.rpartition("/")[2], entry["type"] == "directory", int(entry.get("size") or 0))
        for name, entry in found.items()
        if name != own
    ]


def below(folder: Path) -> Iterator[tuple[Path, Entry]]:
    """Whatever lies in a folder and in the folders below it, the innermost first.

    Args:
        folder: an address.

    Yields:
        Paths, and what each is.

    Raises:
        StorageError: nobody knows.
    """
    for entry in entries(folder):
        path = folder / entry.name
        if entry.folder:
            yield from below(path)
        yield path, entry


def total_bytes(folder: Path) -> int:
    """The size of all files in a folder and in the folders below it.

    Args:
        folder: an address.

    Returns:
        Bytes; 0 where it is known that nothing is there.

    Raises:
        StorageError: nobody knows.
    """
    return sum(entry.size for _, entry in below(folder) if not entry.folder)


# ---------------------------------------------------------------------- reading
class _Reader(io.RawIOBase):
    """A file of known size, read piece by piece, so that each piece can be asked for again."""

    def __init__(self, path: Path, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        begin, end = self._at, min(self._at + len(buffer), self._size)
        if end <= begin:
            return 0

        def asked() -> bytes:
            data = cast(bytes, _files(self._path).cat_file(_name(self._path), start=begin, end=end))
            if len(data) != end - begin:
                raise OSError(errno.EIO, f"{len(data)} bytes came where {end - begin} were asked for")
            return data

        buffer[: end - begin] = _tried(self._path, "read a file", asked)
        self._at = end
        return end - begin


def opened(path: Path) -> tuple[BinaryIO, int]:
    """A file, opened for reading.

    Args:
        path: an address.

    Returns:
        The file, which the caller closes, and its length in bytes.

    Raises:
        FileNotFoundError: it is known not to be there.
        StorageError: it cannot be read.
    """
    found = kind(path)
    if found is None or found[0] != "file":
        raise FileNotFoundError(errno.ENOENT, "not found" if found is None else "a folder lies there", str(path))
    size = found[1]
    return cast(BinaryIO, io.BufferedReader(_Reader(path, size), min(_BUFFER, max(size, 1)))), size


# ---------------------------------------------------------------------- writing and removing
def write(path: Path, content: bytes) -> None:
    """Put a file, whole: who reads sees all of it or nothing. Put again it is the same.

    Args:
        path: an address.
        content: of the file.

    Raises:
        StorageError: it cannot be written.
        FileNotFoundError: what it should lie in is not there.
    """
    _tried(path, "write a file", lambda: _files(path).pipe_file(_name(path), content))


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it, and see that it is gone.

    Args:
        path: an address.

    Raises:
        FileNotFoundError: it is known that nothing is there.
        StorageError: it cannot be deleted.
    """
    found = kind(path)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "not found", str(path))
    _tried(path, "delete", lambda: _removed(path, found[0]))


def _removed(path: Path, what: str) -> None:
    files = _files(path)
    inside = list(below(path)) if what == "directory" else [(path, Entry(path.name, False, 0))]
    names = [_name(p) for p, entry in inside if not entry.folder]
    if any(set("*?[]") & set(name) for name in names):  # which would be taken for patterns
        for name in names:
            files.rm_file(name)
    elif names:
        files.rm(names)
    folders = [*(p for p, entry in inside if entry.folder), path] if what == "directory" else []
    for folder in folders:
        if _info(folder) is not None:  # where folders are but parts of names they are gone with what was in them
            with contextlib.suppress(FileNotFoundError):
                files.rmdir(_name(folder))
    if _info(path) is not None:
        raise OSError(errno.ENOTEMPTY, "it is still there")
