"""Losses of power: what is promised is there, the rest is named, and recording goes on whatever is left."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.errors import QuestionError, RecordingError, StoreError
from explaind_core.store.integrity import damages
from explaind_core.store.run_store import RunStore
from explaind_core.testing import record_example
from support.interrupted_training import STEPS, Interrupted, Training, held
from support.power import Power

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what a descriptor is of")
INPUTS = torch.ones(2, 4, dtype=torch.float64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    Training().record(path)
    return held(path)


def go_on(path, **options):
    """As an unattended loop does; returns behind which step."""
    training = Training()
    run = explaind.open_run(path, model=training.model, until="intact")
    first = run.restore(training.model, training.optimizer)
    training.record(path, resume=first, **options)
    return first


def interrupt(record, *args, **options):
    with pytest.raises(Interrupted):
        record(*args, interrupted=True, **options)


@settings(deadline=None, max_examples=25, derandomize=True, phases=[Phase.generate])
@given(
    data=st.data(),
    durable=st.sampled_from(["steps", "snapshots", "close"]),
    reached=st.integers(0, STEPS),
    resumed=st.sampled_from([None, 1, 2]),
    behind=st.sampled_from([0, 2]),
)
def test_what_is_promised_is_there(tmp_path_factory, whole, data, durable, reached, resumed, behind):
    path = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        power = Power(patch)
        options = {"durable": durable, "write_behind": behind}
        if resumed is None:
            interrupt(Training().record, path, until=reached, **options)
        else:
            interrupt(Training().record, path, until=resumed, **options)
            interrupt(go_on, path, until=max(reached, resumed), **options)
            reached = max(reached, resumed)
        lost = power.fail(path, data.draw)
    promised = {"steps": reached, "snapshots": reached // 2 * 2, "close": 0}[durable]
    promised = max(promised, resumed or 0)
    run = explaind.open_run(path, until="intact")
    assert len(run.steps) >= promised
    if not lost:
        assert len(run.steps) == reached
    if len(run.steps) < len(run.store.found_steps()):
        assert run.first_damage is not None
        with pytest.raises(StoreError, match=r"missing|truncated"):
            explaind.open_run(path).batch(len(run.steps) + 1)
    first = go_on(path)
    assert damages(RunStore(path)) == ()
    theta, buffers, batches, logged = held(path)
    assert (theta, buffers, batches) == whole[:3]
    told = explaind.open_run(path).metrics.attrs.get("lost_lines", 0)
    missing = [s for s in range(1, first) if s not in logged]  # that of the last step may not have been logged yet
    assert told >= len(missing)


def test_the_default_is_cheap_and_steps_are_there_at_once(tmp_path, monkeypatch):
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), original(descriptor)))

    def count(durable, until):
        synced.clear()
        interrupt(Training().record, tmp_path / f"{durable}{until}", until=until, durable=durable)
        return len(synced)

    assert count("close", 1) == count("close", 5)
    none, two, three = (count("snapshots", s) for s in (1, 2, 3))
    assert none < two == three
    one, two, three = (count("steps", s) for s in (1, 2, 3))
    assert none < one < two < three


def test_an_unknown_promise_is_refused(tmp_path):
    with pytest.raises(RecordingError, match=r"loss of power[\s\S]*'steps', 'snapshots', 'close'[\s\S]*always"):
        Training().record(tmp_path / "run", durable="always")
    assert not (tmp_path / "run").exists()


def test_until_is_a_step_or_intact():
    run = record_example(steps=1)
    with pytest.raises(QuestionError, match=r"until which step[\s\S]*'intact'[\s\S]*whole"):
        explaind.open_run(run.path, until="whole")


# ------------------------------------------------------------------ single files, as no promise leaves them
@pytest.mark.parametrize("name", ["manifest.json", "closed.json", "generations.json", "metrics.jsonl", "batch"])
@pytest.mark.parametrize("cut", [0, 0.5])
def test_no_small_file_keeps_a_run_from_going_on(tmp_path, whole, name, cut):
    path = tmp_path / "run"
    Training().record(path, until=2)
    Training().go_on(path)
    store = RunStore(path)
    file = store.found_batches()[0] if name == "batch" else path / name
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content))])
    first = go_on(path)
    assert (first < STEPS) == (name == "batch")
    assert damages(RunStore(path)) == ()
    assert held(path)[:3] == whole[:3]
    told = explaind.open_run(path).metrics.attrs.get("lost_lines", 0)
    assert told + len(held(path)[3]) >= STEPS - 1


def test_a_log_that_is_damaged_in_the_middle_is_kept_beside_what_is_intact(tmp_path):
    path = tmp_path / "run"
    Training().record(path)
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:2], bytes(len(lines[2]) - 1) + b"\n", *lines[3:]])
    (path / "metrics.jsonl").write_bytes(content)
    go_on(path)
    found = explaind.open_run(path).metrics
    assert (found.step.values.tolist(), found.attrs) == ([1, 2], {"lost_lines": 2})
    assert (path / "metrics.jsonl.damaged").read_bytes() == content


def test_a_snapshot_that_was_never_synced_is_passed_over(tmp_path):
    path = tmp_path / "run"
    interrupt(Training().record, path, until=4)
    RunStore(path).snapshot_path(4).write_bytes(b"")
    assert explaind.open_run(path).snapshots() == [0, 2]
    assert [error.what for error in explaind.open_run(path).check_files(progress=False)]
    go_on(path)
    RunStore(path).snapshot_path(4).write_bytes(b"")  # recording went on from there
    (path / "closed.json").unlink()
    assert explaind.open_run(path).snapshots() == [0, 2, 4]
    with pytest.raises(StoreError, match="truncated"):
        explaind.open_run(path).optimizer_state(4)


# ------------------------------------------------------------------ results
@settings(deadline=None, max_examples=8, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_blocks_of_a_result_that_count_are_there(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("result")
    run = record_example(steps=3)
    ask = {"keep": ("step", "test"), "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        power = Power(patch)
        expected = explaind.attribute(run, INPUTS, out=folder / "result.zarr", **ask).load()
        power.fail(folder / "result.zarr", data.draw)
    assert explaind.open_result(folder / "result.zarr").load().identical(expected)
    assert explaind.attribute(run, INPUTS, out=folder / "result.zarr", **ask).load().identical(expected)
