"""A result on disk: a zarr folder whose every file is checked.

::

    zarr.json               how far it is, the attributes, all arrays' metadata, checksums of their files, and its own
    kernel/zarr.json        one folder an array, at its final shape from the beginning
    kernel/c/0/0/0/0        chunks, each with a CRC-32C behind it; none that was counted is ever missing

``zarr.json`` is replaced after each block, and only then does the block count: whatever moment a kill picks, there is a
result that is whole up to some block. Any zarr reader can read it; ``xarray.open_zarr(path)`` does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from explaind_core.errors import StoreError
from explaind_core.results.array_metadata import LARGEST_CHUNK, chunk_bytes, declared_text
from explaind_core.results.chunk_file import frame_fault, text_fault
from explaind_core.results.result_record import AGAIN, GROUP, RECORD, Record, checksum, read_record
from explaind_core.results.zarr_folder import check_plain_folder, zarr_store
from explaind_core.store import LONGEST_JSON, exists, locate, read_bytes, reason, size_of

__all__ = ["check_files", "counted_files", "open_result", "stored_result"]

#: What a chunk that cannot be compressed is longer than its content.
_OVERHEAD = 2**20


def open_result(
    path: str | os.PathLike[str], *, unfinished: bool = False, check: bool = True, follow_links: bool = False
) -> xr.Dataset:
    """Open what ``attribute(..., out=path)`` wrote, lazily, after checking every file of it.

    Args:
        path: the zarr folder, or an address that fsspec knows.
        unfinished: open the finished part of an interrupted result.
        check: read every chunk once to compare its checksum. Without, only metadata are checked and that all chunks are
            there; a damaged one is found when it is read.
        follow_links: read files that are symbolic links to plain files, as tools that keep large files elsewhere make
            them; by default a link is refused.

    Returns:
        The Dataset as :func:`explaind_core.attribute` returned it; arrays are read when they are asked for.

    Raises:
        StoreError: there is no result, it is damaged (the file is named) or unfinished.

    Example:
        >>> import tempfile, torch
        >>> import explaind_core as explaind
        >>> from explaind_core.testing import record_example
        >>> folder, inputs = tempfile.TemporaryDirectory(), torch.ones(2, 4, dtype=torch.float64)
        >>> path = f"{folder.name}/result.zarr"
        >>> written = explaind.attribute(record_example(steps=2), inputs, out=path, progress=False)
        >>> explaind.open_result(path).identical(written)
        True
        >>> folder.cleanup()
    """
    folder = locate(path)
    record = read_record(folder, follow_links=follow_links)
    if record is None:
        raise StoreError(
            "there is no result here",
            where=folder,
            expected="what was passed as out= to explaind.attribute",
            got="an empty folder" if exists(folder) else "nothing",
        )
    if not record.finished and not (unfinished and record.done):
        what = f"{record.axis} entries" if record.axis else "blocks"
        raise StoreError(
            "the result is unfinished",
            where=folder,
            expected=f"{record.total} {what}",
            got=f"{record.done}",
            remedy="ask the same question with the same out= to finish it"
            + ("; or open the finished part with open_result(..., unfinished=True)" if record.done else ""),
        )
    check_files(folder, record, contents=check, follow_links=follow_links)
    return stored_result(folder, record)


def stored_result(folder: Path, record: Record) -> xr.Dataset:
    """The finished part of a result.

    Args:
        folder: where it lies.
        record: what its ``zarr.json`` tells.

    Returns:
        A Dataset that is read lazily.
    """
    try:  # labels are read at once
        stored: xr.Dataset = xr.open_zarr(
            zarr_store(folder, read_only=True), consolidated=True, zarr_format=3, chunks=None
        )
    except Exception as error:  # whatever a codec says of bytes that are not its own
        raise StoreError(f"the labels of the result cannot be read: {error}", where=folder, remedy=AGAIN) from error
    stored = stored.drop_encoding()  # how it lies here is no advice on how to write it elsewhere
    stored.attrs = {name: value for name, value in stored.attrs.items() if name != RECORD}
    texts = {name: c for name, c in stored.coords.items() if c.dtype.kind in "TO"}
    stored = stored.assign_coords({name: (c.dims, np.array(c.values.tolist(), "U")) for name, c in texts.items()})
    if record.axis is not None and not record.finished:
        stored = stored.isel({record.axis: slice(0, record.done)})
    if not any(name in stored.attrs for name in ("unattributed_gradient", "unattributed_largest")):
        stored = stored.drop_vars("unattributed", errors="ignore")  # no block had anything of it
    return stored


def check_files(folder: Path, record: Record, *, contents: bool, follow_links: bool = False) -> None:
    """Check all files that count.

    Args:
        folder: where the result lies.
        record: what its ``zarr.json`` tells.
        contents: read every chunk; without, only metadata are, and chunks must be there.
        follow_links: see :func:`open_result`.

    Raises:
        StoreError: one is missing or damaged; there is a link, a pipe or a device.
    """
    check_plain_folder(folder, follow_links=follow_links)
    for key, expected in record.files.items():
        try:
            raw = read_bytes(folder / key, follow_links=follow_links, longest=LONGEST_JSON)
        except OSError as error:
            raise _damaged(folder, key, f"is missing or cannot be read: {reason(error)}") from error
        if checksum(raw) != expected:
            raise _damaged(folder, key, "is damaged: the checksum differs")
        if _parsed(raw) != record.arrays[key.rpartition("/")[0]]:
            raise _damaged(folder, key, f"says something else than {GROUP} says of that array")
    try:
        group = zarr.open_group(zarr_store(folder, read_only=True), mode="r", zarr_format=3, use_consolidated=True)
    except OSError as error:
        raise _damaged(folder, GROUP, f"cannot be read: {reason(error)}") from error
    labels = {*str(record.attributes.get("coordinates", "")).split()}
    labels |= {dim for metadata in record.arrays.values() for dim in metadata.get("dimension_names", ())}
    for name, metadata in record.arrays.items():
        array: Any = group[name]
        for index in _counted_chunks(record, metadata):
            key = "/".join([name, "c", *map(str, index)])
            if size_of(folder / key) is None:
                raise _damaged(folder, key, "is missing")  # zarr would read it as if it were full of one number
            if contents or name in labels:  # labels are read when the result is opened
                _check_size(folder, key, metadata, follow_links=follow_links)
            if contents:
                try:
                    array.blocks[index] if index else array[...]
                except Exception as error:  # whatever a codec says of bytes that are not its own
                    raise _damaged(folder, key, f"is damaged: {error}") from error


def _check_size(folder: Path, key: str, metadata: Mapping[str, Any], *, follow_links: bool) -> None:
    """Refuse a chunk that would unpack to something else than its array declares."""
    text = declared_text(metadata)
    try:
        content = read_bytes(folder / key, follow_links=follow_links, longest=LARGEST_CHUNK + _OVERHEAD)
    except OSError as error:
        raise _damaged(folder, key, f"cannot be read: {reason(error)}") from error
    fault = frame_fault(content, expected=None if text else chunk_bytes(metadata), most=LARGEST_CHUNK)
    if fault is None and text:
        fault = text_fault(content, math.prod(metadata["chunk_grid"]["configuration"]["chunk_shape"]))
    if fault:
        raise _damaged(folder, key, f"is damaged: {fault}")


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _counted_chunks(record: Record, metadata: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """The chunks that hold something of the finished part."""
    sizes = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    dims = metadata.get("dimension_names", ())  # left out where there are none
    # Labels are one chunk along the axis, written with the first block.
    lengths = [min(n, record.done) if d == record.axis else n for d, n in zip(dims, metadata["shape"], strict=True)]
    counts = [-(-n // size) for n, size in zip(lengths, sizes, strict=True)]
    # One at a time: where there are fewer files than chunks are declared, the first that is missing is told at once.
    for position in range(math.prod(counts)):
        index = []
        for count in reversed(counts):
            position, entry = divmod(position, count)
            index.append(entry)
        yield tuple(reversed(index))


def counted_files(record: Record) -> set[str]:
    """The files that hold something of the finished part.

    Args:
        record: what ``zarr.json`` tells.

    Returns:
        Their paths inside the folder.
    """
    chunks = ((name, index) for name, metadata in record.arrays.items() for index in _counted_chunks(record, metadata))
    return {*record.files, *("/".join([name, "c", *map(str, index)]) for name, index in chunks)}


def _damaged(folder: Path, key: str, how: str) -> StoreError:
    return StoreError(f"a file of the result {how}", where=folder / key, remedy=AGAIN)
