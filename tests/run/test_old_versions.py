"""Runs that earlier releases recorded: they open and read the same; one of a later release says what to do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.testing import record_example
from support.old_versions import DATA


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


@pytest.fixture
def old(tmp_path, model):
    shutil.copytree(DATA / "version1", tmp_path / "run")
    return explaind.open_run(tmp_path / "run", model=model)


def flat(tensors):
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def test_version_1_reads_the_same(old):
    said = json.loads((DATA / "version1.json").read_text())
    found = {
        "theta": [flat(old.theta(s)) for s in range(4)],
        "gradients": [flat(old.gradients(s)) for s in old.steps],
        "buffers": [flat(old.buffers(s)) for s in range(4)],
        "hyper": [list(old.hyper(s)) for s in old.steps],
        "ids": [old.sample_ids(s).tolist() for s in old.steps],
        "inputs": [old.batch(s).inputs.tolist() for s in old.steps],
        "metrics": old.metrics.loss.values.tolist(),
        "snapshots": old.snapshots(),
        "state": {n: e["momentum_buffer"].flatten().tolist() for n, e in old.optimizer_state(2).items()},
    }
    assert found == {key: said[key] for key in found}
    assert old.complete
    assert old.check_files(progress=False) == ()


def test_version_1_is_explained_and_restored(old, model):
    assert explaind.verify(old, torch.randn(2, 3, dtype=torch.float64)).update_error < 1e-14
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    assert old.restore(model, optimizer) == 3
    assert torch.equal(model[0].weight, old.theta(3)["0.weight"])


def test_version_1_is_not_continued_but_says_how_to_go_on(old, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    old.restore(model, optimizer)
    with pytest.raises(errors.StoreError, match=r"version 1 can be read, but not continued[\s\S]*into a new run"):
        explaind.Recorder(old.path, model, optimizer, nn.MSELoss(), resume=True)
    assert explaind.open_run(old.path).complete  # nothing was touched


def test_damage_of_version_1_is_found_as_far_as_it_could_be_then(old):
    path = old.store.step_path(2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.StoreError, match=r"step 2 is truncated[\s\S]*000002[\s\S]*until=1"):
        explaind.open_run(old.path)


def test_a_later_version_says_what_to_do():
    run = record_example(steps=1)
    run.store.write_json("manifest.json", {**run.store.read_json("manifest.json"), "version": 3, "created_with": "9.1"})
    with pytest.raises(errors.StoreError, match=r"another version[\s\S]*version 3[\s\S]*9.1[\s\S]*with that release"):
        explaind.open_run(run.path)


def test_a_file_without_checksums_is_not_taken_for_one_of_version_2(old):
    run = record_example(steps=2)
    run.store.step_path(2).write_bytes(old.store.step_path(2).read_bytes())
    with pytest.raises(errors.StoreError, match="step 2 carries no checksums"):
        explaind.open_run(run.path)


def test_a_manifest_cannot_be_passed_off_as_version_1():
    run = record_example(steps=2)
    path = run.path / "manifest.json"
    for changed in ('"version": 1', '"version": 1, "x": 0'):
        path.write_text(path.read_text().replace('"version": 2', changed))
        with pytest.raises(errors.StoreError, match=r"manifest\.json is damaged"):
            explaind.open_run(run.path)
