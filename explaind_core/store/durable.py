"""Losses of power: until a file and the folder that names it are synced, either may be gone, or empty."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["sync", "sync_file", "sync_folders"]


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
    """Have the names in folders on disk, where the system can.

    Args:
        folders: of this machine; others are passed over.
    """
    for folder in sorted({f for f in folders if isinstance(f, Path)}, key=lambda f: len(f.parts), reverse=True):
        with contextlib.suppress(OSError):  # some systems cannot open a folder, or sync it: they name files at once
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


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
