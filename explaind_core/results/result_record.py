"""What ``zarr.json`` of a stored result tells: how far it is, and what its files must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from explaind_core.errors import StoreError
from explaind_core.results.array_metadata import DOCUMENT, RECORD_FIELDS, check_arrays, check_folder
from explaind_core.results.zarr_folder import PARTIAL
from explaind_core.store import LONGEST_JSON, mismatch, names_in, read_bytes, reason

__all__ = ["AGAIN", "FORMAT", "GROUP", "RECORD", "VERSION", "ForeignError", "Record", "checksum", "read_record"]

FORMAT, VERSION = "explaind-result", 1
#: The attribute that tells how far a result is.
RECORD = "explaind"
GROUP = "zarr.json"
_UNSIGNED = "0" * 32
_FOREIGN = "do not use this result: it was not written by explaind"
AGAIN = "copy it again from where it was computed; or delete it, and ask the question again"


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
    where = folder / GROUP
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
        raise StoreError(f"the result's metadata are damaged: {error}", where=where, remedy=AGAIN) from error
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
            remedy=f"xarray.open_zarr reads what others wrote; what explaind wrote: {AGAIN}",
        ) from None
    # One character of the checksum may be what is damaged, so it must stand for itself, too.
    if len(signed) != len(_UNSIGNED) or checksum(raw.replace(signed, _UNSIGNED.encode(), 1)).encode() != signed:
        raise StoreError("the result's metadata are damaged: the checksum differs", where=where, remedy=AGAIN)
    if record["version"] != VERSION:
        raise StoreError(
            "the result has another version", where=where, expected=f"version {VERSION}",
            got=f"version {record['version']}, written by explaind-core {record['created_with']}",
            remedy="open it with that release, or ask the question again",
        )  # fmt: skip
    _check_document(document, record, where)
    check_folder(folder)
    arrays = document["consolidated_metadata"]["metadata"]
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
        if not words and set(record["files"]) != {f"{name}/{GROUP}" for name in arrays}:
            words = f"attributes.{RECORD}.files does not name the metadata of each array"
    if words:
        raise StoreError(f"the result's metadata are not as they must be: {words}", where=where, remedy=_FOREIGN)


def _what_else(found: list[str]) -> str:
    return "a recorded run" if "manifest.json" in found else "a zarr folder of format 2" if ".zgroup" in found else (
        ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    )  # fmt: skip


def _remedy(found: list[str]) -> str:
    return "xarray.open_zarr reads it" if ".zgroup" in found else "give the path that was passed as out="
