"""What files declare is compared with what is there before memory is asked for or anything is looped over."""

from __future__ import annotations

import struct
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.store import compression, damages, integrity
from explaind_core.store.compression import pack, unpack
from explaind_core.store.locations import LONGEST_JSON, NotPlainError, read_bytes
from explaind_core.testing import record_example
from support.hostile_files import read_tensor_file, write_tensor_file


@contextmanager
def bounded(*, seconds=5.0, megabytes=32):
    """So much time and memory, and no more."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        yield
        assert time.perf_counter() - begin < seconds
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


@pytest.fixture
def run():
    return record_example(steps=3)


def change(path, work):
    """Another header of a file of tensors, sealed."""
    said, tensors = read_tensor_file(path)
    work(said)
    write_tensor_file(path, said, tensors)


# ------------------------------------------------------------------ steps
def test_steps_that_are_declared_and_not_there_are_not_counted_through(run):
    run.store.write_json("closed.json", {"steps": 1 << 61})
    with bounded(), pytest.raises(errors.StoreError, match=r"step 4 is missing"):
        explaind.open_run(run.path)
    with bounded():
        opened = explaind.open_run(run.path, damaged=True)
        found = damages(opened.store)
        assert [error.what for error in found] == [f"{(1 << 61) - 3} steps are missing"]
        with pytest.raises(errors.StoreError, match=r"is missing"):
            opened.theta(1 << 61)
        assert opened.theta(3)


def test_few_missing_steps_are_told_one_by_one_and_many_together(run, monkeypatch):
    monkeypatch.setattr(integrity, "_TOLD", 5)
    for missing, told in ((5, 5), (6, 1)):
        run.store.write_json("closed.json", {"steps": 3 + missing})
        assert len(damages(run.store)) == told


def test_samples_that_are_declared_are_not_counted_through(run):
    run.store.write_json("manifest.json", {**run.store.read_json("manifest.json"), "train_size": 1 << 61})
    opened = explaind.open_run(run.path, model=run.model)
    inputs = torch.ones(1, 4, dtype=torch.float64)
    with bounded(seconds=60), pytest.raises(errors.QuestionError, match=r"are of no sample"):
        explaind.attribute(opened, inputs, keep=("train",), train=[1 << 61], progress=False)


# ------------------------------------------------------------------ JSON
@pytest.mark.parametrize("name", ["manifest.json", "closed.json"])
def test_json_of_180_megabytes_is_not_read(run, name):
    with (run.path / name).open("r+b") as file:
        file.truncate(180_000_000)
    with bounded(), pytest.raises(errors.StoreError, match=rf"{name} cannot be read: it is 180000000 bytes long"):
        explaind.open_run(run.path)


def test_the_longest_json_is_read_and_one_byte_more_is_not(tmp_path):
    path = tmp_path / "a.json"
    for size in (LONGEST_JSON, LONGEST_JSON + 1):
        with path.open("wb") as file:
            file.truncate(size)
        if size == LONGEST_JSON:
            assert len(read_bytes(path, longest=LONGEST_JSON)) == size
        else:
            with pytest.raises(NotPlainError, match=r"bytes long"):
                read_bytes(path, longest=LONGEST_JSON)


def test_70_megabytes_of_brackets_end_at_once(run):
    brackets = b"[" * 66_000_000
    (run.path / "closed.json").write_bytes(brackets)
    with bounded(megabytes=200), pytest.raises(errors.StoreError, match=r"closed.json is damaged: it is nested too"):
        explaind.open_run(run.path)
    (run.path / "closed.json").unlink()
    run.store.step_path(2).write_bytes(struct.pack("<Q", 70_000_000) + b"[" * 70_000_000)
    with bounded(megabytes=200), pytest.raises(errors.StoreError, match=r"step 2 is truncated or not a safetensors"):
        explaind.open_run(run.path)
    with pytest.raises(errors.StoreError, match=r"step 2 "):
        explaind.open_run(run.path)


# ------------------------------------------------------------------ tensors
def test_a_parameter_is_as_large_as_the_start_says(run):
    manifest = run.store.read_json("manifest.json")
    for shape, dtype in (([1 << 20, 1 << 20], "torch.float64"), ([5, 4], "torch.float32"), ([4, 5], "torch.float64")):
        manifest["parameters"][0] |= {"shape": shape, "dtype": dtype}
        run.store.write_json("manifest.json", manifest)
        with bounded(), pytest.raises(errors.StoreError, match=r"start of the run does not fit the manifest"):
            explaind.open_run(run.path)
    manifest["parameters"][0] |= {"shape": [5, 4], "dtype": "torch.float64"}
    run.store.write_json("manifest.json", manifest)
    assert explaind.open_run(run.path).theta(3)


@pytest.mark.parametrize("kind", ["theta", "gradient"])
def test_a_step_holds_no_more_than_its_parameters(run, kind):
    change(
        run.store.step_path(2), lambda said: said["contents"]["tensors"][f"{kind}/0.bias"].__setitem__(2, [5, 1 << 30])
    )
    opened = explaind.open_run(run.path)
    with bounded(), pytest.raises(errors.StoreError, match=rf"step 2 does not fit the manifest in '{kind}/0.bias'"):
        opened.theta(2) if kind == "theta" else opened.gradients(2)


@pytest.mark.parametrize("shape", [[0], [1], [1 << 40], []])
def test_what_is_not_packed_has_the_size_that_it_declares(run, shape):
    change(run.store.step_path(2), lambda said: said["contents"]["tensors"]["ids/0"].__setitem__(2, shape))
    with bounded(), pytest.raises(errors.StoreError, match=r"step 2 is damaged: 'ids/0' is not what was declared"):
        explaind.open_run(run.path).sample_ids(2)


@pytest.mark.parametrize("by", [-8, 8])
def test_tensors_that_overlap_or_leave_gaps(run, by):
    def moved(said):
        first, second = sorted(said["entries"].values(), key=lambda entry: entry["data_offsets"])[:2]
        second["data_offsets"] = [second["data_offsets"][0] + by, second["data_offsets"][1]]
        assert first["data_offsets"][1] > 0

    change(run.store.step_path(2), moved)
    with bounded(), pytest.raises(errors.StoreError, match=r"step 2 is damaged: its tensors overlap or leave gaps"):
        explaind.open_run(run.path)


def blosc(plain, taken):
    return struct.pack("<BBBBIII", 2, 1, 0, 8, plain, 0, taken) + bytes(taken - 16)


@pytest.mark.parametrize("taken", [17, 100])
def test_a_block_may_be_as_small_as_it_can_be_and_no_smaller(taken):
    with pytest.raises((ValueError, RuntimeError)) as error:  # its content is none, but its size may be that
        unpack(memoryview(blosc(255 * taken, taken)), 255 * taken)
    assert "no sequence of chunks" not in str(error.value)
    with pytest.raises(ValueError, match=r"no sequence of chunks"):
        unpack(memoryview(blosc(255 * taken + 1, taken)), 255 * taken + 1)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_zeros_of_any_number_are_packed_and_unpacked(itemsize):
    """The most that can be packed into the least; every ratio that occurs is below the bound."""
    for size in (256, 4096, 1 << 20, (1 << 22) + 8):
        packed = pack(np.zeros(size, dtype=np.uint8), itemsize)
        assert size / len(packed) < compression._LARGEST_RATIO
        assert not unpack(memoryview(packed), size).any()


def test_many_blocks_that_blow_up_ask_for_no_memory():
    blocks = memoryview(blosc(1 << 26, 17) * 100_000)
    with bounded(), pytest.raises(ValueError, match=r"no sequence of chunks"):
        unpack(blocks, 100_000 << 26)


# ------------------------------------------------------------------ sparse tensors
@pytest.fixture
def sparse(tmp_path):
    """A run of an embedding with sparse gradients."""
    model = nn.Embedding(6, 2, sparse=True).double()
    optimizer, loss = torch.optim.SparseAdam(model.parameters(), lr=0.1), nn.MSELoss()
    inputs, targets = torch.tensor([1, 3, 3]), torch.ones(3, 2, dtype=torch.float64)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, train_size=3) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            recorder.batch(inputs, targets, ids=torch.arange(3))
            optimizer.step()
    return explaind.open_run(tmp_path / "run", model=model)


def test_a_sparse_gradient_fits_its_parameter(sparse):
    assert sparse.gradients(1)["weight"].shape == (6, 2)
    path = sparse.store.step_path(1)
    change(path, lambda said: said["contents"]["tensors"]["sparse_values/weight"].__setitem__(2, [2, 3]))
    with bounded(), pytest.raises(errors.StoreError, match=r"sparse gradient of step 1 does not fit the manifest"):
        explaind.open_run(sparse.path).gradients(1)


@pytest.mark.parametrize(("shape", "fits"), [([6, 2], True), ([1 << 38, 2], False), ([6, 3], False)])
def test_a_sparse_state_is_of_its_parameter(run, shape, fits):
    """One of 4 TiB that no parameter has is not made dense by whoever restores it."""
    indices, values = torch.zeros(2, 1, dtype=torch.int64), torch.ones(1)
    name = next(iter(run.parameters))
    shape = list(run.parameters[name].shape) if fits else shape
    entry = {"#sparse": [{"#tensor": "0"}, {"#tensor": "1"}, shape, True]}
    header = {**run.store.read_header(run.store.start_path, what="the start"), "state": {name: {"a": entry}}}
    tensors = run.store.read_tensors(run.store.start_path, what="the start").tensors
    run.store.write_tensors(run.store.start_path, header, tensors | {"state/0": indices, "state/1": values})
    opened = explaind.open_run(run.path)
    if fits:
        assert opened.optimizer_state(0)[name]["a"].shape == tuple(shape)
    else:
        with bounded(), pytest.raises(errors.StoreError, match=rf"state.{name} has a sparse entry of the shape"):
            opened.optimizer_state(0)
