"""The language of patterns, the patterns of a run's files, and text that would steer a terminal."""

from __future__ import annotations

import json

import pytest

from explaind_core import errors
from explaind_core.store.json_schema import (
    ANY_NUMBER,
    COUNT,
    DEVICE,
    JSON,
    NUMBER,
    POSITIVE,
    THREADS,
    TREE,
    Both,
    Every,
    OneOf,
    Only,
    Row,
    check_json,
    mismatch,
)
from explaind_core.store.run_schema import CLOSED, LINE, START, manifest_pattern, step_pattern
from explaind_core.testing import record_example
from support.hostile_files import read_tensor_file, write_tensor_file
from support.old_versions import DATA

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        (COUNT, [0, (1 << 62) - 1], [-1, 1 << 62, True, 1.0, "1", None]),
        (POSITIVE, [1, (1 << 62) - 1], [0, 1 << 62, True]),
        (THREADS, [1, 4096], [0, 4097, -1, True, 2.0]),
        (NUMBER, [0, -1.5, 1e308, (1 << 64) - 1, -(1 << 63)],
         [NAN, INFINITY, -INFINITY, 1 << 64, -(1 << 63) - 1, True]),
        (ANY_NUMBER, [NAN, INFINITY, 3], [True, "1", None, 10**400]),
        (DEVICE, ["cpu", "cuda:0", "cuda:9999"], ["", "cuda:", "cuda:10000", "CPU", "cpu\n", 1]),
        (OneOf(("a", 3)), ["a", 3], ["b", 3.0, True, None, []]),
        (OneOf((True,)), [True], [1, 1.0]),
        (Row((int, str)), [[1, "a"]], [[1], [1, "a", 2], ["a", 1], None]),
        (Every(int), [{}, {"a": 1}], [{"a": "1"}, [], None]),
        (Only({"a": int, "b?": str}), [{"a": 1}, {"a": 1, "b": "c"}], [{}, {"a": 1, "c": 2}, {"a": 1, "b": 2}]),
        (Both({"a": int}, Every(NUMBER)), [{"a": 1, "b": 2.0}], [{"a": 1.0}, {"a": 1, "b": "c"}, {"b": 1}]),
        ((None, str), [None, "a"], [1, []]),
        (JSON, [None, {"a": [1, {"b": NAN}]}], [{"a": [10**400]}]),
        (
            TREE,
            [{"a": [{"#tensor": "0"}, {"#tuple": [1, None]}]}, {"#items": [[1, {"#tensor": "1"}]]},
             {"#sparse": [{"#tensor": "0"}, {"#tensor": "1"}, [2, 3], True]}],
            [{"#tensor": 0}, {"#tensor": "0", "a": 1}, {"#tuple": 1}, {"#items": [[1]]}, {"#code": "a"}, {"#items": {}},
             {"#sparse": [{"#tensor": "0"}, {"#tensor": "1"}, [-1], True]}, {"a": 1 << 64}],
        ),
    ],
)  # fmt: skip
def test_a_pattern_just_inside_and_just_outside(pattern, inside, outside):
    assert [value for value in inside if mismatch(value, pattern)] == []
    assert [value for value in outside if not mismatch(value, pattern)] == []


def test_what_is_nested_too_deeply_is_told():
    deep = json.loads("[" * 900 + "]" * 900)
    assert mismatch({"a": deep}, {"a": TREE}) == "it is nested too deeply"
    assert mismatch({"a": json.loads("[" * 50 + "]" * 50)}, {"a": TREE}) is None


def test_a_refusal_names_the_file_and_the_field():
    with pytest.raises(errors.StoreError, match=r"closed.json is not as it must be: snapshots\[1\] is -1[\s\S]*a/b"):
        check_json({"steps": 1, "snapshots": [1, -1]}, CLOSED, what="closed.json", where="a/b")
    with pytest.raises(errors.StoreError, match=r"steps is a whole number of 1329 bits"):
        check_json({"steps": 10**400}, CLOSED, what="closed.json", where="a/b")


@pytest.mark.parametrize("name", ["steps", "parameters", "snapshots", "transformers_loss", "joint", "inferred"])
def test_what_was_stored_fits(name):
    folder = DATA / "version2" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert mismatch(manifest, manifest_pattern(manifest)) is None
    assert mismatch(read_tensor_file(folder / "start.safetensors")[0]["header"], START) is None
    for path in folder.glob("steps/*/*"):
        header = read_tensor_file(path)[0]["header"]
        assert mismatch(header, step_pattern(manifest["mode"])) is None
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert mismatch({k: v for k, v in json.loads(line).items() if k != "checksum"}, LINE) is None


MANIFEST = {
    "mode": ["everything", None, 1], "snapshot_every": [0, -1, "2"],
    "environment": [[], {"threads": -1}, {"threads": 0}],
    "provenance": [{"libraries": [], "git_commit": None}, {"libraries": {}, "git_commit": 1}],
    "modules": [[], {"": ["a"]}, {"": None}], "optimizers": [{}, [], [{"optimizer": 1}]], "outside": ["a", [1]],
    "penalty": ["a", {"name": None}], "evaluates_elsewhere": [1, "yes"], "optimizer_defaults": [[1]],
    "train_size": [NAN, True, 1.0], "created_with": [1],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in MANIFEST.items() for value in values])
def test_a_manifest_of_something_else(field, value):
    run = record_example(steps=1)
    run.store.write_json("manifest.json", {**run.store.read_json("manifest.json"), field: value})
    with pytest.raises(errors.StoreError, match=rf"the manifest [\s\S]*{field}[\s\S]*manifest.json"):
        type(run)(run.path)


FORWARD = {"training": True, "exceptions": [], "autocast": None, "device_type": "cpu", "rng": [], "scale": 1.0}
STEP = {
    "gradient_factor": [NAN, INFINITY, True, None], "threads": [-1, 0, 4097], "step": [2, 0, "1"],
    "clips": [[["all", 1.0]]],
    "stepped": [[1], [-1], 0], "recipe": [{"more": True}, {"divides": 1}], "closure_losses": [[None]], "calls": [-1],
    "unfed": [["nothing"], None], "data": [1], "buffers_before": ["a"], "lines": [0.5],
    "groups": [[{"params": ["nothing"]}], [{"params": ["0.bias", "0.bias"]}], [{"params": [], "lr": {"#code": "a"}}]],
}  # fmt: skip
BATCH = {
    "weight": [NAN, INFINITY, None, True], "reread": [1], "rows": [{}, {"shared": [], "owned": [0]}],
    "forward": [{}, {**FORWARD, "autocast": "torch.load"}, {**FORWARD, "device_type": "magic"}, {**FORWARD, "more": 1},
                {**FORWARD, "rng": ["cuda:7"]}, {**FORWARD, "scale": NAN}],
}  # fmt: skip
CHANGES = [((field,), value) for field, values in STEP.items() for value in values]
CHANGES += [(("batches", 0, field), value) for field, values in BATCH.items() for value in values]


@pytest.mark.parametrize(("place", "value"), CHANGES)
def test_a_step_of_something_else(place, value):
    run = record_example(steps=1)
    path = run.store.step_path(1)
    said, tensors = read_tensor_file(path)
    target = said["header"]
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    write_tensor_file(path, said, tensors)
    with pytest.raises(errors.StoreError, match=rf"the header of (the )?step[\s\S]*{place[-1]}[\s\S]*000001"):
        type(run)(run.path).batch(1)


@pytest.mark.parametrize("mode", ["parameters", "snapshots"])
def test_a_step_holds_what_its_mode_needs(mode):
    said = read_tensor_file(DATA / "version2" / mode / "steps/000/000001.safetensors")[0]["header"]
    for field in ("unfed", "theta_hash") if mode == "snapshots" else ("unfed", "gradient_hash"):
        assert mismatch({k: v for k, v in said.items() if k != field}, step_pattern(mode)) == f"{field} is missing"
        assert mismatch({k: v for k, v in said.items() if k != field}, step_pattern("steps")) is None


# ------------------------------------------------------------------ terminals
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"), ("\x00\x07\x08\r\x7f", r"\x00\x07\x08\r\x7f"), ("\x80\x9b\x9f", r"\x80\x9b\x9f"),
        ("\u202e\u2066\u2069\u200f\u061c", r"\u202e\u2066\u2069\u200f\u061c"), ("\u2028\ufeff", r"\u2028\ufeff"),
        ("\ud800", r"\ud800"), ("a\tb\nc\xa0ä\u2027\u202fλ→日", "a\tb\nc\xa0ä\u2027\u202fλ→日"),
    ],
)  # fmt: skip
def test_what_steers_a_terminal_is_written_out(text, shown):
    assert errors.printable(text) == shown
    error = errors.StoreError("a", where=text, expected=text, got=text, remedy=text)
    assert str(error).count(shown) == 4
    assert error.where == text


def test_names_of_a_file_are_printed_so():
    run = record_example(steps=1)
    manifest = run.store.read_json("manifest.json")
    run.store.write_json("manifest.json", {**manifest, "optimizer": "\x1b[31m", "model": "\u202e", "torch": "\x9b"})
    opened = type(run)(run.path)
    for text in (repr(opened), str(opened.description)):
        assert "\x1b" not in text
        assert r"\x1b[31m" in text
