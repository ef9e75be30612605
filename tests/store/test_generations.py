"""Readers of a run that is recorded anew meanwhile, and files of copies that went on apart: told, not mixed."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.errors import StoreError
from explaind_core.store.generations import GENERATIONS_NAME, Generations
from explaind_core.store.integrity import damages
from explaind_core.store.run_store import RunStore
from support.interrupted_training import STEPS, Training, held

OTHER = "another continuation of the run"


def go_back(path, k, *, lr=0.05, until=STEPS):
    training = Training()
    explaind.open_run(path).restore(training.model, training.optimizer, k)
    training.optimizer.param_groups[0]["lr"] = lr
    training.record(path, resume=k, until=until)


@pytest.fixture
def path(tmp_path):
    Training().record(tmp_path / "run")
    return tmp_path / "run"


def test_a_run_in_one_go_has_no_generations(path):
    assert not (path / GENERATIONS_NAME).exists()
    assert b"generation" not in (path / "steps/000/000001.safetensors").read_bytes()


def test_whoever_has_the_run_open_is_told_that_it_was_recorded_anew(path):
    run = explaind.open_run(path, model=Training().model)
    run.hyper(4)  # a header that is kept
    go_back(path, 2)
    assert run.theta(2).keys()  # what was not recorded anew is the same
    for asked in (run.theta, run.gradients, run.batch, run.groups):
        with pytest.raises(StoreError, match=rf"step 4 belongs to {OTHER}[\s\S]*open the run again"):
            asked(4) if asked != run.groups else run._read_header(4)
    with pytest.raises(StoreError, match=rf"a line of metrics.jsonl belongs to {OTHER}"):
        _ = run.metrics
    with pytest.raises(StoreError, match=rf"snapshot after step 4 belongs to {OTHER}|state after step 4 belongs"):
        run.optimizer_state(4)
    again = explaind.open_run(path, model=Training().model)
    assert again.hyper(4)[0]["lr"] == 0.05
    assert explaind.verify(again, Training().inputs[0], nodes=2, progress=False).update_error < 1e-13
    assert again.check_files(progress=False) == ()


@pytest.mark.parametrize("name", ["steps/000/000004.safetensors", "snapshots/000004.safetensors", "closed.json"])
@pytest.mark.parametrize("continued", ["the copy", "the run", "both"])
def test_a_file_of_a_copy_that_was_continued_apart_is_refused(path, tmp_path, name, continued):
    shutil.copytree(path, tmp_path / "copy")
    if continued != "the run":
        go_back(tmp_path / "copy", 3)
    if continued != "the copy":
        go_back(path, 3)
    shutil.copy(tmp_path / "copy" / name, path / name)
    assert [OTHER in error.what for error in damages(RunStore(path))] == [True]
    with pytest.raises(StoreError, match=OTHER):
        explaind.open_run(path).optimizer_state(4)


def test_the_log_of_a_copy_is_refused(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy")
    go_back(tmp_path / "copy", 3)
    shutil.copy(tmp_path / "copy" / "metrics.jsonl", path / "metrics.jsonl")
    with pytest.raises(StoreError, match=OTHER):
        _ = explaind.open_run(path).metrics


def test_numbers_of_steps_that_were_recorded_anew_are_forgotten(path):
    training = Training()
    explaind.open_run(path).restore(training.model, training.optimizer, 2)
    recorder = explaind.Recorder(path, training.model, training.optimizer, training.loss, resume=2)
    with recorder:
        recorder.log(other=1.0)
    found = explaind.open_run(path).metrics
    assert found.step.values.tolist() == [1, 2]
    assert found.step_number.values.tolist() == [1.0, 2.0]
    assert found.other.values.tolist()[1:] == [1.0]


def test_what_lists_the_generations_has_a_copy(path):
    go_back(path, 3)
    go_back(path, 4)
    before = held(path)
    for content in (b"", b"{}", None):
        if content is None:
            (path / GENERATIONS_NAME).unlink()
        else:
            (path / GENERATIONS_NAME).write_bytes(content)
        with pytest.raises(StoreError, match=r"generations.json is damaged|another continuation"):
            explaind.open_run(path)
        opened = explaind.open_run(path, damaged=True)
        theta = [{n: t.tolist() for n, t in opened.theta(s).items()} for s in (0, *opened.steps)]
        assert theta == before[0]
        assert len(opened.store.generations.begun) == 2


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 6), max_size=5))
def test_a_step_belongs_to_whoever_recorded_it_last(after):
    owner, kept, generations = {}, {("", s) for s in range(7)}, Generations()
    owner = dict.fromkeys(range(1, 7), "")
    for number, k in enumerate(after):
        generations = generations.going_on(k, name=str(number))
        kept = {(name, s) for name, s in kept if s <= k} | {(str(number), s) for s in range(7)}
        owner |= dict.fromkeys(range(k + 1, 7), str(number))
    assert {s: generations.of_step(s) for s in owner} == owner
    assert Generations.stored(list(generations.begun)) == generations
    names = ["", *map(str, range(len(after)))]
    assert {(n, s) for n in names for s in range(7) if generations.holds(n, s)} == kept


@settings(deadline=None, max_examples=8, phases=[Phase.generate])
@given(back=st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=3))
def test_going_back_any_number_of_times(tmp_path_factory, back):
    path = tmp_path_factory.mktemp("run") / "run"
    Training().record(path)
    for k in back:
        go_back(path, k, lr=0.01)
    assert damages(RunStore(path)) == ()
    once = tmp_path_factory.mktemp("once") / "run"
    Training().record(once)
    assert held(path) == held(once)


def test_no_generation_of_that_name():
    with pytest.raises(LookupError):
        Generations().holds("b", 1)
    with pytest.raises(ValueError, match="name is 3"):
        Generations.stored([{"name": 3, "after": 1}])
