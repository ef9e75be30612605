"""Results on disk: two processes do not write one, a full disk loses nothing, and they may lie elsewhere."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import xarray as xr

import explaind_core as explaind
from explaind_core.errors import QuestionError, StoreError
from explaind_core.results import result_writer as appending
from explaind_core.store import locations
from explaind_core.store.scratch import WorkingFolder
from explaind_core.strategies.stepwise import Stepwise
from support.asked_results import INPUTS, ask, run

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.attribution.attribute")


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(appending, "BLOCK", 2)


# ------------------------------------------------------------------ two processes
def _write_slowly(path: str, begun) -> None:
    append, appending.BLOCK = appending.ResultWriter.append, 2

    def slow(self, block, labels):
        append(self, block, labels)
        begun.set()
        time.sleep(600)

    appending.ResultWriter.append = slow
    ask(path)


def test_two_processes_do_not_write_one_result(tmp_path):
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    other = context.Process(target=_write_slowly, args=(str(tmp_path / "result.zarr"), begun))
    other.start()
    try:
        assert begun.wait(240)
        with pytest.raises(
            StoreError, match=r"another process is writing this result[\s\S]*choose another out="
        ) as told:
            ask(tmp_path / "result.zarr")
        assert f"result.zarr.explaind-writing is held by process {other.pid} on " in str(told.value)
    finally:
        other.kill()
        other.join(60)
    assert (tmp_path / "result.zarr.explaind-writing").exists()  # but it is nobody's
    assert explaind.open_result(tmp_path / "result.zarr", unfinished=True).sizes["step"] == 2
    xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), ask(None))
    assert [p.name for p in tmp_path.iterdir()] == ["result.zarr"]


def test_one_process_does_not_write_one_result_twice(tmp_path):
    path = tmp_path / "result.zarr"
    with (
        appending.ResultWriter(path, "question", "step", 3),
        pytest.raises(StoreError, match=r"writing this result[\s\S]*held by another call of this process"),
        appending.ResultWriter(path, "question", "step", 3),
    ):
        pass
    assert not (tmp_path / "result.zarr.explaind-writing").exists()


def test_a_finished_result_is_read_while_somebody_holds_its_lock(tmp_path):
    ask(tmp_path / "result.zarr")
    with filelock.FileLock(tmp_path / "result.zarr.explaind-writing"):
        xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), ask(None))
    assert (tmp_path / "result.zarr.explaind-writing").exists()
    ask(tmp_path / "result.zarr")  # nobody holds it: left by a process that was killed when all was done
    assert not (tmp_path / "result.zarr.explaind-writing").exists()


# ------------------------------------------------------------------ full disks, folders that cannot be written
@pytest.mark.parametrize("name", ["steps", "samples"])
@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")])
@pytest.mark.parametrize("share", [0, 0.05, 0.3, 0.9, 0.99])
def test_a_failed_write_loses_nothing(tmp_path, monkeypatch, name, number, said, share):
    """At the first writes that claim the folder, among those of the first block, among those of a later one."""
    monkeypatch.setattr(module, "choose", _one_row(module.choose))
    writes, limit, original = [], [1000], Path.open

    def opened(self, mode="r", *args, **options):
        if ("w" in mode or "x" in mode) and ".zarr" in str(self):
            if len(writes) >= limit[0]:
                raise OSError(number, os.strerror(number), str(self))
            writes.append(self)
        return original(self, mode, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        whole = ask(tmp_path / "whole.zarr", name).load()
        limit[0] = int(share * len(writes))
        writes.clear()
        with pytest.raises(StoreError, match=rf"{said}[\s\S]*where: [\s\S]*same out= to go on") as error:
            ask(tmp_path / "result.zarr", name)
    kept = re.search(r"the first (\d) of (\d)", str(error.value))
    if kept:
        axis, done = {"steps": "step", "samples": "test"}[name], int(kept[1])
        part = explaind.open_result(tmp_path / "result.zarr", unfinished=True)
        assert part.sizes[axis] == done > 0
        np.testing.assert_array_equal(part.kernel, whole.kernel.isel({axis: slice(0, done)}))
    assert bool(kept) == (share >= 0.9)
    xr.testing.assert_identical(ask(tmp_path / "result.zarr", name).load(), whole)


def _one_row(choose):
    return lambda *arguments: replace(choose(*arguments), rows=1)


def test_a_folder_that_cannot_be_made_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(Stepwise, "contributions", None)
    with pytest.raises(StoreError, match=r"Not a directory[\s\S]*where: "):
        ask(tmp_path / "file" / "result.zarr")


# ------------------------------------------------------------------ elsewhere
def test_a_result_may_lie_elsewhere():
    path = "memory://somewhere/result.zarr"
    xr.testing.assert_identical(ask(path).load(), ask(None))
    xr.testing.assert_identical(explaind.open_result(path).load(), ask(None))
    import fsspec

    files = fsspec.filesystem("memory")
    files.rm("/somewhere/result.zarr/kernel/c/1/0/0")
    with pytest.raises(StoreError, match=r"memory://somewhere/result\.zarr/kernel/c/1/0/0"):
        explaind.open_result(path)
    with pytest.raises(StoreError, match="there is no result here"):
        explaind.open_result("memory://somewhere/else")
    with pytest.raises(QuestionError, match="another question"):
        ask(path, nodes=3)


def test_an_address_of_this_machine_is_a_path_and_an_unknown_one_is_refused(tmp_path):
    xr.testing.assert_identical(ask(f"file://{tmp_path}/result.zarr").load(), ask(None))
    xr.testing.assert_identical(explaind.open_result(tmp_path / "result.zarr").load(), ask(None))
    for asked in (explaind.open_result, ask):
        with pytest.raises(StoreError, match=r"no such kind of address here[\s\S]*nowhere://result"):
            asked("nowhere://result")


# ------------------------------------------------------------------ temporary files
@pytest.fixture
def temporary(tmp_path, monkeypatch):
    run()  # its own folder is no file of a question
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", ["tape", "moments"])
def test_a_full_disk_for_temporary_files_is_told(temporary, monkeypatch, kind):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if kind == "tape":
        monkeypatch.setattr(locations, "write", full)
        question = lambda: ask(None, "samples")  # noqa: E731
    else:
        monkeypatch.setattr(os, "posix_fallocate", full)
        question = lambda: explaind.similarity(run(), INPUTS, nodes=1, progress=False)  # noqa: E731
    with pytest.raises(StoreError, match=rf"disk is full[\s\S]*explaind-{kind}-[\s\S]*TMPDIR") as error:
        question()
    assert "open_run" not in str(error.value)
    assert list(temporary.iterdir()) == []


def test_folders_of_killed_processes_are_removed_by_the_next(temporary):
    kept, gone, new = (WorkingFolder("tape") for _ in range(3))
    for folder in (gone, new):
        folder._lock.release()  # as the system does when a process is killed
    long_ago = time.time() - 3600
    for folder in (kept, gone):
        os.utime(folder.path / "in-use.lock", (long_ago, long_ago))
    (temporary / "explaind-mine").mkdir()
    with WorkingFolder("moments") as folder:
        left = {p.name for p in temporary.iterdir()}
    assert left == {kept.path.name, new.path.name, "explaind-mine", folder.path.name}
