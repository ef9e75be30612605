"""What lies in a folder, here or elsewhere: known, or an error; a failure to look is never "nothing there"."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from explaind_core.store import remote_files as remote
from explaind_core.store.locations import is_local, reason
from explaind_core.store.remote_files import StorageError

__all__ = ["everything_below", "exists", "is_folder", "is_link", "names_in", "size_of", "total_bytes"]


def _kind(path: Path) -> tuple[str, int] | None:
    """``("file", bytes)``, or what else is there; None where it is known that nothing is."""
    if not is_local(path):
        return remote.kind(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unknown(path, error) from error
    if stat.S_ISREG(status.st_mode):
        return "file", status.st_size
    return ("directory" if stat.S_ISDIR(status.st_mode) else "other"), 0


def _unknown(path: Path, error: OSError) -> StorageError:
    return StorageError(
        "nobody can tell what is there", where=path, got=reason(error), remedy="check the folder's permissions"
    )


def exists(path: Path) -> bool:
    """Whether something is there. A failure to find out is no answer.

    Args:
        path: a file or folder.

    Returns:
        False where it is known that nothing is.

    Raises:
        StorageError: nobody knows.

    Example:
        >>> from explaind_core.store import locate
        >>> exists(locate("memory://nothing/here"))
        False
    """
    return _kind(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a folder is there.

    Args:
        path: whatever.

    Returns:
        False where it is known that there is none.

    Raises:
        StorageError: nobody knows.
    """
    return (_kind(path) or ("", 0))[0] == "directory"


def is_link(path: Path) -> bool:
    """Whether a symbolic link lies there.

    Args:
        path: of this machine.

    Returns:
        False, too, where it is known that nothing is there.

    Raises:
        StorageError: nobody knows.
    """
    try:
        return stat.S_ISLNK(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unknown(path, error) from error


def size_of(path: Path) -> int | None:
    """How long a file is.

    Args:
        path: the file.

    Returns:
        Bytes; None where it is known that no plain file is there.

    Raises:
        StorageError: nobody knows.
    """
    found = _kind(path)
    return found[1] if found is not None and found[0] == "file" else None


def names_in(folder: Path) -> list[str]:
    """The names of what lies in a folder itself.

    Args:
        folder: a folder, or anything else.

    Returns:
        Files and folders, sorted; none where it is known that there is no folder.

    Raises:
        StorageError: it cannot be listed.

    Example:
        >>> from explaind_core.store import locate
        >>> names_in(locate("memory://nothing/here"))
        []
    """
    if not is_local(folder):
        return sorted(entry.name for entry in remote.entries(folder))
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unknown(folder, error) from error


def total_bytes(folder: Path) -> int:
    """The size of all files in a folder and in the folders below it.

    Args:
        folder: a folder.

    Returns:
        Bytes; 0 where there is nothing.

    Example:
        >>> from explaind_core.store.locations import locate, remove, replace
        >>> folder = locate("memory://total_bytes")
        >>> replace(folder / "a/b", [b"1234"]), replace(folder / "c", [b"56"])
        (None, None)
        >>> total_bytes(folder)
        6
        >>> remove(folder)
    """
    if not is_local(folder):
        return remote.total_bytes(folder)
    return sum(size_of(path) or 0 for path in everything_below(folder))


def everything_below(folder: Path) -> Iterator[Path]:
    """Whatever lies in a folder and in the folders below it; links are not followed.

    Args:
        folder: a folder; nothing need be there.

    Yields:
        Paths of folders, and of whatever else there is.

    Raises:
        StorageError: one of the folders cannot be listed.

    Example:
        >>> from explaind_core.store.locations import locate, remove, replace
        >>> folder = locate("memory://everything_below")
        >>> replace(folder / "a/b", [b"1234"])
        >>> sorted(path.name for path in everything_below(folder))
        ['a', 'b']
        >>> remove(folder)
    """
    if not is_local(folder):
        yield from (path for path, _ in remote.below(folder))
        return

    def told(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise _unknown(Path(error.filename or folder), error) from error

    for place, folders, files in os.walk(folder, onerror=told):
        yield from (Path(place, name) for name in (*folders, *files))
