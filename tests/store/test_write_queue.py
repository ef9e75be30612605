"""Steps are written behind the loop's back: in order, a few at a time, without gaps, and no error is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.store.run_store import RunStore
from explaind_core.store.write_queue import WriteQueue
from support.written_behind import WAITING, Loop, X, Y

#: Steps that may wait for the one that is being written.


def test_at_most_two_steps_wait_while_one_is_written():
    queue, going, made = WriteQueue("nowhere", WAITING), threading.Event(), []
    for k in range(WAITING + 1):
        queue.put(lambda k=k: (going.wait(10), made.append(k)))
    late = threading.Thread(target=lambda: queue.put(lambda: made.append("late")))
    late.start()
    late.join(0.2)
    assert late.is_alive()
    assert made == []
    going.set()
    late.join(10)
    queue.close()
    assert made == [0, 1, 2, "late"]


def test_after_an_error_nothing_is_written_and_every_call_raises_it():
    queue, made = WriteQueue("nowhere", WAITING), []

    def fail():
        raise errors.StoreError("the disk is full")

    queue.put(fail)
    for call in (queue.flush, lambda: queue.put(lambda: made.append(1)), queue.check, queue.close):
        with pytest.raises(errors.StoreError, match="disk is full"):
            call()
    assert made == []


def test_small_writes_are_run_at_once_unless_others_wait():
    queue, going, made = WriteQueue("nowhere", WAITING), threading.Event(), []
    queue.put(lambda: made.append(threading.current_thread() is threading.main_thread()), 1)
    assert made == [True]
    queue.put(lambda: (going.wait(10), made.append("large")))
    queue.put(lambda: made.append("small"), 1)
    assert made == [True]
    going.set()
    queue.close()
    assert made == [True, "large", "small"]


def test_a_small_write_that_fails_stops_those_behind_it():
    queue, made = WriteQueue("nowhere", WAITING), []
    with pytest.raises(ZeroDivisionError):
        queue.put(lambda: 1 / 0, 1)
    with pytest.raises(ZeroDivisionError):
        queue.put(lambda: made.append(1), 1)
    assert made == []


def slowly(monkeypatch):
    monkeypatch.setattr("explaind_core.store.write_queue.SMALL", 0)
    write = RunStore.write_tensors

    def slow(self, path, header, tensors):
        if "steps" in path.parts:
            time.sleep(0.05)
        return write(self, path, header, tensors)

    monkeypatch.setattr(RunStore, "write_tensors", slow)


def test_what_is_queued_is_seen_by_who_opens_the_run_here(tmp_path, monkeypatch):
    slowly(monkeypatch)
    loop = Loop(tmp_path / "run")
    for s in range(1, 6):
        loop.step()
        run = explaind.open_run(tmp_path / "run")
        assert len(run.steps) == s
        assert torch.equal(run.theta(s)["weight"], loop.model.weight)
    for _ in range(4):
        loop.step()
    loop.recorder.close()
    assert explaind.open_run(tmp_path / "run").snapshots() == [0, 2, 4, 6, 8]


def test_snapshots_hold_the_state_of_their_own_step(tmp_path, monkeypatch):
    slowly(monkeypatch)
    loop = Loop(tmp_path / "run")
    loop.optimizer.param_groups[0]["momentum"] = 0.9
    states = {}
    for s in range(1, 7):
        loop.step()
        states[s] = loop.optimizer.state[loop.model.weight]["momentum_buffer"].clone()
    loop.recorder.close()
    run = explaind.open_run(tmp_path / "run")
    for s in (2, 4, 6):
        assert torch.equal(run.optimizer_state(s)["weight"]["momentum_buffer"], states[s])


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from support import written_behind
from explaind_core.store import RunStore
write = RunStore.write_tensors
def slow(self, path, header, tensors):
    time.sleep(0.1 if "steps" in path.parts else 0)
    return write(self, path, header, tensors)
RunStore.write_tensors = slow
import explaind_core.store.write_queue
explaind_core.store.write_queue.SMALL = 0
loop = written_behind.Loop({path!r})
for _ in range(6):
    loop.step()
if {kill}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kill", [True, False])
def test_a_killed_process_leaves_no_gap_and_one_that_ends_leaves_all(tmp_path, kill):
    from pathlib import Path

    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), path=str(tmp_path / "run"), kill=kill)
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert (done.returncode == 0) != kill
    steps = explaind.open_run(tmp_path / "run").steps
    assert 6 - WAITING - 1 <= len(steps) <= 6
    assert kill or len(steps) == 6


def test_by_default_every_step_is_written_when_it_is_over(tmp_path, monkeypatch):
    """Large ones, too: a killed process loses none."""
    monkeypatch.setattr("explaind_core.store.write_queue.SMALL", 0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = explaind.Recorder(tmp_path / "run", model, optimizer, nn.MSELoss())
    writers, write = set(), RunStore.write_tensors

    def seen(self, path, *arguments):
        writers.add(threading.current_thread())
        write(self, path, *arguments)

    monkeypatch.setattr(RunStore, "write_tensors", seen)
    for s in range(1, 4):
        nn.functional.mse_loss(model(X), Y).backward()
        recorder.batch(X, Y, ids=range(4))
        optimizer.step()
        assert RunStore(tmp_path / "run").step_path(s).exists()
    assert writers == {threading.current_thread()}
    recorder.close()
