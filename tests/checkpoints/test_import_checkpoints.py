"""Checkpoints taken into a store: the same answers as from the checkpoints themselves; damage is named."""

from __future__ import annotations

from uuid import uuid4

import pytest
import torch
import xarray as xr
from safetensors.torch import save_file
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.checkpoints.checkpoint_store import CheckpointStore
from explaind_core.store import locations
from explaind_core.store.locations import locate

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()


@pytest.fixture
def states():
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append({n: t.clone() for n, t in network().state_dict().items()})
    found[-1]["1.running_mean"] += 1
    return found


def ask(checkpoints, **options):
    return explaind.attribute_checkpoints(checkpoints, network(), INPUTS, nodes=4, progress=False, **options)


def test_the_answers_are_the_same(tmp_path, states):
    path = explaind.import_checkpoints(tmp_path / "store", states, network(), labels=["a", "b", 30], progress=False)
    xr.testing.assert_identical(ask(path), ask(states, labels=["a", "b", 30]))


def test_files_and_elsewhere(tmp_path, states):
    for number, state in enumerate(states):
        save_file(state, tmp_path / f"epoch{10 * number}.safetensors")
    address = f"memory://{uuid4().hex}/store"
    path = explaind.import_checkpoints(address, tmp_path, network(), progress=False)
    xr.testing.assert_identical(ask(path), ask(tmp_path))
    xr.testing.assert_identical(ask(address), ask(states, labels=[0, 10, 20]))


def test_damage_is_named(tmp_path, states):
    path = explaind.import_checkpoints(tmp_path / "store", states, network(), progress=False)
    file = path / "checkpoints" / "000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.StoreError, match=r"checkpoint number 1 is damaged[\s\S]*000001.safetensors"):
        ask(path)
    file.unlink()
    with pytest.raises(errors.StoreError, match=r"checkpoint number 1 is missing"):
        ask(path)
    (path / "manifest.json").write_text((path / "manifest.json").read_text().replace("Sequential", "sequential"))
    with pytest.raises(errors.StoreError, match=r"manifest.json is damaged"):
        ask(path)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, states):
    with pytest.raises(errors.StoreError, match="of another model"):
        explaind.import_checkpoints(tmp_path / "store", states, nn.Linear(2, 1), progress=False)
    assert not (tmp_path / "store").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("")
    with pytest.raises(errors.StoreError, match="something at this path already"):
        explaind.import_checkpoints(tmp_path / "full", states, network(), progress=False)


def test_a_store_of_checkpoints_is_no_run(tmp_path, states):
    path = explaind.import_checkpoints(tmp_path / "store", states, network(), progress=False)
    with pytest.raises(errors.StoreError, match=r"not a recorded run[\s\S]*explaind-checkpoints"):
        explaind.open_run(path)
    assert locate(path) == path


# ------------------------------------------------------------------ killed imports
def kill(monkeypatch, path, states, at, **options):
    """Imports, and is killed at write number ``at``; whether it was."""
    count, write = [0], locations.write

    def failing(place, parts):
        count[0] += 1
        if count[0] > at:
            place.write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(place, parts)

    with monkeypatch.context() as patch:
        patch.setattr(locations, "write", failing)
        try:
            explaind.import_checkpoints(path, states, network(), progress=False, **options)
        except KeyboardInterrupt:
            return True
    return False


def test_an_import_that_was_killed_says_so_and_goes_on(tmp_path, states, monkeypatch):
    expected = ask(states)
    for at in range(5):  # the import's own manifest, three checkpoints, the manifest
        path = tmp_path / str(at)
        assert kill(monkeypatch, path, states, at)
        if at:
            with pytest.raises(errors.StoreError, match=r"half an import[\s\S]*3 checkpoints[\s\S]*same path again"):
                ask(path)
        explaind.import_checkpoints(path, states, network(), progress=False)
        xr.testing.assert_identical(ask(path), expected)
        assert not (path / "unfinished.json").exists()
    assert not kill(monkeypatch, tmp_path / "whole", states, 5)


def test_what_is_whole_of_half_an_import_is_not_written_again(tmp_path, states, monkeypatch):
    assert kill(monkeypatch, tmp_path / "store", states, 3)
    first, second = (tmp_path / "store" / "checkpoints" / f"{index:06d}.safetensors" for index in (0, 1))
    before, content = first.stat().st_ino, second.read_bytes()
    second.write_bytes(content[:-1])
    explaind.import_checkpoints(tmp_path / "store", states, network(), progress=False)
    assert first.stat().st_ino == before
    assert second.read_bytes() == content


@pytest.mark.parametrize("other", ["labels", "values"])
def test_half_an_import_of_other_checkpoints_is_refused(tmp_path, states, monkeypatch, other):
    assert kill(monkeypatch, tmp_path / "store", states, 3)
    options = {"labels": [1, 2, 3]} if other == "labels" else {}
    if other == "values":
        states[1]["0.bias"][0] = torch.nextafter(states[1]["0.bias"][0], torch.tensor(9.0).double())
    with pytest.raises(errors.StoreError, match=rf"half an import of other checkpoints[\s\S]*{other}"):
        explaind.import_checkpoints(tmp_path / "store", states, network(), progress=False, **options)


def test_half_an_import_of_a_later_version_is_refused(tmp_path, states, monkeypatch):
    assert kill(monkeypatch, tmp_path / "store", states, 2)
    begun = {"format": "explaind-checkpoints", "version": 3, "run": "a", "model": "m", "labels": [0]}
    CheckpointStore(tmp_path / "store").write_json("unfinished.json", begun)
    with pytest.raises(errors.StoreError, match=r"cannot be gone on with[\s\S]*version 2"):
        explaind.import_checkpoints(tmp_path / "store", states, network(), progress=False)
