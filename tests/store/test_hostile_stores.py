"""Stores that were written to do harm, with checksums that are right: each is refused, and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from xxhash import xxh3_128_hexdigest

import explaind_core as explaind
from explaind_core import errors
from explaind_core.testing import record_example


@pytest.fixture
def run():
    return record_example(steps=3)


def resealed(path, change):
    """Change a file's parsed header, and seal it as its writer would."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    metadata = entries["__metadata__"]
    header, contents = json.loads(metadata["explaind"]), json.loads(metadata["explaind_contents"])
    header = change(header, contents, entries) or header
    metadata["explaind"] = header if isinstance(header, str) else json.dumps(header)
    metadata |= {"explaind_contents": json.dumps(contents), "explaind_seal": "0" * 32}
    text = json.dumps(entries).encode()
    text = text.replace(b"0" * 32, xxh3_128_hexdigest(text).encode(), 1)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def everything(path, model=None):
    """Read all that a run holds."""
    run = explaind.open_run(path, model=model)
    for s in run.steps:
        run.theta(s), run.gradients(s), run.hyper(s), run.batch(s), run.buffers(s), run.outside(s), run.closure_calls(s)
    return run.theta(0), run.optimizer_state(0), run.metrics


def test_the_helper_makes_stores_that_open(run):
    resealed(run.store.step_path(2), lambda *_: None)
    everything(run.path)


def _set(key, value):
    def change(header, contents, entries):
        header[key] = value

    return change


def _batch(key):
    return _set("batches", [{"key": key, "weight": 1.0}])


DEEP = "[" * 100_000 + "]" * 100_000
TREE = json.loads("[" * 800 + "]" * 800)
NESTED = json.loads("[" * 400 + "]" * 400)


@pytest.mark.parametrize(
    "change",
    [
        _batch("../../../../etc/passwd"),
        _batch("../start"),
        _batch(""),
        _batch("0" * 32 + "\n"),
        _set("batches", {"key": 1}),
        _set("batches", [[]]),
        _set("groups", [{"params": [7]}]),
        _set("groups", [{"params": [], "lr": {"#tensor": "nowhere"}}]),
        _set("groups", [{"params": [], "lr": {"#tensor": []}}]),
        _set("groups", [{"params": [], "lr": {"#items": 3}}]),
        _set("groups", [{"params": [], "lr": {"#sparse": [1]}}]),
        _set("groups", [{"params": [], "lr": TREE}]),
        _set("groups", "os.system"),
        _set("gradient_factor", "1; import os"),
        _set("closure_losses", {}),
        _set("lines", -1),
        lambda *_: [1, 2],
        lambda *_: DEEP,
        lambda *_: "nonsense",
        lambda _header, contents, _entries: contents.update(tensors={}),
        lambda _header, contents, _entries: contents.update(tensors=NESTED),
        lambda _header, contents, _entries: contents.update(file=None),
    ],
)  # fmt: skip
def test_a_header_of_something_else(run, change):
    resealed(run.store.step_path(2), change)
    with pytest.raises(errors.StoreError, match=r"step 2|a batch is named"):
        everything(run.path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("dtype", "load"),
        ("dtype", "float32.__class__"),
        ("dtype", []),
        ("dtype", "float32"),
        ("shape", [1 << 61, 3]),
        ("shape", [1 << 70]),
        ("shape", [-5, -4]),
        ("shape", [5.0, 4]),
        ("shape", [True, 20]),
        ("shape", [1] * 100 + [20]),
        ("shape", None),
        ("codec", "pickle"),
        ("codec", "blosc"),
        ("digest", None),
        ("digest", "0" * 32),
    ],
)
def test_a_tensor_of_something_else(run, entry, value):
    def change(header, contents, entries):
        contents["tensors"]["theta/0.weight"][["codec", "dtype", "shape", "digest"].index(entry)] = value

    resealed(run.store.step_path(2), change)
    with pytest.raises(errors.StoreError, match=r"step 2|theta\(2\) does not fit the manifest"):
        everything(run.path)


@pytest.mark.parametrize(
    "offsets", [[0, 1 << 62], [-8, 160], [1 << 62, 1 << 62], [8, 0], [0.0, 160.0], [0], "ab", None, {"0": 1}]
)
def test_a_tensor_somewhere_else(run, offsets):
    resealed(
        run.store.step_path(2),
        lambda _header, _contents, entries: entries["theta/0.weight"].update(data_offsets=offsets),
    )
    with pytest.raises(errors.StoreError, match="step 2"):
        everything(run.path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([1 << 50], "does not fit the manifest in 'theta/0.weight'"),
        ([5, 4], r"is damaged: 'theta/0.weight'[\s\S]*no sequence of chunks"),
    ],
)
def test_a_bomb_of_zeros_is_refused_before_it_is_unpacked(run, shape, words):
    def change(header, contents, entries):
        contents["tensors"]["theta/0.weight"][:3] = ["blosc", "float64", shape]
        # A chunk that says it holds 4 GiB.
        chunk = struct.pack("<BBBBIII", 2, 1, 0, 8, (1 << 32) - 1, 0, 160) + bytes(144)
        contents["tensors"]["theta/0.weight"][3] = xxh3_128_hexdigest(chunk)
        first, last = entries["theta/0.weight"]["data_offsets"]
        assert last - first == 160
        at = (
            os.path.getsize(path) - max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__") + first
        )
        with path.open("r+b") as file:
            file.seek(at)
            file.write(chunk)
        change.chunk = first, chunk

    path = run.store.step_path(2)
    resealed(path, change)
    first, chunk = change.chunk
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little") + first
    data[begin : begin + len(chunk)] = chunk
    path.write_bytes(data)
    with pytest.raises(errors.StoreError, match=f"step 2 {words}"):
        everything(run.path)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 200_000) + DEEP.encode(),
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 22) + b'{"__metadata__": null}',
        struct.pack("<Q", 26) + b'{"__metadata__": {"a": []}}'[:26],
        b"\x80\x04" + bytes(100),
    ],
)
def test_a_file_header_of_something_else(run, content):
    run.store.step_path(2).write_bytes(content)
    with pytest.raises(errors.StoreError, match=r"step 2 (is truncated|is damaged|was not written)"):
        everything(run.path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


def test_pickles_are_never_opened(run, tmp_path):
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Bomb(trace)))
    trace.unlink()  # so it would have been seen
    for name in ("manifest.json", "closed.json", "metrics.jsonl", "start.safetensors", "steps/000/000002.safetensors"):
        path = run.path / name
        before = path.read_bytes() if path.exists() else None
        for content in (pickle.dumps(Bomb(trace)), pickle.dumps(Bomb(trace), protocol=0) + b"\n"):
            path.write_bytes(content)
            with pytest.raises(errors.StoreError):
                everything(run.path)
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert not trace.exists()


def test_links_and_pipes_are_not_followed(run, tmp_path):
    path = run.store.step_path(2)
    aside = tmp_path / "aside"
    aside.write_bytes(path.read_bytes())
    for make in (lambda: path.symlink_to(aside), lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)):
        path.unlink()
        make()
        with pytest.raises(errors.StoreError, match=r"step 2 cannot be read: it is (a symbolic link|no plain file)"):
            everything(run.path)


@pytest.mark.parametrize("name", ["steps", "steps/000", "batches", "snapshots"])
def test_folders_that_lead_elsewhere_are_not_entered(run, tmp_path, name):
    folder, aside = run.path / name, tmp_path / "aside"
    if folder.exists():
        folder.rename(aside)
    else:
        aside.mkdir()
    folder.symlink_to(aside)
    with pytest.raises(errors.StoreError, match=r"a folder of the run store is a symbolic link"):
        everything(run.path)


def manifest(opened, changes):
    opened.store.write_json("manifest.json", {**opened.store.read_json("manifest.json"), **changes})


PARAMETER = {"name": "0.weight", "shape": [5, 4], "dtype": "torch.float64", "trained": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": "all"},
        {"parameters": [[]]},
        {"parameters": [{**PARAMETER, "dtype": "torch.load"}]},
        {"parameters": [{**PARAMETER, "dtype": "load"}]},
        {"parameters": [{**PARAMETER, "dtype": "torch.nn"}]},
        {"parameters": [{**PARAMETER, "shape": [-1]}]},
        {"parameters": [{**PARAMETER, "shape": [1 << 70]}]},
        {"parameters": [{**PARAMETER, "shape": [1 << 61, 1 << 61]}]},
        {"parameters": [{**PARAMETER, "shape": "ab"}]},
        {"parameters": [{**PARAMETER, "shape": [6, 4]}]},
        {"parameters": [{**PARAMETER, "name": "other"}]},
        {"rule": "os.system"},
        {"rule": {"name": "r", "package": "p", "inferred": True, "settings": {"command": "rm"}}},
        {"loss": {"name": "torch.nn.modules.loss.MSELoss", "settings": {"reduction": 1, "command": 2}}},
        {"loss": {"name": "torch.nn.modules.loss.CrossEntropyLoss", "settings": NESTED}},
        {"loss": {"name": ["torch"]}},
        {"train_size": -3},
        {"version": 3},
        {"version": True},
        {"version": [2]},
        {"version": 10**400},
        {"format": {}},
        {"run": 7},
        {"run": "0" * 32},
    ],
)
def test_a_manifest_of_something_else(run, changes):
    manifest(run, changes)
    with pytest.raises(errors.StoreError, match=r"manifest|version|recorded loss|inferred rule"):
        everything(run.path)


@pytest.mark.parametrize("name", ["os.system", "torch.nn.functional.linear", "torch.nn.functional.torch", "torch.load"])
def test_only_losses_are_taken_for_losses(run, name):
    manifest(run, {"loss": {"name": name, "settings": {}}})
    assert explaind.open_run(run.path, model=run.model).loss is None


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "torch.load", "nonsense"])
def test_only_optimizers_are_taken_for_optimizers(run, name):
    manifest(run, {"optimizer": name})
    opened = explaind.open_run(run.path, model=run.model)
    with pytest.raises(errors.StoreError, match=f"the optimizer {name} is not known here"):
        explaind.verify(opened, torch.zeros(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("content", [DEEP, "[" * 100_000, '{"a": ' * 50_000, '{"steps": 1e999999}', "\x00", "1" * 5000])
@pytest.mark.parametrize("name", ["manifest.json", "closed.json"])
def test_json_of_something_else(run, name, content):
    (run.path / name).write_text(content)
    with pytest.raises(errors.StoreError, match=name):
        everything(run.path)


@pytest.mark.parametrize(
    "closed", [{"steps": 10**30}, {"steps": -1}, {"steps": "3"}, {"steps": 3, "snapshots": [NESTED]}]
)
def test_an_end_of_something_else(run, closed):
    run.store.write_json("closed.json", closed)
    with pytest.raises(errors.StoreError, match=r"closed.json is not as it must be"):
        everything(run.path)


@pytest.mark.parametrize(
    "line", [{"step": "x"}, {"loss": 1.0}, {"step": 1, "loss": "os.system"}, {"step": 1, "a": NESTED}]
)
def test_metrics_of_something_else(run, line):
    run.store.append_line("metrics.jsonl", line)
    with pytest.raises(errors.StoreError, match=r"metrics.jsonl"):
        everything(run.path)
