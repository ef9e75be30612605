"""Links, pipes and devices that somebody planted where a run, a result or checkpoints are written or read.

Each must be refused or passed by: a victim outside of the folder keeps its bytes, and nothing waits for a pipe.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.cli import app as cli
from explaind_core.store import LockWords, RunStore, WritingLock, locations
from explaind_core.store import guarded_files as guarded
from explaind_core.store.scratch import WorkingFolder
from support.asked_results import ask
from support.planted import ANY, SECRET, device, hard, pipe, symbolic

pytestmark = pytest.mark.timeout(60)


def model():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


def record(path, steps=2, **options):
    """Train a little, recorded; resumed, it begins where the run left the model."""
    net, x, y = model(), torch.ones(4, 2), torch.ones(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if options.get("resume"):
        explaind.open_run(path, model=net).restore(net, optimizer)
    with explaind.Recorder(path, net, optimizer, nn.MSELoss(), **options) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            recorder.batch(x, y, ids=torch.arange(4))
            optimizer.step()
            recorder.log(loss=1.0)
    return explaind.open_run(path, model=net)


# ------------------------------------------------------------------ runs
NAMES = ("start.safetensors.unfinished", "manifest.json.unfinished", "start.safetensors", "writing.lock")


@ANY
@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_writes_through_nothing_that_was_planted(tmp_path, victim, plant, name):
    folder = tmp_path / "run"
    folder.mkdir()
    plant(folder / name, victim)
    if plant is hard and "lock" not in name:  # a file as a kill leaves it: it is replaced, and not written through
        assert len(record(folder).steps) == 2
    else:
        with pytest.raises(errors.StoreError, match="something"):
            record(folder)
    assert victim.read_bytes() == SECRET


@ANY
@pytest.mark.parametrize(
    "name", ["steps/000/000003.safetensors.unfinished", "closed.json.unfinished", "manifest.json.unfinished"]
)
def test_a_resumed_run_writes_through_nothing_that_was_planted(tmp_path, victim, plant, name):
    record(tmp_path / "run")
    plant(tmp_path / "run" / name, victim)
    run = record(tmp_path / "run", resume=True)
    assert len(run.steps) == 4
    assert run.check_files(progress=False) == ()
    assert victim.read_bytes() == SECRET
    assert not list(run.path.rglob("*.unfinished"))


@ANY
@pytest.mark.parametrize("name", ["metrics.jsonl", "writing.lock", "closed.json", "steps/000/000003.safetensors"])
def test_a_resumed_run_replaces_or_refuses_links_in_the_place_of_its_files(tmp_path, victim, plant, name):
    before, path = record(tmp_path / "run"), tmp_path / "run" / name
    if path.exists():
        victim.write_bytes(path.read_bytes())
        path.unlink()
    content = victim.read_bytes()
    plant(path, victim)
    if plant is hard and name in ("metrics.jsonl", "closed.json"):
        assert len(record(before.path, resume=True).steps) == 4
    else:
        with pytest.raises(errors.StoreError, match=path.name.split(".")[0]):
            record(before.path, resume=True)
    assert victim.read_bytes() == content


@pytest.mark.parametrize("name", ["steps", "steps/000", "snapshots", "batches"])
def test_a_folder_of_a_run_that_is_a_link_is_not_written_into(tmp_path, name):
    aside = tmp_path / "aside"
    aside.mkdir()
    store = RunStore(tmp_path / "run")
    store.begin()
    link = store.path / name
    link.parent.mkdir(parents=True)
    link.symlink_to(aside)
    path = {"snapshots": store.snapshot_path(1), "batches": store.batch_path("0" * 32)}.get(name, store.step_path(1))
    with pytest.raises(errors.StoreError, match=f"folder {link.name} is a symbolic link"):
        store.write_tensors(path, {}, {"a": torch.ones(1)})
    assert list(aside.iterdir()) == []
    link.unlink()
    store.write_tensors(path, {}, {"a": torch.ones(1)})  # without the link it is written


def test_a_run_that_is_itself_reached_by_a_link_is_written_and_read(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    assert len(record(tmp_path / "run").steps) == 2


def test_a_log_that_was_copied_by_hard_links_does_not_change_the_copy(tmp_path):
    record(tmp_path / "run")
    (tmp_path / "copy").hardlink_to(tmp_path / "run" / "metrics.jsonl")
    content = (tmp_path / "copy").read_bytes()
    run = record(tmp_path / "run", resume=True)
    assert run.metrics.sizes["step"] == 4
    assert (tmp_path / "copy").read_bytes() == content


def test_the_name_of_a_temporary_file_cannot_be_guessed(tmp_path, monkeypatch):
    names = set()
    opened = Path.open

    def noted(self, mode="r", *arguments, **options):
        if self.name.endswith(".unfinished"):
            assert mode == "xb"  # what is there is never opened
            names.add(self.name)
        return opened(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", noted)
    for _ in range(3):
        locations.replace(tmp_path / "a.json", [b"1"])
    assert len(names) == 3
    assert all(len(name) == len("a.json..unfinished") + 16 for name in names)
    with pytest.raises(FileExistsError):
        locations.write(tmp_path / "a.json", [b"2"])


# ------------------------------------------------------------------ locks
WORDS = LockWords("this is being written", "wait", "nothing was written")


@ANY
def test_a_lock_is_no_way_to_a_file_elsewhere(tmp_path, victim, plant):
    path = tmp_path / "a.lock"
    plant(path, victim)
    with pytest.raises(errors.StoreError, match="something else than a lock lies"):
        WritingLock(path, where=tmp_path, words=WORDS)
    assert victim.read_bytes() == SECRET
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    ("content", "ours"),
    [(b"", True), (b"process 12 on host\n", True), (b"process 12 on host", True), (b"process 12 on host\nmore", False),
     (b"version = 1\n", False), (b"\n", False), (b"process 12 on " + b"h" * 1009, True),
     (b"process 12 on " + b"h" * 1010, False)],
)  # fmt: skip
def test_only_what_a_lock_says_is_a_lock(tmp_path, content, ours):
    path = tmp_path / "a.lock"
    path.write_bytes(content)
    if ours:
        with WritingLock(path, where=tmp_path, words=WORDS):
            assert path.read_text().startswith(f"process {os.getpid()} on ")
        assert not path.exists()
    else:
        with pytest.raises(errors.StoreError, match="something else than a lock lies"):
            WritingLock(path, where=tmp_path, words=WORDS)
        assert path.read_bytes() == content


def test_the_lock_of_an_earlier_release_is_seen_and_left_alone(tmp_path):
    former = tmp_path / "result.zarr.lock"
    former.write_text("process 12 on host\n")
    with (
        filelock.FileLock(former),
        pytest.raises(
            errors.StoreError,
            match=r"another process is writing this result[\s\S]*result.zarr.lock is held by process 12",
        ),
    ):
        ask(tmp_path / "result.zarr")
    ask(tmp_path / "result.zarr")  # it was left behind
    assert former.read_text() == "process 12 on host\n"


# ------------------------------------------------------------------ checkpoints
def checkpoints(folder):
    folder.mkdir()
    for step in (1, 2, 3):
        save_file({n: t * step for n, t in model().state_dict().items()}, folder / f"step-{step}.safetensors")
    return folder


def attributed(path):
    return explaind.attribute_checkpoints(path, model(), torch.ones(1, 2), progress=False)


@pytest.mark.parametrize("plant", [symbolic, pipe, device])
def test_checkpoints_of_a_folder_are_its_own_plain_files(tmp_path, plant):
    folder = checkpoints(tmp_path / "checkpoints")
    assert attributed(folder).sizes["step"] == 2
    (folder / "step-2.safetensors").rename(tmp_path / "aside")
    plant(folder / "step-2.safetensors", tmp_path / "aside")
    with pytest.raises(errors.StoreError, match=r"cannot be read: it is (a symbolic link|no plain file)"):
        attributed(folder)


@pytest.mark.parametrize("plant", [pipe, device])
def test_checkpoints_that_are_named_may_be_links_to_plain_files_alone(tmp_path, plant):
    folder = checkpoints(tmp_path / "checkpoints")
    named = [folder / f"step-{step}.safetensors" for step in (1, 2, 3)]
    named[1].rename(tmp_path / "aside")
    symbolic(named[1], tmp_path / "aside")
    assert attributed(named).sizes["step"] == 2
    named[1].unlink()
    plant(named[1], tmp_path / "aside")
    with pytest.raises(errors.StoreError, match="cannot be read: it is no plain file"):
        attributed(named)


@pytest.mark.parametrize("plant", [symbolic, pipe, device])
@pytest.mark.parametrize("name", ["manifest.json", "checkpoints", "checkpoints/000001.safetensors"])
def test_a_store_of_checkpoints_is_read_from_its_own_files(tmp_path, plant, name):
    states = [{n: t * s for n, t in model().state_dict().items()} for s in (1, 2, 3)]
    store = explaind.import_checkpoints(tmp_path / "store", states, model(), progress=False)
    (store / name).rename(tmp_path / "aside")
    plant(store / name, tmp_path / "aside")
    with pytest.raises(errors.StoreError, match=r"symbolic link|no plain file|Not a directory"):
        attributed(store)


# ------------------------------------------------------------------ inputs, and folders for a while
@pytest.mark.parametrize("plant", [pipe, device])
def test_the_command_line_waits_for_no_pipe(tmp_path, plant):
    plant(tmp_path / "inputs", None)
    with pytest.raises(errors.QuestionError, match="the inputs cannot be read"):
        cli._inputs(tmp_path / "inputs")


def test_a_process_that_meets_pipes_everywhere_ends(tmp_path):
    """In a process of its own, where no timeout of the tests could interrupt a blocked open."""
    os.mkfifo(tmp_path / "pipe")
    said = (
        "import sys, explaind_core as e\n"
        "for ask in (e.open_run, e.open_result):\n"
        "    try:\n        ask(sys.argv[1])\n"
        "    except e.errors.ExplaindError as error:\n        print('refused')\n"
    )
    for target in (tmp_path / "pipe", tmp_path):
        os.mkfifo(tmp_path / "manifest.json") if target == tmp_path else None
        os.mkfifo(tmp_path / "zarr.json") if target == tmp_path else None
        done = subprocess.run(
            [sys.executable, "-c", said, str(target)], capture_output=True, text=True, timeout=50, check=False
        )
        assert done.stdout.split() == ["refused", "refused"], done.stderr


def test_a_planted_working_folder_leads_to_nobodys_file(tmp_path, monkeypatch, victim):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = tmp_path / "home"
    home.mkdir()
    (home / "in-use.lock").write_bytes(SECRET)
    (tmp_path / "explaind-tape-abcdefgh").symlink_to(home)  # a link to a folder of the user's
    for name, plant in (("aaaaaaaa", symbolic), ("bbbbbbbb", hard), ("cccccccc", pipe)):
        (tmp_path / f"explaind-tape-{name}").mkdir()
        plant(tmp_path / f"explaind-tape-{name}" / "in-use.lock", victim)
    (tmp_path / "explaind-notes").mkdir()
    (tmp_path / "explaind-notes" / "in-use.lock").write_bytes(b"")
    long_ago = time.time() - 3600
    for path in tmp_path.glob("*/in-use.lock"):
        os.utime(path, (long_ago, long_ago))
    with WorkingFolder("tape") as folder:
        folder.allocate("a", 8)
        with pytest.raises(errors.StoreError, match="File exists"):
            folder.allocate("a", 8)
    assert victim.read_bytes() == (home / "in-use.lock").read_bytes() == SECRET
    assert sum(p.name.startswith("explaind-") for p in tmp_path.iterdir()) == 5


# ------------------------------------------------------------------ the guards themselves
def test_appending_goes_to_plain_files_alone(tmp_path, victim):
    path = tmp_path / "log"
    assert not guarded.appended(path, 0, b"1")  # nothing is there
    path.write_bytes(b"12")
    assert guarded.appended(path, 1, b"3")
    assert path.read_bytes() == b"13"
    hard(tmp_path / "hard", victim)
    assert not guarded.appended(tmp_path / "hard", 0, b"1")
    for plant in (symbolic, pipe, device):
        path.unlink()
        plant(path, victim)
        with pytest.raises(guarded.NotPlainError):
            guarded.appended(path, 0, b"1")
        with pytest.raises(guarded.NotPlainError):
            guarded.overwrite_plain(path, b"1")
    with pytest.raises(guarded.NotPlainError, match="another name"):
        guarded.overwrite_plain(tmp_path / "hard", b"1")
    assert victim.read_bytes() == SECRET


def test_a_device_is_not_even_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    with pytest.raises(guarded.NotPlainError), guarded.opened_plain(Path("/dev/zero"), follow_links=True):
        pass
