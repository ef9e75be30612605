"""The folder of a result, as zarr sees it: a folder of this machine, or one wherever fsspec reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import zarr.abc.store
import zarr.storage

from explaind_core.store import is_local

__all__ = ["PARTIAL", "zarr_store"]

#: How the names of files end that a kill cut short: zarr's own ending, which this library's files in it share.
PARTIAL = ".partial"


def zarr_store(path: Path, *, read_only: bool) -> zarr.abc.store.Store:
    """A folder for zarr.

    Args:
        path: what :func:`explaind_core.store.locate` returned.
        read_only: refuse to write.

    Returns:
        A store of zarr.
    """
    if is_local(path):
        return zarr.storage.LocalStore(path, read_only=read_only)
    options = dict(cast(Any, path).storage_options)
    return zarr.storage.FsspecStore.from_url(str(path), storage_options=options, read_only=read_only)
