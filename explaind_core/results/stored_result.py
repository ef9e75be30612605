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
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from explaind_core.errors import StoreError
from explaind_core.results.array_metadata import (
    DOCUMENT,
    LARGEST_CHUNK,
    RECORD_FIELDS,
    check_arrays,
    check_folder,
    chunk_bytes,
    declared_text,
)
from explaind_core.results.chunk_file import frame_fault, text_fault
from explaind_core.results.zarr_folder import PARTIAL, check_plain_folder, zarr_store
from explaind_core.store import (
    LONGEST_JSON,
    exists,
    is_inside,
    locate,
    mismatch,
    names_in,
    read_bytes,
    reason,
    size_of,
)

__all__ = [
    "FORMAT",
    "RECORD",
    "VERSION",
    "ForeignError",
    "Record",
    "check_files",
    "checksum",
    "counted_files",
    "open_result",
    "read_record",
    "stored_result",
]

FORMAT, VERSION = "explaind-result", 1
#: The attribute that tells how far a result is.
RECORD = "explaind"
_GROUP = "zarr.json"
_UNSIGNED = "0" * 32
#: What a chunk that cannot be compressed is longer than its content.
_OVERHEAD = 2**20
_FOREIGN = "do not use this result: it was not written by explaind"
_AGAIN = "copy it again from where it was computed; or delete it, and ask the question again"


class ForeignError(StoreError):
    """Something else than a result."""


@dataclass(frozen=True)
class Record:
    """What ``zarr.json`` tells.

    Attributes:
        question: the fingerprint of what was asked.
        axis: along which blocks are written, None where it is one block.
        done: entries of it that are written.
        total: entries of it.
        files: the arrays' metadata files and their checksums.
        attributes: the result's own.
        arrays: name -> metadata.
    """

    question: str
    axis: str | None
    done: int
    total: int
    files: Mapping[str, str]
    attributes: Mapping[str, Any]
    arrays: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether nothing is left to compute."""
        return self.done >= self.total

    def encoded(self, created_with: str) -> bytes:
        """The content of ``zarr.json``.

        Args:
            created_with: the version of this library.

        Returns:
            The bytes of the file, with their own checksum.
        """
        record = {
            "format": FORMAT, "version": VERSION, "checksum": _UNSIGNED, "created_with": created_with,
            "question": self.question, "axis": self.axis, "done": self.done, "total": self.total, "files": self.files,
        }  # fmt: skip
        document = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {RECORD: record, **self.attributes},  # the checksum comes before anything of a user's
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": self.arrays},
        }
        text = json.dumps(document, indent=1, default=_plain)
        return text.replace(_UNSIGNED, checksum(text.encode()), 1).encode()


def checksum(content: bytes) -> str:
    """The checksum of a metadata file.

    Args:
        content: its bytes.

    Returns:
        128 bits of BLAKE2b, in hexadecimal digits.
    """
    return blake2b(content, digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a result's attributes cannot hold a {type(value).__name__}")


# ---------------------------------------------------------------------- reading
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
        raise StoreError(f"the labels of the result cannot be read: {error}", where=folder, remedy=_AGAIN) from error
    stored = stored.drop_encoding()  # how it lies here is no advice on how to write it elsewhere
    stored.attrs = {name: value for name, value in stored.attrs.items() if name != RECORD}
    texts = {name: c for name, c in stored.coords.items() if c.dtype.kind in "TO"}
    stored = stored.assign_coords({name: (c.dims, np.array(c.values.tolist(), "U")) for name, c in texts.items()})
    if record.axis is not None and not record.finished:
        stored = stored.isel({record.axis: slice(0, record.done)})
    if not any(name in stored.attrs for name in ("unattributed_gradient", "unattributed_largest")):
        stored = stored.drop_vars("unattributed", errors="ignore")  # no block had anything of it
    return stored


def read_record(folder: Path, *, follow_links: bool = False) -> Record | None:
    """How far a result is.

    Args:
        folder: where it lies.
        follow_links: see :func:`open_result`.

    Returns:
        What its ``zarr.json`` tells; None where there is nothing.

    Raises:
        ForeignError: there is something else.
        StoreError: ``zarr.json`` is damaged.
    """
    where = folder / _GROUP
    try:
        raw = read_bytes(where, follow_links=follow_links, longest=LONGEST_JSON)
    except FileNotFoundError:
        # The first thing that is written is zarr.json, so a kill before that leaves nothing but a part of it.
        found = [name for name in names_in(folder) if not name.endswith(PARTIAL)]
        if found:
            raise ForeignError(
                "this is no result of explaind",
                where=folder,
                expected="a folder with a zarr.json, written by explaind.attribute(..., out=)",
                got=_what_else(found),
                remedy="explaind.open_run opens a recorded run" if "manifest.json" in found else _remedy(found),
            ) from None
        return None
    except OSError as error:
        raise StoreError(f"this is no result of explaind: {reason(error)}", where=where) from error
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"the result's metadata are damaged: {error}", where=where, remedy=_AGAIN) from error
    try:
        attributes = document["attributes"]
        record = attributes.pop(RECORD)
        if record["format"] != FORMAT:
            raise LookupError(record["format"])
        signed = record["checksum"].encode()
    except (LookupError, TypeError, AttributeError):
        raise ForeignError(
            "this is no result of explaind",
            where=where,
            expected="a zarr folder that explaind.attribute(..., out=) wrote",
            got="a zarr folder of something else, or damaged metadata",
            remedy=f"xarray.open_zarr reads what others wrote; what explaind wrote: {_AGAIN}",
        ) from None
    # One character of the checksum may be what is damaged, so it must stand for itself, too.
    if len(signed) != len(_UNSIGNED) or checksum(raw.replace(signed, _UNSIGNED.encode(), 1)).encode() != signed:
        raise StoreError("the result's metadata are damaged: the checksum differs", where=where, remedy=_AGAIN)
    if record["version"] != VERSION:
        raise StoreError(
            "the result has another version", where=where, expected=f"version {VERSION}",
            got=f"version {record['version']}, written by explaind-core {record['created_with']}",
            remedy="open it with that release, or ask the question again",
        )  # fmt: skip
    _check_document(document, record, where)
    check_folder(folder)
    arrays = document["consolidated_metadata"]["metadata"]
    outside = [name for name in (*arrays, *record["files"]) if not is_inside(name)]
    if outside:
        raise StoreError(
            "the result names a file outside of its folder",
            where=where,
            expected="names of its arrays",
            got=repr(outside[0])[:100],
            remedy="do not use this result: it was not written by explaind",
        )
    names = ("question", "axis", "done", "total", "files")
    return Record(**{name: record[name] for name in names}, attributes=attributes, arrays=arrays)


def _check_document(document: Mapping[str, Any], record: Mapping[str, Any], where: Path) -> None:
    """Refuse what this library does not write, before zarr sees any of it."""
    words = mismatch(record, RECORD_FIELDS, f"attributes.{RECORD}") or mismatch(document, DOCUMENT)
    if not words:
        arrays, attributes = document["consolidated_metadata"]["metadata"], document["attributes"]
        words = check_arrays(arrays, attributes, record["axis"], record["total"])
        if not words and record["done"] > record["total"]:
            words = f"attributes.{RECORD}.done is {record['done']} of {record['total']}"
        if not words and set(record["files"]) != {f"{name}/{_GROUP}" for name in arrays}:
            words = f"attributes.{RECORD}.files does not name the metadata of each array"
    if words:
        raise StoreError(f"the result's metadata are not as they must be: {words}", where=where, remedy=_FOREIGN)


def _what_else(found: list[str]) -> str:
    return "a recorded run" if "manifest.json" in found else "a zarr folder of format 2" if ".zgroup" in found else (
        ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    )  # fmt: skip


def _remedy(found: list[str]) -> str:
    return "xarray.open_zarr reads it" if ".zgroup" in found else "give the path that was passed as out="


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
            raise _damaged(folder, key, f"says something else than {_GROUP} says of that array")
    try:
        group = zarr.open_group(zarr_store(folder, read_only=True), mode="r", zarr_format=3, use_consolidated=True)
    except OSError as error:
        raise _damaged(folder, _GROUP, f"cannot be read: {reason(error)}") from error
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
    return StoreError(f"a file of the result {how}", where=folder / key, remedy=_AGAIN)
