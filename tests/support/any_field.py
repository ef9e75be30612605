"""Any field of any JSON that a run or a result stores, replaced by anything, sealed again, and what comes of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import explaind_core as explaind
from support import old_versions
from support.hostile_files import read_tensor_file, write_json_file, write_log, write_result, write_tensor_file

#: In the place of a field: nothing.
MISSING = object()
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 1 << 40, 1 << 61, 1 << 63, 10**400, 0.5, -1.0, 1e300, float("nan"), float("inf"),
    "", "a", "steps", "snapshots", "torch.float32", "float32", "int8", "blosc", "0" * 32, "\x1b[2J", "\ud800",
    [], [0], [-1], ["a"], [[]], [1, 2], [None], {}, {"a": 1}, {"#tensor": "0"}, {"#tuple": [1]}, {"#items": [[[], 1]]},
    {"name": "a"}, MISSING,
]  # fmt: skip
Place = tuple[Any, ...]


def files(folder: Path) -> list[Path]:
    """The files of a run or a result that hold JSON; one step and one batch stand for all."""
    if (folder / "manifest.json").exists():
        names = [
            folder / "manifest.json",
            folder / "closed.json",
            folder / "metrics.jsonl",
            folder / "start.safetensors",
        ]
        some = [sorted(folder.glob(f"{kind}/**/*.safetensors")) for kind in ("steps", "batches", "snapshots")]
        return [path for path in names if path.exists()] + [path for found in some for path in found[1:2] or found[:1]]
    return [folder / "zarr.json"]


def said(path: Path) -> Any:
    """What a file says, as one JSON value without its checksums."""
    if path.suffix == ".safetensors":
        return read_tensor_file(path)[0]
    if path.suffix == ".jsonl":
        return [_plain(json.loads(line)) for line in path.read_text().splitlines()]
    return _plain(json.loads(path.read_text()))


def say(path: Path, value: Any) -> None:
    """Write a file that says this, with the checksums that it must have."""
    if path.name == "zarr.json":
        write_result(path.parent, value)
        return
    if path.suffix == ".safetensors":
        write_tensor_file(path, value, read_tensor_file(path)[1])
        return
    run = json.loads((path.parent / "manifest.json").read_text())["run"]
    if path.suffix == ".jsonl":
        write_log(path, value, run)
    else:
        write_json_file(path, value, run)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if key != "checksum"}


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Where a field stands, at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*at, key)
        yield from places(entry, (*at, key))


def replaced(value: Any, place: Place, new: Any) -> Any:
    """The value with another field in a place, or without it."""
    value = copy.deepcopy(value)
    target = value
    for key in place[:-1]:
        target = target[key]
    if new is MISSING:
        del target[place[-1]]
    else:
        target[place[-1]] = new
    return value


def at(value: Any, place: Place) -> Any:
    """The field in a place."""
    for key in place:
        value = value[key]
    return value


def used(folder: Path) -> dict[str, Any]:
    """All that a run, or a result, is asked for; what it says of itself is looked at, and no answer."""
    if folder.suffix == ".zarr":
        found = explaind.open_result(folder)
        str(found), explaind.closure_error(found)
        return {str(name): old_versions.floats(v.values) for name, v in found.data_vars.items()}
    run = old_versions.opened(folder.parent, folder.name)
    str(run.description), repr(run), run.rule_name, run.coarse
    for s in run.steps:
        run.hyper(s), run.clips(s), run.outside(s), run.closure_calls(s), run.gradient_factor(s), run.buffers_before(s)
    for s in run.snapshots():
        run.optimizer_state(s)
    check = explaind.verify(run, old_versions.INPUTS[:2], nodes=1, progress=False)
    if check.agreement < 1 or check.update_error > 1e-6:
        return {}  # it says so
    steps = run.steps
    return {
        "theta": [_hexadecimal(run.theta(s)) for s in range(5)],
        "gradients": [_hexadecimal(run.gradients(s)) for s in steps],
        "buffers": [_hexadecimal(run.buffers(s)) for s in range(5)],
        "batches": [repr((run.batch(s).ids.tolist(), run.batch(s).inputs, run.batch(s).targets)) for s in steps],
        "metrics": run.metrics.equals(run.metrics),
    }


def _hexadecimal(tensors: dict[str, Any]) -> dict[str, list[str]]:
    return {name: old_versions.floats(tensor) for name, tensor in tensors.items()}
