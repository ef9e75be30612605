"""Writing a run: one writer, full disks at every write, folders that cannot be written. Finished steps are kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import explaind_core as explaind
from explaind_core import errors
from explaind_core.store import locations
from explaind_core.store.integrity import damages
from explaind_core.store.run_store import LOCK_NAME, RunStore
from support.interrupted_training import STEPS, Training, held


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    Training().record(path)
    return held(path)


# ------------------------------------------------------------------ two writers
def test_a_second_recorder_is_refused_until_the_first_is_closed(tmp_path):
    first, second = Training(), Training()
    recorder = explaind.Recorder(tmp_path / "run", first.model, first.optimizer, first.loss)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(errors.StoreError, match=r"already[\s\S]*(close\(\) that Recorder first|resume=True)"):
            second.record(tmp_path / "run", **options)
    assert len(explaind.open_run(tmp_path / "run").steps) == 0  # readers are not kept out
    recorder.close()
    second.record(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / LOCK_NAME).exists()


OTHER = """
import sys, time
from explaind_core.store.run_store import RunStore
store = RunStore(sys.argv[1])
store.lock()
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_its_lock_ends_with_it(tmp_path):
    Training().record(tmp_path / "run", until=2)
    other = subprocess.Popen([sys.executable, "-c", OTHER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(errors.StoreError, match=rf"being recorded already[\s\S]*process {other.pid} on "):
            Training().go_on(tmp_path / "run")
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    assert (tmp_path / "run" / LOCK_NAME).exists()  # left behind, and nobody's
    Training().go_on(tmp_path / "run")


def test_a_recorder_that_is_refused_lets_others_write(tmp_path):
    Training().record(tmp_path / "run", until=2)
    with pytest.raises(errors.RecordingError, match="does not stand where step 2") as kept:  # with its traceback
        Training().record(tmp_path / "run", resume=True)
    Training().go_on(tmp_path / "run")
    assert kept is not None


def test_an_error_in_the_loop_lets_others_write(tmp_path):
    training = Training()
    with pytest.raises(ZeroDivisionError), explaind.Recorder(tmp_path / "run", training.model, training.optimizer):
        raise ZeroDivisionError
    Training().record(tmp_path / "run", overwrite=True)


# ------------------------------------------------------------------ full disks
def _writes(monkeypatch, at):
    """Let the write number ``at`` fail half-way, and all later ones; returns how many there were."""
    count = [0]
    write, append = locations.write, locations.append

    def full():
        count[0] += 1
        return at is not None and count[0] > at

    def failing_write(path, parts):
        if full():
            path.write_bytes(bytes(parts[0])[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, parts)

    def failing_append(path, size, content):
        if full():
            append(path, size, content[:7])
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(path, size, content)

    monkeypatch.setattr(locations, "write", failing_write)
    monkeypatch.setattr("explaind_core.store.json_files.append", failing_append)
    return count


def test_whichever_write_finds_the_disk_full_the_run_goes_on(tmp_path, monkeypatch, whole):
    count = _writes(monkeypatch, None)
    Training().record(tmp_path / "counted")
    monkeypatch.undo()
    assert count[0] > 3 * STEPS
    for at in range(count[0]):
        path = tmp_path / str(at)
        _writes(monkeypatch, at)
        with pytest.raises(errors.StoreError, match=r"the disk is full[\s\S]*free some space; [\s\S]*are intact"):
            Training().record(path)
        monkeypatch.undo()
        reached = 0
        if (path / "manifest.json").exists():
            assert damages(RunStore(path)) == ()
            reached = len(explaind.open_run(path).steps)
            theta = [{n: t.tolist() for n, t in explaind.open_run(path).theta(s).items()} for s in range(reached + 1)]
            assert theta == whole[0][: reached + 1]
            Training().go_on(path)
        else:
            Training().record(path)
        theta, buffers, batches, logged = held(path)
        assert (theta, buffers, batches) == whole[:3]
        # A number that could not be logged is the loop's to log again.
        assert set(whole[3]) - set(logged) <= {reached}


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EFBIG, "written: File too"),
    ],
)
def test_what_is_larger_than_the_system_allows_is_no_full_disk(tmp_path, monkeypatch, number, said):
    def write(path, parts):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locations, "write", write)
    with pytest.raises(errors.StoreError, match=rf"{said}[\s\S]*{'ulimit' if number == errno.EFBIG else 'free some'}"):
        Training().record(tmp_path / "run")


def test_behind_a_step_that_could_not_be_recorded_no_other_one_is(tmp_path):
    training = Training()
    recorder = explaind.Recorder(tmp_path / "run", training.model, training.optimizer, training.loss)

    def step(lr):
        training.optimizer.param_groups[0]["lr"] = lr
        training.optimizer.zero_grad()
        training.loss(training.model(training.inputs[0]), training.targets[0]).backward()
        recorder.batch(training.inputs[0], training.targets[0], ids=range(6))
        training.optimizer.step()

    step(0.01)
    with pytest.raises(errors.NonFiniteError):
        step(float("inf"))
    training.model.load_state_dict({n: t.nan_to_num() for n, t in training.model.state_dict().items()})
    with pytest.raises(errors.RecordingError, match=r"recording has ended[\s\S]*NaN or infinite[\s\S]*resume=True"):
        step(0.01)
    recorder.close()
    assert len(explaind.open_run(tmp_path / "run").steps) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 KiB, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk, whole):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(140 << 10))
    with pytest.raises(errors.StoreError, match=r"the disk is full"):
        Training().record(small_disk / "run")
    ballast.unlink()
    Training().go_on(small_disk / "run")
    assert held(small_disk / "run")[:3] == whole[:3]


def test_a_disk_that_can_only_be_read(small_disk):
    Training().record(small_disk / "run", until=2)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for attempt in (lambda: Training().go_on(small_disk / "run"), lambda: Training().record(small_disk / "new")):
        with pytest.raises(errors.StoreError, match=r"cannot be written: Read-only file system[\s\S]*permissions"):
            attempt()
    assert explaind.open_run(small_disk / "run").complete
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(errors.StoreError, match=r"cannot be written: Permission denied"):
        Training().record(Path(tmp_path) / "run")
