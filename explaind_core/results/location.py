"""Where a result lies: a folder, or the address of one elsewhere; its files by name, read and written whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import zarr.abc.store
import zarr.storage

__all__ = ["PARTIAL", "Place"]

#: How the names of files end that a kill cut short (zarr's own ending).
PARTIAL = ".partial"


class Place:
    """A folder, whose files are named relative to it (``kernel/c/0/0``).

    Args:
        path: a local path, or an address that fsspec knows (``memory://name``, ``s3://bucket/name``).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        address = os.fspath(path)
        self.name = address.rstrip("/")
        #: The folder, where it is a local one.
        self.folder = None if "://" in address else Path(address)
        self._files: Any = None
        self._root = ""
        if self.folder is None:
            self._files, self._root = fsspec.core.url_to_fs(address)

    def __str__(self) -> str:
        return self.name

    def where(self, key: str) -> str:
        """How a file is called in an error."""
        return f"{self.name}/{key}"

    def read(self, key: str) -> bytes:
        """A file's content (FileNotFoundError, or another OSError)."""
        if self.folder is not None:
            return (self.folder / key).read_bytes()
        content: bytes = self._files.cat_file(self._at(key))
        return content

    def write(self, key: str, content: bytes) -> None:
        """Write a file, whole or not at all (OSError)."""
        if self.folder is None:
            self._files.pipe_file(self._at(key), content)
            return
        temporary = self.folder / (key + PARTIAL)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
            temporary.replace(self.folder / key)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / key).is_file() if self.folder is not None else bool(self._files.isfile(self._at(key)))

    def entries(self) -> list[str]:
        """The names of what lies in the folder itself, sorted; none where there is no folder."""
        if self.folder is not None:
            return sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
        if not self._files.isdir(self._root):
            return []
        return sorted(PurePosixPath(name).name for name in self._files.ls(self._root, detail=False))

    def remove_partial(self) -> None:
        """Remove what a kill left half written."""
        if self.folder is not None:
            for path in self.folder.rglob("*" + PARTIAL):
                path.unlink(missing_ok=True)

    def store(self, *, read_only: bool) -> zarr.abc.store.Store:
        """The same folder for zarr."""
        if self.folder is not None:
            return zarr.storage.LocalStore(self.folder, read_only=read_only)
        return zarr.storage.FsspecStore.from_url(self.name, read_only=read_only)

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"
