"""The run on disk: whole or refused, append-only, plain data."""

from __future__ import annotations

import errno
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import explaind_core as explaind
from explaind_core import errors, trees
from explaind_core.store import json_files, locations
from explaind_core.store.run_store import RunStore
from explaind_core.testing import record_example


@pytest.fixture
def run():
    return record_example(steps=4)


# ------------------------------------------------------------------ damage
def test_a_closed_run_knows_that_its_last_steps_are_missing(run):
    for s in (3, 4):
        run.store.step_path(s).unlink()
    with pytest.raises(errors.StoreError, match=r"step 3 is missing[\s\S]*steps 1..4[\s\S]*until=2"):
        explaind.open_run(run.path)
    assert len(explaind.open_run(run.path, until=2).steps) == 2


def test_a_run_that_was_never_closed_is_as_long_as_its_files(run):
    (run.path / "closed.json").unlink()
    run.store.step_path(4).unlink()
    opened = explaind.open_run(run.path)
    assert (len(opened.steps), opened.complete) == (3, False)


def test_until_beyond_the_end_is_refused(run):
    with pytest.raises(errors.StoreError, match=r"step 5 is missing[\s\S]*steps 1..4"):
        explaind.open_run(run.path, until=9)


def test_until_hides_later_steps_metrics_and_damage(run):
    run.store.append_line("metrics.jsonl", {"step": 1, "loss": 2.0})
    run.store.append_line("metrics.jsonl", {"step": 4, "loss": 1.0})
    run.store.step_path(4).write_bytes(b"")
    short = explaind.open_run(run.path, until=2)
    assert short.metrics.step.values.tolist() == [1]
    with pytest.raises(errors.QuestionError, match=r"no step 3[\s\S]*1 <= step <= 2"):
        short.batch(3)


@pytest.mark.parametrize("cut", [0, 7, 8, 100])
def test_a_step_cut_anywhere_is_refused(run, cut):
    path = run.store.step_path(2)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        errors.StoreError, match=rf"truncated or not a safetensors file[\s\S]*{cut} bytes[\s\S]*until=1"
    ):
        explaind.open_run(run.path)


@pytest.mark.parametrize("header", [b"[1, 2]", b"{}" * 9, b'{"a": 1}', b'{"a": {"data_offsets": [0]}}', b"\xff" * 9])
def test_a_file_with_a_header_of_something_else_is_refused(run, header):
    run.store.step_path(2).write_bytes(struct.pack("<Q", len(header)) + header + b"junk")
    with pytest.raises(errors.StoreError, match="truncated or not a safetensors file"):
        explaind.open_run(run.path)


def test_a_safetensors_file_of_somebody_else_is_refused(run):
    save_file({"theta/0.weight": torch.ones(5, 4)}, run.store.step_path(2))
    with pytest.raises(errors.StoreError, match=r"step 2 was not written by explaind"):
        explaind.open_run(run.path).theta(2)


def test_the_start_of_the_run_is_checked_too(run):
    path = run.store.start_path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.StoreError, match=r"the start of the run is truncated[\s\S]*start.safetensors"):
        explaind.open_run(run.path)


def test_a_missing_batch_is_named_with_its_step(run):
    shutil.rmtree(run.path / "batches")
    opened = explaind.open_run(run.path)
    opened.theta(2)  # what does not need it still works
    with pytest.raises(errors.StoreError, match=r"the batch of step 2 is missing[\s\S]*batches"):
        opened.batch(2)


@pytest.mark.parametrize("name", ["._000002.safetensors", "notes.safetensors", "000005.safetensors.unfinished"])
def test_files_that_are_no_steps_are_passed_over(run, name):
    (run.store.step_path(1).parent / name).write_bytes(b"junk")
    assert len(explaind.open_run(run.path).steps) == 4


@pytest.mark.parametrize(
    "name", ["steps/001/000002.safetensors", "steps/000/2.safetensors", "steps/000/001002.safetensors",
             "steps/001/000005.safetensors"],
)  # fmt: skip
def test_steps_in_another_place_are_passed_over(run, name):
    misplaced = run.path / name
    misplaced.parent.mkdir(exist_ok=True)
    shutil.copy(run.store.step_path(2), misplaced)
    assert run.store.found_steps() == [1, 2, 3, 4]
    assert len(explaind.open_run(run.path).steps) == 4


@pytest.mark.parametrize("deleted", range(5))
def test_whatever_a_kill_leaves_of_deleting_the_last_steps_is_a_run(monkeypatch, deleted):
    """Steps go from the last one on, and what is left is without a hole."""
    run = record_example(steps=6)
    (run.path / "closed.json").unlink()  # as resuming leaves it
    removed, remove = [], json_files.remove

    def killed(path):
        if path.parent.parent.name == "steps":
            if len(removed) == deleted:
                raise KeyboardInterrupt
            removed.append(int(path.stem))
        remove(path)

    monkeypatch.setattr(json_files, "remove", killed)
    if deleted < 4:
        with pytest.raises(KeyboardInterrupt):
            run.store.go_on(2)
    else:
        run.store.go_on(2)
    assert removed == [6, 5, 4, 3][:deleted]
    assert run.store.found_steps() == list(range(1, 7 - deleted))
    assert len(explaind.open_run(run.path).steps) == 6 - deleted


@pytest.mark.parametrize("content", ["", "{", "[]", '"run"', '{"format": "other"}'])
def test_a_manifest_of_something_else_is_refused(run, content):
    (run.path / "manifest.json").write_text(content)
    with pytest.raises(errors.StoreError, match=r"manifest.json is damaged|not a recorded run"):
        explaind.open_run(run.path)


def test_a_model_with_a_parameter_too_many_is_another_model(run):
    model = nn.Sequential(*run.model, nn.Linear(3, 1))
    with pytest.raises(
        errors.StoreError, match=r"another model: 2 parameters[\s\S]*'3.weight'[\s\S]*no such parameter"
    ):
        explaind.open_run(run.path, model=model)


def test_a_model_of_another_dtype_is_another_model(run):
    with pytest.raises(errors.StoreError, match=r"torch.float64[\s\S]*torch.float32"):
        explaind.open_run(run.path, model=record_example(steps=1, dtype=torch.float32).model)


# ------------------------------------------------------------------ logs
def test_a_torn_line_is_passed_over_and_nothing_is_appended_to_it(tmp_path):
    store = RunStore(tmp_path)
    store.append_line("log.jsonl", {"a": 1})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"a": 2, "b')
    assert store.read_lines("log.jsonl") == [{"a": 1}]
    store.append_line("log.jsonl", {"a": 3})
    assert store.read_lines("log.jsonl") == [{"a": 1}, {"a": 3}]


def test_a_log_that_is_nothing_but_a_torn_line(tmp_path):
    store = RunStore(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"a')
    assert store.read_lines("log.jsonl") == []
    store.append_line("log.jsonl", {"a": 1})
    assert store.read_lines("log.jsonl") == [{"a": 1}]


def test_a_log_damaged_in_the_middle_is_refused_with_its_line(tmp_path):
    store, path = RunStore(tmp_path), tmp_path / "log.jsonl"
    for value in (1, 2, 3):
        store.append_line("log.jsonl", {"a": value})
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for damaged in (first + b'{"a"\n' + third, first + third, first + third + second, first + first + third):
        path.write_bytes(damaged)
        with pytest.raises(errors.StoreError, match=r"log.jsonl is damaged[\s\S]*line 2"):
            store.read_lines("log.jsonl")


def test_no_log_is_an_empty_log(tmp_path):
    assert RunStore(tmp_path).read_lines("log.jsonl") == []


# ------------------------------------------------------------------ writing
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    store, path = RunStore(tmp_path), tmp_path / "x.safetensors"
    store.write_tensors(path, {"n": 1}, {"t": torch.ones(2)})

    def half(path, parts):
        path.write_bytes(parts[0][:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locations, "write", half)
    with pytest.raises(errors.StoreError, match=r"the disk is full[\s\S]*x.safetensors[\s\S]*intact"):
        store.write_tensors(path, {"n": 2}, {"t": torch.zeros(2)})
    monkeypatch.undo()
    assert store.read_tensors(path, what="it").header == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]  # and no rest of the attempt


def test_a_folder_that_cannot_be_written_is_not_called_a_full_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StoreError, match=r"cannot be written[\s\S]*permissions"):
        RunStore(tmp_path / "file").write_json("manifest.json", {})


def test_a_thousand_steps_share_a_folder(tmp_path):
    paths = [RunStore(tmp_path).step_path(s).relative_to(tmp_path).as_posix() for s in (1, 999, 1000, 1234567)]
    assert paths == [
        "steps/000/000001.safetensors",
        "steps/000/000999.safetensors",
        "steps/001/001000.safetensors",
        "steps/1234/1234567.safetensors",
    ]


# ------------------------------------------------------------------ nested data
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
tensors = st.lists(st.integers(-9, 9), max_size=3).map(torch.tensor)
keys = st.text(max_size=3) | st.integers() | st.sampled_from(["#tensor", "#tuple", "#items", "#sparse"])
nested = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@given(tree=nested)
@settings(deadline=None, max_examples=100)
def test_nested_data_survives_json(tree):
    structure, found = trees.flatten(tree, "it")
    assert same(trees.unflatten(json.loads(json.dumps(structure)), found), tree)


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_tensors_survive(coalesced):
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), torch.ones(3, 2), (4, 2), check_invariants=True)
    sparse = sparse.coalesce() if coalesced else sparse
    structure, found = trees.flatten({"buffer": sparse}, "it")
    back = trees.unflatten(json.loads(json.dumps(structure)), found)["buffer"]
    assert back.is_coalesced() == coalesced
    assert torch.equal(back.to_dense(), sparse.to_dense())


@pytest.mark.parametrize("leaf", [{1, 2}, object(), lambda: 0, torch.float32])
def test_what_is_no_data_is_refused_with_its_place(leaf):
    with pytest.raises(errors.RecordingError, match=rf"it holds a {type(leaf).__name__}[\s\S]*it.a\[1\]"):
        trees.flatten({"a": [0, leaf]}, "it")
