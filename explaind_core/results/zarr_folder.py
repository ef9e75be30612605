"""The folder of a result, as zarr sees it: a folder of this machine, or one wherever fsspec reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import zarr.abc.store
import zarr.storage

from explaind_core.errors import StoreError
from explaind_core.store import check_tree, is_local, reason

__all__ = ["PARTIAL", "check_plain_folder", "zarr_store"]

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


def check_plain_folder(path: Path, *, follow_links: bool = False) -> None:
    """Refuse a folder with links, pipes or devices in it: zarr follows them, waits for them, and writes through them.

    Args:
        path: what :func:`explaind_core.store.locate` returned, which may itself be a link.
        follow_links: let symbolic links to plain files pass.

    Raises:
        StoreError: naming the first of them.
    """
    if not is_local(path):
        return
    try:
        check_tree(path, follow_links=follow_links)
    except OSError as error:
        raise StoreError(
            f"a file of the result cannot be used: {reason(error)}",
            where=getattr(error, "path", None) or error.filename or path,
            expected="folders and plain files",
            remedy="move what a link leads to into its place; "
            "or, if these links are your own, open_result(..., follow_links=True)",
        ) from error
