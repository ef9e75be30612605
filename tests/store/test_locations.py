"""Runs that lie elsewhere: recorded to, read from, resumed and damaged at addresses that fsspec knows."""

from __future__ import annotations

from uuid import uuid4

import fsspec
import pytest
from upath import UPath

import explaind_core as explaind
from explaind_core import errors
from explaind_core.store.folder_contents import names_in, total_bytes
from explaind_core.store.integrity import damages
from explaind_core.store.locations import (
    NotPlainError,
    append,
    locate,
    read_bytes,
    remove,
    remove_unfinished,
    replace,
)
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


def test_the_size_of_a_run_is_that_of_its_files_wherever_it_lies(address, tmp_path):
    Training().record(address)
    Training().record(tmp_path / "run")
    there, here = explaind.open_run(address), explaind.open_run(tmp_path / "run")
    assert here.bytes == sum(p.stat().st_size for p in here.path.rglob("*") if p.is_file())
    sizes = fsspec.filesystem("memory").find(address, detail=True)
    assert there.bytes == sum(entry["size"] for entry in sizes.values()) == pytest.approx(here.bytes, rel=0.01)
    assert total_bytes(locate(f"{address}/nothing")) == total_bytes(tmp_path / "nothing") == 0


@pytest.mark.parametrize("local", [True, False])
def test_files_are_put_listed_and_removed_alike(address, tmp_path, local):
    folder = tmp_path / "folder" if local else locate(address)
    assert names_in(folder) == []
    for name in ("b", "a/c"):
        replace(folder / name, [b"12", b"345"])
    assert names_in(folder) == ["a", "b"]
    assert read_bytes(folder / "a/c") == b"12345"
    assert append(folder / "b", 2, b"x") == 3
    assert read_bytes(folder / "b") == b"12x"
    assert total_bytes(folder) == 8
    remove(folder / "a")
    assert names_in(folder) == ["b"]
    with pytest.raises(FileNotFoundError):
        read_bytes(folder / "a/c")


def test_a_link_is_followed_only_where_that_is_asked_for(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(NotPlainError, match="symbolic link"):
        read_bytes(tmp_path / "link")
    assert read_bytes(tmp_path / "link", follow_links=True) == b"1"


def test_what_a_kill_left_half_written_is_removed_by_its_ending(tmp_path):
    for name in ("a.partial", "folder/b.unfinished", "folder/c.partial", "folder/d"):
        replace(tmp_path / name, [b""])
    remove_unfinished(tmp_path, ending=".partial")
    assert (names_in(tmp_path), names_in(tmp_path / "folder")) == (["folder"], ["b.unfinished", "d"])
