"""Results on disk: damage of any file is found and named, two processes do not write one, a full disk loses nothing."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.errors import QuestionError, StoreError
from explaind_core.results import result_writer as appending
from explaind_core.run.run import Run
from explaind_core.store import locations
from explaind_core.store.scratch import WorkingFolder
from explaind_core.testing import record_example

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.attribution.attribute")
INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
#: keep, strategy: along steps, along test samples, in one go; labels that are text, numbers, and no axis's own.
QUESTIONS = {
    "steps": {"keep": ("step", "layer", "test"), "strategy": "forward"},
    "windows": {"keep": ("step", "parameter"), "strategy": "reverse", "steps": {"a": [1, 2], "b": [3], "c": [5]}},
    "samples": {"keep": ("train", "test"), "strategy": "adjoint", "train": {"x": [0, 1], "y": [2]}},
    "whole": {"keep": ("layer",)},
}


@lru_cache
def run() -> Run:
    return record_example(5)


def ask(out=None, name="steps", **question) -> xr.Dataset:
    return explaind.attribute(run(), INPUTS, out=out, **{"nodes": 2, "progress": False, **QUESTIONS[name], **question})


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(appending, "BLOCK", 2)


@lru_cache
def finished(name: str) -> Path:
    path = Path(_FOLDER.name) / f"{name}.zarr"
    ask(path, name)
    return path


_FOLDER = tempfile.TemporaryDirectory(prefix="explaind-results-")


def files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


@pytest.fixture
def damaged(tmp_path):
    """A copy of a finished result of which one file is made to hold something else, or nothing, one after the other."""

    def each(name: str, damage) -> Iterator[str]:
        path = tmp_path / "result.zarr"
        shutil.copytree(finished(name), path)
        for key in files(path):
            content = (path / key).read_bytes()
            found = damage(content)
            if found is None:
                (path / key).unlink()
            else:
                (path / key).write_bytes(found)
            yield key
            (path / key).write_bytes(content)
        explaind.open_result(path)

    return each


# ------------------------------------------------------------------ damage
DAMAGE = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\n",
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["steps", "samples"])
def test_damage_of_any_file_is_found_and_named(name, kind, damaged, tmp_path):
    for key in damaged(name, DAMAGE[kind]):
        # Without zarr.json nothing says that it is a result.
        named = "no result" if (key, kind) == ("zarr.json", "missing") else re.escape(f"result.zarr/{key}")
        with pytest.raises(StoreError, match=named) as error:
            explaind.open_result(tmp_path / "result.zarr")
        assert error.value.remedy is not None


@pytest.mark.parametrize("name", ["windows", "whole"])
def test_damage_is_found_by_who_asks_again(name, damaged, tmp_path):
    for key in damaged(name, DAMAGE["last bit"]):
        with pytest.raises(StoreError, match=re.escape(f"result.zarr/{key}")):
            ask(tmp_path / "result.zarr", name)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_flipped_bit_anywhere_is_found_and_named(data):
    name = data.draw(st.sampled_from(sorted(QUESTIONS)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.zarr"
        shutil.copytree(finished(name), path)
        # Metadata have most bytes: half of the draws go to chunks.
        keys = [k for k in files(path) if k.endswith("zarr.json") == data.draw(st.booleans())]
        key = data.draw(st.sampled_from(keys))
        content = bytearray((path / key).read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        (path / key).write_bytes(content)
        with pytest.raises(StoreError, match=re.escape(key)):
            explaind.open_result(path)


def test_without_the_check_a_damaged_chunk_is_found_when_it_is_read(tmp_path):
    shutil.copytree(finished("steps"), tmp_path / "result.zarr")
    chunk = tmp_path / "result.zarr" / "kernel/c/1/0/0"
    chunk.write_bytes(DAMAGE["last bit"](chunk.read_bytes()))
    opened = explaind.open_result(tmp_path / "result.zarr", check=False)
    assert np.isfinite(opened.kernel.isel(step=slice(0, 2)).values).all()
    with pytest.raises(ValueError, match="checksum"):
        opened.kernel.load()
    chunk.unlink()
    with pytest.raises(StoreError, match="kernel/c/1/0/0"):
        explaind.open_result(tmp_path / "result.zarr", check=False)


def test_chunks_full_of_one_number_are_files_too(tmp_path):
    """Or else one that is missing could not be told from them."""
    result = ask(tmp_path / "result.zarr", steps=[1, 2, 3])  # contiguous: nothing is omitted
    assert not result.omitted.any()
    assert {k for k in files(tmp_path / "result.zarr") if k.startswith("omitted/c/")} == {
        "omitted/c/0/0",
        "omitted/c/1/0",
    }


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_reads_as_it_was_returned_and_any_zarr_reader_reads_it(name):
    memory = ask(None, name)
    xr.testing.assert_identical(explaind.open_result(finished(name)).load(), memory)
    for options in ({"chunks": None}, {"chunks": None, "consolidated": False}):
        plain = xr.open_zarr(finished(name), **options)
        for variable in memory.data_vars:
            np.testing.assert_array_equal(plain[variable].values, memory[variable].values)
        assert set(plain.coords) == set(memory.coords)


def test_large_chunks_are_cut_along_other_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(appending, "_CHUNK", 200)
    stored = ask(tmp_path / "result.zarr", "windows", keep=("step", "parameter", "output"))
    sizes = [
        np.prod(a.chunks) * 8 for _, a in zarr.open_group(tmp_path / "result.zarr", mode="r").arrays() if a.ndim == 3
    ]
    assert sizes
    assert max(sizes) <= 200
    xr.testing.assert_identical(stored.load(), ask(None, "windows", keep=("step", "parameter", "output")))


# ------------------------------------------------------------------ what is no result
def test_what_is_no_finished_result_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"there is no result here[\s\S]*got: +nothing"):
        explaind.open_result(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"there is no result here[\s\S]*got: +an empty folder"):
        explaind.open_result(tmp_path)
    with pytest.raises(StoreError, match=r"no result of explaind[\s\S]*a recorded run[\s\S]*open_run opens"):
        explaind.open_result(run().path)
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "two", zarr_format=2, consolidated=False)
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "three", zarr_format=3, consolidated=False)
    with pytest.raises(
        StoreError, match=r"no result of explaind[\s\S]*zarr folder of format 2[\s\S]*open_zarr reads it"
    ):
        explaind.open_result(tmp_path / "two")
    with pytest.raises(StoreError, match=r"no result of explaind[\s\S]*zarr folder of something else"):
        explaind.open_result(tmp_path / "three")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="no result"):
        explaind.open_result(tmp_path / "file")


def test_another_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("explaind_core.results.stored_result.VERSION", 2)
    ask(tmp_path / "result.zarr")
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"another version[\s\S]*expected: version 1[\s\S]*got: +version 2"):
        explaind.open_result(tmp_path / "result.zarr")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A result of which the first two of five steps are written."""
    append, path = appending.ResultWriter.append, tmp_path / "result.zarr"

    def once(self, block, labels):
        if self.done:
            raise KeyboardInterrupt
        append(self, block, labels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(appending.ResultWriter, "append", once)
        ask(path)
    return path


def test_an_interrupted_result_says_so_and_its_finished_part_opens(interrupted):
    with pytest.raises(
        StoreError, match=r"unfinished[\s\S]*expected: 5 step entries[\s\S]*got: +2[\s\S]*same question"
    ):
        explaind.open_result(interrupted)
    part = explaind.open_result(interrupted, unfinished=True).load()
    whole = explaind.open_result(finished("steps")).load()
    xr.testing.assert_identical(part, whole.isel(step=slice(0, 2)))
    xr.testing.assert_identical(explaind.open_result(finished("steps"), unfinished=True).load(), whole)
    with pytest.raises(QuestionError, match="another question"):
        ask(interrupted, nodes=3)


def test_damage_of_what_is_finished_is_found_before_it_is_continued(interrupted):
    chunk = interrupted / "residual/c/0/0"
    chunk.write_bytes(DAMAGE["first bit"](chunk.read_bytes()))
    with pytest.raises(StoreError, match=r"residual/c/0/0"):
        ask(interrupted)


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
        assert f"result.zarr.lock is held by process {other.pid} on " in str(told.value)
    finally:
        other.kill()
        other.join(60)
    assert (tmp_path / "result.zarr.lock").exists()  # but it is nobody's
    assert explaind.open_result(tmp_path / "result.zarr", unfinished=True).sizes["step"] == 2
    xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), ask(None))
    assert [p.name for p in tmp_path.iterdir()] == ["result.zarr"]


def test_a_finished_result_is_read_while_somebody_holds_its_lock(tmp_path):
    ask(tmp_path / "result.zarr")
    with filelock.FileLock(tmp_path / "result.zarr.lock"):
        xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), ask(None))
    assert (tmp_path / "result.zarr.lock").exists()
    ask(tmp_path / "result.zarr")  # nobody holds it: left by a process that was killed when all was done
    assert not (tmp_path / "result.zarr.lock").exists()


# ------------------------------------------------------------------ full disks, folders that cannot be written
@pytest.mark.parametrize("name", ["steps", "samples"])
@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written")])
@pytest.mark.parametrize("share", [0, 0.05, 0.3, 0.9, 0.99])
def test_a_failed_write_loses_nothing(tmp_path, monkeypatch, name, number, said, share):
    """At the first writes that claim the folder, among those of the first block, among those of a later one."""
    monkeypatch.setattr(module, "choose", _one_row(module.choose))
    writes, limit, original = [], [1000], Path.open

    def opened(self, mode="r", *args, **options):
        if "w" in mode and ".zarr" in str(self):
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
    monkeypatch.setattr(module, "stepwise", None)
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
