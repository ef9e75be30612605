"""What a batch holds is split and hashed once, whoever asks."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core import errors, trees
from explaind_core.data import IndexedDataset
from explaind_core.training_step import batch_content
from explaind_core.training_step.batch_content import BatchContent
from support.mode_trainings import mlp

PAIRS = [(torch.arange(5.0) + i, i % 3) for i in range(8)]


@pytest.fixture
def counts(monkeypatch):
    """How often batches are split, put together, and read byte by byte."""
    found = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args):
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(owner, name, call)

    counted(trees, "flatten")
    counted(trees, "unflatten")
    counted(batch_content, "xxh3_128")
    counted(batch_content, "_bytes")
    return found


def declared(path, counts, **options):
    """One batch of two tensors, passed through the model and declared; what that counted."""
    model, loss = mlp(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = IndexedDataset(PAIRS)
    batch = data.batch(torch.arange(4), None)
    with explaind.Recorder(path, model, optimizer, loss, **options) as recorder:
        loss(model(batch.inputs), batch.targets).backward()
        counts.clear()
        recorder.batch(batch.inputs, batch.targets, ids=range(4))
        of_the_batch = copy.copy(counts)
        optimizer.step()
    return of_the_batch


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
def test_a_declared_batch_is_split_once_and_hashed_once(tmp_path, counts, mode):
    assert declared(tmp_path / "run", counts, mode=mode) == {"flatten": 1, "xxh3_128": 1, "_bytes": 2}


def test_one_that_will_be_read_again_has_a_hash_of_every_sample_beside(tmp_path, counts):
    options = {"inputs": "reread", "mode": "parameters"}
    assert declared(tmp_path / "run", counts, **options) == {"flatten": 1, "xxh3_128": 1, "_bytes": 4}


def test_the_first_one_is_compared_with_what_its_dataset_gives(tmp_path, counts):
    found = declared(tmp_path / "run", counts, inputs=IndexedDataset(PAIRS), mode="snapshots")
    assert found == {"flatten": 2, "xxh3_128": 2, "_bytes": 6}  # the samples that were read again are hashed as well


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (torch.ones(2, 3), None),
        ((torch.ones(2), [torch.zeros(2), "mask"]), {"labels": torch.zeros(2, dtype=torch.int64), "n": 2}),
        ({"x": torch.ones(2, 3, dtype=torch.bfloat16)}, torch.zeros(2, 0)),
    ],
)
def test_inputs_and_targets_come_out_as_they_went_in(inputs, targets):
    content = BatchContent.of(inputs, targets)
    for went_in, found in ((inputs, content.inputs), (targets, content.targets)):
        assert trees.flatten(went_in, "given")[0] == trees.flatten(found, "found")[0]
        assert all(torch.equal(a, b) for a, b in zip(trees.leaves(went_in), trees.leaves(found), strict=True))


@given(row=st.integers(0, 3), column=st.integers(0, 4), bit=st.integers(0, 31))
def test_one_bit_is_another_content_and_names_its_sample(row, column, bit):
    values = torch.arange(20, dtype=torch.int32).reshape(4, 5)
    other = values.clone()
    other[row, column] ^= torch.tensor(1 << bit).to(torch.int32)
    a, b = (BatchContent.of(values.view(torch.float32), tensor) for tensor in (values, other))
    assert a.hash != b.hash
    assert (a.row_hashes(4) != b.row_hashes(4)).tolist() == [k == row for k in range(4)]


def test_another_arrangement_of_the_same_numbers_is_another_content():
    x, y = torch.ones(2, 3), torch.zeros(2)
    contents = [BatchContent.of(x, y), BatchContent.of(y, x), BatchContent.of((x,), y), BatchContent.of(x.double(), y)]
    assert len({content.hash for content in contents}) == 4
    assert BatchContent.of(x.clone(), y.clone()).hash == contents[0].hash


def test_what_cannot_be_stored_is_named():
    with pytest.raises(errors.RecordingError, match=r"the batch holds a ndarray[\s\S]*the batch.inputs\.x"):
        BatchContent.of({"x": torch.ones(2).numpy()}, None)
