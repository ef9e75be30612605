"""One file of tensors that checks itself: safetensors, with a digest of every tensor and a seal over all the rest.

The file's metadata hold, beside the header that the caller gave:

- ``explaind_contents``: the run and the file this is (so that files that were swapped are found), and for every tensor
  how it is packed, its dtype, its shape and the xxh3-128 digest of its stored bytes;
- ``explaind_seal``: the digest of the file's whole header, taken with zeros in the seal's own place.

A packed tensor lies in the file as bytes (``U8``); any reader of safetensors can open it. Writing and reading are done
here and not by that library because a header must be sealed before it is written, one tensor can be read without the
others from any kind of file, and large tensors are not copied on the way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from explaind_core.store.compression import pack, unpack

__all__ = ["DTYPES", "Contents", "Damage", "Entry", "Shape", "check_shapes", "encode", "read_contents", "read_entry"]

#: A tensor's shape and dtype; None where any dtype will do.
Shape = tuple[tuple[int, ...], torch.dtype | None]

#: What safetensors calls the dtypes that it knows; others are stored as bytes.
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
_OTHERS = ("complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
#: Every dtype that a store holds, by its name: nothing else that a file names is ever looked up in torch.
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in (*_NAMES, *_OTHERS)}
_BY_NAME = {dtype: name for name, dtype in DTYPES.items()}

_HEADER, _CONTENTS, _SEAL = "explaind", "explaind_contents", "explaind_seal"
_UNSEALED = "0" * 32
#: Longer headers are refused before they are read; the limit is that of safetensors.
_LONGEST_HEADER = 100_000_000


class Damage(Exception):  # noqa: N818 (it becomes a StoreError, by whoever knows the file and the step)
    """What is wrong with a file.

    Args:
        what: a sentence without its subject.
        expected: what would have been right.
        got: what was found.
    """

    def __init__(self, what: str, *, expected: object = None, got: object = None) -> None:
        super().__init__(what)
        self.what, self.expected, self.got = what, expected, got


@dataclass(frozen=True)
class Entry:
    """One stored tensor.

    Attributes:
        begin: the first of its bytes in the file.
        end: the byte behind its last one.
        codec: how they are packed: ``"raw"`` or ``"blosc"``.
        dtype: of the tensor.
        shape: of the tensor.
        digest: the checksum of its stored bytes; None in files of version 1.
    """

    begin: int
    end: int
    codec: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: str | None

    @property
    def nbytes(self) -> int:
        """Its size when unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """What a file says of itself.

    Attributes:
        header: the caller's, JSON.
        entries: tensors by name.
        run: which run it is of; None in files of version 1.
        file: which file of it; None in files of version 1.
        generation: which continuation of the run wrote it; empty for the first.
    """

    header: Any
    entries: dict[str, Entry]
    run: str | None
    file: str | None
    generation: str = ""


# ---------------------------------------------------------------------- writing
def encode(
    header: Any, tensors: Mapping[str, Tensor], *, run: str, file: str, compress: bool, generation: str = ""
) -> list[Any]:
    """A file as buffers to be written one after the other.

    Args:
        header: JSON.
        tensors: by name, of any dtype in :data:`DTYPES`.
        run: which run it is of.
        file: which file of it.
        compress: pack tensors where that makes them shorter.
        generation: which continuation of the run writes it.

    Returns:
        Buffers, to be written one after the other.

    Raises:
        Damage: a tensor has no dtype that can be stored.
    """
    stored = [_Stored.of(name, tensor, compress) for name, tensor in tensors.items()]
    stored.sort(key=lambda s: (s.codec != "raw", -s.dtype.itemsize, s.name))  # whatever is not packed lies aligned
    entries: dict[str, Any] = {
        "__metadata__": {
            _HEADER: json.dumps(header),
            _CONTENTS: json.dumps(
                {
                    "run": run,
                    "file": file,
                    **({"generation": generation} if generation else {}),
                    "tensors": {s.name: [s.codec, _BY_NAME[s.dtype], s.shape, s.digest] for s in stored},
                }
            ),
            _SEAL: _UNSEALED,
        }
    }
    position = 0
    for s in stored:
        end = position + len(s.data)
        known = _NAMES.get(_BY_NAME[s.dtype]) if s.codec == "raw" else None
        entries[s.name] = {
            "dtype": known or "U8",
            "shape": list(s.shape) if known else [len(s.data)],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    seal = f'"{_SEAL}":"'.encode()  # the only place where these quotes stand unescaped
    text = text.replace(seal + _UNSEALED.encode(), seal + xxh3_128_hexdigest(text).encode(), 1)
    return [len(text).to_bytes(8, "little") + text, *(s.data for s in stored)]


@dataclass(frozen=True)
class _Stored:
    name: str
    data: Any  # a contiguous buffer of bytes
    codec: str
    dtype: torch.dtype
    shape: list[int]
    digest: str

    @classmethod
    def of(cls, name: str, tensor: Tensor, compress: bool) -> _Stored:
        if tensor.layout != torch.strided or tensor.dtype not in _BY_NAME:
            got = f"{tensor.dtype}, {tensor.layout}"
            raise Damage(f"cannot hold the tensor {name!r}", expected=list(DTYPES), got=got)
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        raw: Any = plain.reshape(-1).view(torch.uint8).numpy()
        packed = pack(raw, plain.dtype.itemsize) if compress else None
        data = raw if packed is None else packed
        codec = "raw" if packed is None else "blosc"
        return cls(name, data, codec, plain.dtype, list(plain.shape), xxh3_128_hexdigest(data))


# ---------------------------------------------------------------------- reading
def read_contents(file: BinaryIO, size: int, *, sealed: bool = True) -> Contents:
    """Read and check everything but the tensors.

    Args:
        file: opened at its beginning.
        size: its length in bytes.
        sealed: expect a seal; files of version 1 have none.

    Returns:
        What it says of itself.

    Raises:
        Damage: it is truncated, damaged, or something else.
    """
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise Damage("is truncated or not a safetensors file", got=f"{size} bytes")
    raw = file.read(length)
    found = _parsed(raw, "is truncated or not a safetensors file", size)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_HEADER), str):
        _spans(found, 8 + length, size)  # for a sentence about truncation, where that is what happened
        raise Damage("was not written by explaind")
    seal = metadata.get(_SEAL)
    if sealed != isinstance(seal, str):
        raise Damage("carries no checksums" if sealed else "carries checksums that a run of version 1 does not have")
    if isinstance(seal, str) and _digest_unsealed(raw, seal) != seal:
        raise Damage("is damaged: its header does not have the checksum that was stored", expected=seal[:32])
    spans = _spans(found, 8 + length, size)
    header = _parsed(metadata[_HEADER], "is damaged: its header is no JSON", size, anything=True)
    if not sealed:
        return Contents(header, _plain_entries(found, spans), None, None)
    said = _parsed(metadata.get(_CONTENTS, ""), "is damaged: its contents are not declared", size)
    try:
        entries = {n: _entry(spans[n], *said["tensors"][n]) for n in spans}
        run, name, generation = said["run"], said["file"], said.get("generation", "")
    except (LookupError, TypeError, ValueError) as error:
        raise Damage(f"is damaged: its contents are not declared as they must be ({error})") from error
    if not all(isinstance(word, str) for word in (run, name, generation)):
        raise Damage("is damaged: it does not say which file of which run it is")
    return Contents(header, entries, run, name, generation)


def _digest_unsealed(raw: bytes, seal: str) -> str:
    return xxh3_128_hexdigest(raw.replace(seal.encode(errors="replace"), _UNSEALED.encode(), 1))


def _parsed(text: str | bytes, what: str, size: int, *, anything: bool = False) -> Any:
    """JSON, a mapping unless ``anything`` will do. Nesting that is too deep for Python is damage like any other."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damage(what, got=f"{size} bytes") from error
    if not anything and not isinstance(value, dict):
        raise Damage(what, got=f"{size} bytes")
    return value


def _spans(found: Mapping[str, Any], begin: int, size: int) -> dict[str, tuple[int, int]]:
    """Where each tensor lies; together they fill the file behind its header, without gaps."""
    try:
        spans = {n: (e["data_offsets"][0], e["data_offsets"][1]) for n, e in found.items()}
        if any(type(value) is not int for span in spans.values() for value in span):
            raise TypeError
    except (LookupError, TypeError) as error:
        raise Damage("is truncated or not a safetensors file", got=f"{size} bytes") from error
    position = 0
    for first, last in sorted(spans.values()):
        if first != position or last < first:
            raise Damage("is damaged: its tensors overlap or leave gaps", expected=position, got=first)
        position = last
    if begin + position != size:
        raise Damage("is truncated", expected=f"{begin + position} bytes", got=f"{size} bytes")
    return {n: (begin + first, begin + last) for n, (first, last) in spans.items()}


def _entry(span: tuple[int, int], codec: Any, dtype: Any, shape: Any, digest: Any) -> Entry:
    if codec not in ("raw", "blosc") or not isinstance(digest, str):
        raise ValueError(f"packed as {codec!r}")
    return Entry(*span, codec, DTYPES[dtype], _shape(shape), digest)


def _shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 1 << 62 for n in shape) or len(shape) > 64:
        raise ValueError(f"shape {shape!r}")
    return tuple(shape)


def check_shapes(declared: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Refuse tensors that are larger, smaller or of another kind than what they are stored for.

    Args:
        declared: what a file says of them.
        expected: what they must be; others are passed over.

    Raises:
        Damage: one differs.
    """
    for name, (shape, dtype) in declared.items():
        wanted, kind = expected.get(name, (shape, dtype))
        if shape != wanted or (kind is not None and dtype != kind):
            got = (shape, dtype)
            raise Damage(f"does not fit the manifest in {name!r}", expected=(wanted, kind or dtype), got=got)


def _plain_entries(found: Mapping[str, Any], spans: Mapping[str, tuple[int, int]]) -> dict[str, Entry]:
    known = {safe: DTYPES[name] for name, safe in _NAMES.items()} | {"C64": torch.complex64}
    try:
        return {
            n: Entry(*span, "raw", known[found[n]["dtype"]], _shape(found[n]["shape"]), None)
            for n, span in spans.items()
        }
    except (LookupError, TypeError, ValueError) as error:
        raise Damage(f"is truncated or not a safetensors file ({error})") from error


def read_entry(file: BinaryIO, name: str, entry: Entry) -> Tensor:
    """Read one tensor, check it against its digest and unpack it.

    Args:
        file: what :func:`read_contents` read.
        name: of the tensor, for the error.
        entry: what the file says of it.

    Returns:
        The tensor, with its own storage.

    Raises:
        Damage: its bytes are not the ones that were stored, or do not make the tensor that was declared.
    """
    size = entry.end - entry.begin
    if entry.codec == "raw" and size != entry.nbytes:
        raise Damage(f"is damaged: {name!r} is not what was declared", expected=f"{entry.nbytes} bytes", got=size)
    stored: Any = np.empty(size, dtype=np.uint8)
    file.seek(entry.begin)
    if file.readinto(memoryview(stored)) != size:  # type: ignore[attr-defined]
        raise Damage("is truncated")
    if entry.digest is not None and xxh3_128_hexdigest(stored) != entry.digest:
        raise Damage(f"is damaged: {name!r} does not have the checksum that was stored", expected=entry.digest)
    try:
        data = unpack(memoryview(stored), entry.nbytes) if entry.codec == "blosc" else stored
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        return torch.from_numpy(data).view(entry.dtype).reshape(entry.shape)
    except (ValueError, RuntimeError, MemoryError, OverflowError) as error:
        raise Damage(f"is damaged: {name!r} is not what was declared: {error}", expected=entry.shape) from error
