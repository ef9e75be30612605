"""Stored files changed as an attacker would change them: with checksums that are right."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from explaind_core.results.result_record import checksum
from explaind_core.store import sealed_json


def read_tensor_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """What a file of tensors says, as one JSON value, and the bytes behind it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    metadata = entries.pop("__metadata__")
    said = {"header": json.loads(metadata["explaind"]), "contents": json.loads(metadata["explaind_contents"])}
    return {**said, "entries": entries}, data[8 + length :]


def write_tensor_file(path: Path, said: dict[str, Any], tensors: bytes) -> None:
    """A file that says this, sealed."""
    metadata = {
        "explaind": json.dumps(said.get("header")),
        "explaind_contents": json.dumps(said.get("contents")),
        "explaind_seal": "0" * 32,
    }
    entries = said.get("entries")
    text = json.dumps({"__metadata__": metadata, **(entries if isinstance(entries, dict) else {})}).encode()
    text = text.replace(b"0" * 32, xxh3_128_hexdigest(text).encode(), 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def write_json_file(path: Path, value: dict[str, Any], run: str) -> None:
    """A sealed JSON file of a run."""
    place = (path.name,) if path.name == "manifest.json" else (run, path.name)
    path.write_bytes(sealed_json.document(value, *place))


def write_log(path: Path, lines: list[Any], run: str) -> None:
    """A log of a run, every line sealed that can be."""
    content = [
        sealed_json.line(line, run, path.name, number) if isinstance(line, dict) else json.dumps(line).encode() + b"\n"
        for number, line in enumerate(lines)
    ]
    path.write_bytes(b"".join(content))


def write_result(path: Path, document: dict[str, Any]) -> None:
    """The ``zarr.json`` of a result, with the files of its arrays as it says, and every checksum right."""
    try:
        record, arrays = document["attributes"]["explaind"], document["consolidated_metadata"]["metadata"]
        record["files"], arrays.items()
    except (LookupError, TypeError, AttributeError):
        arrays, record = {}, {}
    for name, metadata in arrays.items():
        file = path / name / "zarr.json"
        if file.parent.is_dir() and file.parent.parent == path and isinstance(record["files"], dict):
            file.write_text(json.dumps(metadata))
            record["files"][f"{name}/zarr.json"] = checksum(file.read_bytes())
    write_root(path, document)


def write_root(path: Path, document: Any) -> None:
    """The ``zarr.json`` of a result alone; what has no place for a checksum gets none."""
    try:
        document["attributes"]["explaind"]["checksum"] = "0" * 32
    except (LookupError, TypeError):
        (path / "zarr.json").write_text(json.dumps(document))
        return
    text = json.dumps(document)
    (path / "zarr.json").write_text(text.replace("0" * 32, checksum(text.encode()), 1))
