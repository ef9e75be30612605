"""A result on disk, appended to block by block while it is computed, and taken up where it was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from explaind_core.errors import QuestionError

__all__ = ["BLOCK", "append", "stored_result"]

#: Windows, or test samples, computed before they are appended.
BLOCK = 50
#: Attributes that are known only when something was computed.
_FOUND = ("tail_dropped", "gradient_factor")
#: Attributes of a result without the step axis that are joined to the largest of any block.
_LARGEST = ("nodes_used", "nodes_evaluated", "steps_not_converged", "update_error", "correction")
#: How what is counted over the step axis is joined, where test samples come in blocks.
_JOINED = {
    "nodes": np.maximum, "evaluations": np.maximum, "converged": np.logical_and, "update_error": np.maximum,
    "correction": np.maximum,
}  # fmt: skip


def stored_result(path: Path) -> xr.Dataset:
    """The result at ``path``, read lazily."""
    stored: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
    return stored


def entries_done(path: Path, identity: str) -> int:
    """How many entries of the appended axis a result of this very question at ``path`` holds; whole blocks only.

    Raises:
        QuestionError: something else lies there.
    """
    if not path.exists() or not any(path.iterdir()):
        return 0
    try:
        attributes: dict[str, Any] = zarr.open_group(path, mode="r").attrs.asdict()
    except (OSError, KeyError, ValueError) as error:
        raise QuestionError(
            f"there is something at out= that is no result: {error}",
            where=path,
            remedy="choose another path, or delete it",
        ) from error
    known = attributes.get("question")
    if known != identity:
        raise QuestionError(
            "out= holds the result of another question",
            where=path,
            expected=f"an unfinished or finished result of this question ({identity})",
            got=known or "no result of explaind",
            remedy="choose another path, or delete it",
        )
    return int(attributes["steps_done"])


def append(path: Path, identity: str, axis: str, done: int, blocks: Iterator[xr.Dataset]) -> None:
    """Append blocks along ``axis`` behind the first ``done`` entries."""
    if done:
        _cut(path, axis, done)
    for block in blocks:
        size = block.sizes[axis]
        block.attrs |= {"question": identity, "steps_done": done}
        if done:
            known = zarr.open_group(path, mode="r").attrs.asdict()
            block.attrs |= {k: max(block.attrs[k], known[k]) for k in _LARGEST if k in block.attrs and k in known}
            grown = block.drop_vars([n for n, v in block.variables.items() if axis not in v.dims])
            grown.to_zarr(path, append_dim=axis, zarr_format=2, consolidated=False)
            _join_counts(path, axis, block)
        else:
            chunks = {n: _chunk_sizes(v, axis) for n, v in block.data_vars.items()}
            block.to_zarr(
                path,
                mode="w",
                zarr_format=2,
                consolidated=False,
                encoding={n: {"chunks": c} for n, c in chunks.items() if c},
            )
        done += size
        # Only now does the block count: one that a kill cuts short is computed again.
        attributes = zarr.open_group(path, mode="r+").attrs
        attributes.update({**{k: block.attrs[k] for k in (*_FOUND, *_LARGEST) if k in block.attrs}, "steps_done": done})


def _join_counts(path: Path, axis: str, block: xr.Dataset) -> None:
    """Counts over steps, where blocks are of test samples: the largest of any block."""
    group = zarr.open_group(path, mode="r+")
    for name, join in _JOINED.items():
        if name in block and axis not in block[name].dims:
            array: Any = group[name]
            array[:] = join(array[:], block[name].values)


def _chunk_sizes(variable: xr.DataArray, axis: str) -> tuple[int, ...]:
    """A chunk is a block along the appended axis of everything else, so that appending never rewrites one."""
    return tuple((BLOCK if axis == "step" else size) if dim == axis else size for dim, size in variable.sizes.items())


def _cut(path: Path, axis: str, done: int) -> None:
    """Drop what an append that was cut short left behind the first ``done`` entries."""
    for _, array in zarr.open_group(path, mode="r+").arrays():
        dims: Any = array.attrs["_ARRAY_DIMENSIONS"]
        if axis in dims and array.shape[dims.index(axis)] > done:
            array.resize(tuple(done if dim == axis else n for dim, n in zip(dims, array.shape, strict=True)))
