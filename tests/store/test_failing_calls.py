"""Calls of the system fail in turn: the error is a clear one, and what was promised to be on disk is."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

import explaind_core as explaind
from explaind_core.errors import ExplaindError, StoreError
from explaind_core.results.array_metadata import check_folder
from explaind_core.store import json_files, locate, sync_folders
from explaind_core.store.json_files import JsonFiles
from explaind_core.store.writing_lock import LockWords, WritingLock
from explaind_core.testing import record_example
from support.failing_files import FailingFiles, Fault, Faults
from support.history_model import Training
from support.interrupted_training import Training as Whole
from support.unreliable_storage import Unreliable

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what a descriptor is of")
WORDS = LockWords("this is being written already", "wait", "nothing was written")
#: Of the calls of a kind so many fail, one after the other.
FAILING = 25


@pytest.fixture
def files(tmp_path, monkeypatch):
    with FailingFiles(tmp_path, Faults()).installed(monkeypatch) as files:
        yield files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "made"
    Whole().record(folder / "run", until=3)
    ask = {"out": folder / "result.zarr", "keep": ("step",), "progress": False}
    explaind.attribute(record_example(steps=2), torch.ones(1, 4, dtype=torch.float64), **ask)
    (folder / "checkpoints").mkdir()
    for s in range(2):
        save_file({"weight": torch.full((1, 3), float(s)).double()}, folder / "checkpoints" / f"{s}.safetensors")
    return folder


def resume(folder):
    training = Whole()
    run = explaind.open_run(folder / "run", model=training.model, until="intact")
    training.record(folder / "run", resume=run.restore(training.model, training.optimizer), until=4)


def import_them(folder):
    explaind.import_checkpoints(folder / "imported", folder / "checkpoints", Training().model, progress=False)


ASKED = {
    "open a run": lambda folder: explaind.open_run(folder / "run").theta(2),
    "its size": lambda folder: explaind.open_run(folder / "run").bytes,
    "open a result": lambda folder: explaind.open_result(folder / "result.zarr"),
    "begin a run": lambda folder: Whole().record(folder / "new", until=1, expected_steps=1),
    "resume a run": resume,
    "import checkpoints": import_them,
}


@pytest.mark.parametrize("asked", ASKED)
def test_whichever_look_fails_the_error_is_clear(tmp_path, files, made, asked):
    with files.off():
        shutil.copytree(made, tmp_path / "counted")
    ASKED[asked](tmp_path / "counted")
    calls = files.faults.seen["read"]
    assert calls
    for at in range(0, calls, max(1, calls // FAILING)):
        folder = tmp_path / str(at)
        with files.off():
            shutil.copytree(made, folder)
        files.faults.arm(Fault("read", at, "fail"))
        with contextlib.suppress(ExplaindError):
            ASKED[asked](folder)
        files.faults.arm(None)


def test_metadata_that_may_run_code_are_looked_for_or_nothing_is_opened(tmp_path, monkeypatch):
    """A folder that cannot be listed is none in which there is nothing."""
    address = locate("unreliable://hidden/result")
    (address / "a").mkdir(parents=True)
    (address / "a" / ".zarray").write_bytes(b"{}")
    with pytest.raises(StoreError, match=r"format 2[\s\S]*\.zarray"):
        check_folder(address)
    monkeypatch.setattr("explaind_core.store.remote_files.PAUSES", ())
    with Unreliable.failing(0, 1), pytest.raises(StoreError, match="cannot be reached"):
        check_folder(address)


# ------------------------------------------------------------------ what is on disk
@pytest.mark.parametrize(("number", "told"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced_is_told_but_where_no_folder_can(tmp_path, monkeypatch, number, told):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output") if told else contextlib.nullcontext():
        sync_folders([tmp_path])
    sync_folders([tmp_path / "nowhere"])


def test_a_folder_in_which_all_was_deleted_is_synced(tmp_path, files):
    (tmp_path / "run" / "steps").mkdir(parents=True)
    (tmp_path / "run" / "steps" / "1").write_bytes(b"1")
    store = JsonFiles(tmp_path / "run")
    store.sync(everything=True)
    os.unlink(tmp_path / "run" / "steps" / "1")
    store.sync(everything=True)
    files.disk.fail(lambda _: 0)  # the old, wherever there may be it
    assert list((tmp_path / "run" / "steps").iterdir()) == []


@pytest.mark.parametrize("write", ["_write", "_append"])
def test_what_is_written_while_another_thread_syncs_is_synced_next(tmp_path, files, monkeypatch, write):
    store, name = JsonFiles(tmp_path), "replace" if write == "_write" else "append"
    real = getattr(json_files, name)

    def meanwhile(*args, **kwargs):
        store.sync()
        return real(*args, **kwargs)

    monkeypatch.setattr(json_files, name, meanwhile)
    store._write(tmp_path / "a", [b"1"]) if write == "_write" else store._append(tmp_path / "a", 0, b"1")
    store.sync()
    files.disk.fail(lambda n: n - 1)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_an_import_that_returned_is_there(tmp_path, files):
    states = [{"weight": torch.full((1, 3), float(s)).double()} for s in range(2)]
    path = tmp_path / "new" / "imported"
    explaind.import_checkpoints(path, states, Training().model, progress=False)
    files.disk.fail(lambda n: n - 1)  # folders whose names were never synced are gone
    assert (path / "manifest.json").read_bytes()


# ------------------------------------------------------------------ locks
WHOLE = b"process 12 on here\n"
PARTS = [WHOLE[:n] for n in range(len(WHOLE) + 1)]


@pytest.mark.parametrize("left", [*PARTS, bytes(len(WHOLE)), WHOLE[:9] + bytes(10)])
def test_whatever_a_loss_of_power_leaves_of_a_lock_keeps_nobody_out(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    WritingLock(tmp_path / "lock", where=tmp_path, words=WORDS).release()


@pytest.mark.parametrize("left", [b"processor", b"process on", b"process 12 of", b"\0x", WHOLE + b"x"])
def test_somebody_elses_file_is_left_alone(tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    with pytest.raises(StoreError, match="something else than a lock"):
        WritingLock(tmp_path / "lock", where=tmp_path, words=WORDS)
    assert (tmp_path / "lock").read_bytes() == left
