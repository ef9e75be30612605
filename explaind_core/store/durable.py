"""Losses of power: until a file and the folder that names it are synced, either may be gone, or empty."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["sync", "sync_file", "sync_folders"]

#: How a system says that it cannot sync a folder, or open one: such systems name files at once.
_NO_FOLDERS = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF, errno.ENOTSUP, errno.ENOSYS}


def sync_file(path: Path) -> None:
    """Have a file's content on disk; elsewhere than on this machine a put is there when it returns.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be written, or is not there.
    """
    if isinstance(path, Path):
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folders(folders: Iterable[Path]) -> None:
    """Have the names in folders on disk, where the system can. One that was deleted since is passed over.

    Args:
        folders: of this machine; others are passed over.

    Raises:
        OSError: the disk failed: what was written may be lost.
    """
    for folder in sorted({f for f in folders if isinstance(f, Path)}, key=lambda f: len(f.parts), reverse=True):
        try:
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDERS:
                raise


def sync(paths: Iterable[Path], *, top: Path) -> None:
    """Have files on disk, and the folders that name them. One that was deleted since is passed over.

    Args:
        paths: files below ``top``.
        top: the folder up to which folders are synced.

    Raises:
        OSError: a file cannot be written.
    """
    folders = {top}
    for path in sorted(set(paths)):
        with contextlib.suppress(FileNotFoundError):
            sync_file(path)
        folders |= {p for p in path.parents if p.is_relative_to(top)} if isinstance(path, Path) else set()
    sync_folders(folders)
