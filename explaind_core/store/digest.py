"""One number by which a stored run or result is known: the same bytes, or others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from explaind_core.errors import StoreError
from explaind_core.store.folder_contents import everything_below, size_of
from explaind_core.store.guarded_files import NotPlainError, check_tree
from explaind_core.store.locations import UNFINISHED, is_local, locate, opened, reason
from explaind_core.store.run_layout import LOCK_NAME

__all__ = ["digest"]

_PART = 1 << 20


def digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of all that a stored run, result or store of checkpoints holds.

    Checksums inside of a store find accidents: whoever changes a file can seal it again. Two stores of one digest hold
    the same files, byte by byte, so that a digest which comes by another way than the store does (a paper, a signed
    page, a message) tells whether it is the one that its author meant. The digest is that of the lines
    ``SHA-256 of the file, two spaces, its path in the folder``, in the order of the paths, as ``sha256sum`` prints
    them; locks and files that are still being written do not count.

    Args:
        path: of the folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        StoreError: there is no folder, or nothing in it; a file cannot be read; there is a link, a pipe or a device.

    Example:
        >>> import explaind_core as explaind
        >>> from explaind_core.testing import record_example
        >>> run, other = record_example(steps=2), record_example(steps=2)
        >>> len(explaind.digest(run.path)), explaind.digest(run.path) == explaind.digest(other.path)
        (64, False)
    """
    folder = locate(path)
    total, empty = hashlib.sha256(), True
    try:
        if is_local(folder):
            check_tree(folder)
        for name in sorted(_files(folder)):
            total.update(f"{_file(folder / name)}  {name}\n".encode())
            empty = False
    except NotPlainError as error:
        raise StoreError(
            "this cannot be told from other stores", where=error.path or folder, got=reason(error)
        ) from error
    except OSError as error:
        raise StoreError(f"a file cannot be read: {reason(error)}", where=folder) from error
    if empty:
        raise StoreError("there is nothing to know again", where=folder, expected="a folder with files in it")
    return total.hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for path in everything_below(folder):
        if size_of(path) is not None and path.name != LOCK_NAME and not path.name.endswith(UNFINISHED):
            yield path.relative_to(folder).as_posix()


def _file(path: Path) -> str:
    found = hashlib.sha256()
    with opened(path) as (file, _):
        while part := file.read(_PART):
            found.update(part)
    return found.hexdigest()
