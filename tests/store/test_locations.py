"""Runs that lie elsewhere: recorded to, read from, resumed and damaged at addresses that fsspec knows."""

from __future__ import annotations

from uuid import uuid4

import fsspec
import pytest
from upath import UPath

import explaind_core as explaind
from explaind_core import errors
from explaind_core.store.integrity import damages
from explaind_core.store.locations import locate
from explaind_core.store.run_store import RunStore
from support.interrupted_training import STEPS, Training, held


@pytest.fixture
def address():
    found = f"memory://runs/{uuid4().hex}"
    yield found
    files = fsspec.filesystem("memory")
    if files.exists(found):
        files.rm(found, recursive=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    Training().record(path)
    return held(path)


def test_a_run_elsewhere_is_the_same(address, whole):
    training = Training()
    training.record(address)
    assert held(address) == whole
    run = explaind.open_run(address, model=training.model)
    assert run.complete
    assert run.snapshots() == [0, 2, 4]
    assert run.check_files(progress=False) == ()
    assert run.bytes > 1000
    assert explaind.verify(run, training.inputs[0], nodes=2).update_error < 1e-13
    assert str(run.path) == address


def test_it_is_resumed_overwritten_and_refused(address, whole):
    Training().record(address, until=2)
    (locate(address) / "closed.json").unlink()
    Training().go_on(address)
    assert held(address) == whole
    with pytest.raises(errors.StoreError, match="something at this path already"):
        Training().record(address)
    Training().record(address, until=1, overwrite=True)
    assert len(explaind.open_run(address).steps) == 1


def test_damage_elsewhere_is_named(address):
    Training().record(address)
    path = RunStore(address).step_path(3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.StoreError, match=r"step 3 is truncated[\s\S]*memory://runs/.*/000003.safetensors"):
        explaind.open_run(address)
    assert len(explaind.open_run(address, damaged=True).steps) == STEPS
    path.unlink()
    assert [e.what for e in damages(RunStore(address))] == ["step 3 is missing"]


def test_nothing_elsewhere_is_no_run(address):
    with pytest.raises(errors.StoreError, match=r"not a recorded run[\s\S]*memory://"):
        explaind.open_run(address)
    with pytest.raises(errors.StoreError, match="not a recorded run"):
        Training().record(address, resume=True)


def test_a_local_address_is_a_path(tmp_path, whole):
    Training().record(f"file://{tmp_path}/run")
    assert held(tmp_path / "run") == whole
    assert held(UPath(tmp_path / "run")) == whole


def test_an_address_that_nobody_knows_is_refused():
    with pytest.raises(errors.StoreError, match=r"no such kind of address here[\s\S]*nowhere://run"):
        explaind.open_run("nowhere://run")


def test_a_write_elsewhere_that_fails_is_told(address, monkeypatch):
    def full(*_, **__):
        raise OSError("quota exceeded")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", full)
    with pytest.raises(errors.StoreError, match=r"cannot be written: quota exceeded"):
        Training().record(address)
