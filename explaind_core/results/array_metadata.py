"""Which arrays a result may hold: those that :class:`~explaind_core.results.result_writer.ResultWriter` writes.

zarr finds codecs, data types and stores by the names that a file gives them, and some of them run code (pickle, in
format 2's filters). So what ``zarr.json`` declares is compared with what is written here before zarr sees any of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from explaind_core.errors import StoreError
from explaind_core.store import (
    ANY_NUMBER,
    COUNT,
    JSON,
    NUMBER,
    POSITIVE,
    Every,
    OneOf,
    Only,
    everything_below,
    mismatch,
)

__all__ = ["DOCUMENT", "LARGEST_CHUNK", "RECORD_FIELDS", "check_arrays", "check_folder", "chunk_bytes", "declared_text"]

#: The most bytes of a chunk; compressors take less than 2 GiB, and a reader one chunk at a time.
LARGEST_CHUNK = 2**27
_NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
_TEXT = "string"


def _codec(name: str, configuration: dict[str, Any] | None = None) -> Any:
    return Only({"name": OneOf((name,)), "configuration?": Only(configuration or {})})


_ZSTD = _codec("zstd", {"level": OneOf(range(23)), "checksum": bool})
_COMPRESSED = (_ZSTD, _codec("crc32c"))
_CODECS = {
    _TEXT: (_codec("vlen-utf8"), *_COMPRESSED),
    **dict.fromkeys(_NUMBERS, (_codec("bytes", {"endian?": OneOf(("little", "big"))}), *_COMPRESSED)),
}


def _array(data_type: str) -> Any:
    fill = str if data_type == _TEXT else bool if data_type == "bool" else (NUMBER, OneOf(("NaN",)))
    return Only(
        {
            "zarr_format": OneOf((3,)),
            "node_type": OneOf(("array",)),
            "shape": [COUNT],
            "data_type": OneOf((data_type,)),
            "chunk_grid": Only({"name": OneOf(("regular",)), "configuration": Only({"chunk_shape": [POSITIVE]})}),
            "chunk_key_encoding": Only(
                {"name": OneOf(("default",)), "configuration": Only({"separator": OneOf(("/",))})}
            ),
            "fill_value": fill,
            "codecs": list,
            "attributes?": Only({}),
            "dimension_names?": [str],
            "storage_transformers?": OneOf(([],)),
        }
    )


#: The attribute that tells how far a result is; the rest of a result's attributes are any JSON, these of known types.
RECORD_FIELDS: Any = Only(
    {
        "format": str,
        "version": int,
        "checksum": str,
        "created_with": str,
        "question": str,
        "axis": (None, str),
        "done": COUNT,
        "total": COUNT,
        "files": Every(str),
    }
)
_TEXTS = (
    "optimizer?",
    "rule?",
    "dtype?",
    "output?",
    "buffers?",
    "strategy?",
    "nodes_asked?",
    "coordinates?",
    "shares?",
)
_COUNTS = ("inferred?", "first_step?", "last_step?", "steps_asked?", "layers_restricted?", "gradients_restricted?",
           "nodes_used?", "nodes_evaluated?", "steps_not_converged?", "chords?")  # fmt: skip
_MEASURED = ("tolerance?", "update_error?", "correction?", "unattributed_gradient?",
             "unattributed_largest?")  # fmt: skip
_ATTRIBUTES: Any = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(_COUNTS, COUNT),
    **dict.fromkeys(_MEASURED, ANY_NUMBER),
    "tail_dropped?": (ANY_NUMBER, str),
    "gradient_factor?": [ANY_NUMBER],
    "tensors?": [str],
}
#: The whole ``zarr.json`` of a result.
DOCUMENT: Any = Only(
    {
        "zarr_format": OneOf((3,)),
        "node_type": OneOf(("group",)),
        "attributes": _ATTRIBUTES,
        "consolidated_metadata": Only(
            {"kind": OneOf(("inline",)), "must_understand": OneOf((False,)), "metadata": Every(dict)}
        ),
    }
)


def declared_text(metadata: Mapping[str, Any]) -> bool:
    """Whether an array holds texts, of any length, and not numbers.

    Args:
        metadata: of the array, checked.
    """
    return bool(metadata["data_type"] == _TEXT)


def chunk_bytes(metadata: Mapping[str, Any]) -> int:
    """How many bytes a chunk has when it is unpacked.

    Args:
        metadata: of an array of numbers, checked.
    """
    numbers: int = math.prod(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    return numbers * int(np.dtype(metadata["data_type"]).itemsize)


def check_arrays(arrays: Mapping[str, Any], attributes: Mapping[str, Any], axis: str | None, total: int) -> str | None:
    """The first thing in a result's metadata that this library does not write.

    Args:
        arrays: name -> metadata.
        attributes: of the result.
        axis: along which blocks are written.
        total: the entries of that axis.

    Returns:
        What it is, in words; None where all is as it is written.
    """
    sizes: dict[str, int] = {} if axis is None else {axis: total}
    for name, metadata in arrays.items():
        if not name or not name.replace("_", "a").isalnum():
            return f"an array is called {name[:100]!r}"
        words = _array_fault(name, metadata) or mismatch(attributes, Every(JSON), "attributes")
        if words:
            return words
        dims = metadata.get("dimension_names", [])
        for dim, size in zip(dims, metadata["shape"], strict=True):
            if sizes.setdefault(dim, size) != size:
                return f"{name}.shape says that {dim!r} has {size} entries where it has {sizes[dim]}"
        if name in sizes and dims != [name]:
            return f"{name}.dimension_names is {dims!r} where {[name]!r} was expected"
    if arrays and axis is not None and not any(axis in m.get("dimension_names", []) for m in arrays.values()):
        return f"the axis {axis[:100]!r} is none of any array"
    missing = [name for name in str(attributes.get("coordinates", "")).split() if name not in arrays]
    return f"attributes.coordinates names {missing[0][:100]!r}, which is no array" if missing else None


def _array_fault(name: str, metadata: Mapping[str, Any]) -> str | None:
    data_type = metadata.get("data_type")
    if not isinstance(data_type, str) or data_type not in _CODECS:
        return f"{name}.data_type is {data_type!r:.100} where one of {list(_CODECS)} was expected"
    words = mismatch(metadata, _array(data_type), name)
    if words:
        return words
    codecs = metadata["codecs"]
    if len(codecs) != len(_CODECS[data_type]):
        return f"{name}.codecs has {len(codecs)} entries where {len(_CODECS[data_type])} were expected"
    for index, (codec, pattern) in enumerate(zip(codecs, _CODECS[data_type], strict=True)):
        words = mismatch(codec, pattern, f"{name}.codecs[{index}]")
        if words:
            return words
    shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    dims = metadata.get("dimension_names", [])
    if not len(shape) == len(chunk) == len(dims) == len(set(dims)):
        return f"{name} has {len(shape)} axes, chunks of {len(chunk)} and {len(set(dims))} names of axes"
    size = 8 if data_type == _TEXT else np.dtype(data_type).itemsize
    if math.prod(shape) * size >= 1 << 62 or math.prod(chunk) * size > LARGEST_CHUNK:
        return f"{name} has the shape {shape} in chunks of {chunk}, which is more than is ever written"
    return None


def check_folder(folder: Path) -> None:
    """Refuse files of zarr's format 2, whose codecs may run code.

    Args:
        folder: of a result.

    Raises:
        StoreError: there is one, anywhere in it.
    """
    found = sorted(path.name for path in everything_below(folder) if path.name.startswith(".z"))
    if found:
        raise StoreError(
            "the result holds metadata of zarr's format 2, which are never read",
            where=folder,
            expected="zarr.json in every folder, and no other metadata",
            got=", ".join(found[:3]),
            remedy="do not use this result: it was not written by explaind",
        )
