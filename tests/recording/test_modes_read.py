"""Modes that store less, when they are read: drift is found, runs that were interrupted go on, little is kept."""

from __future__ import annotations

import copy
import gc
import json
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.run.recompute import Recomputation
from explaind_core.run.run import Run
from explaind_core.training_step.environment import environment
from support.mode_trainings import MODES, PLAIN, TRAININGS, Loop, Training, cnn, half, mlp, record, steps


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


# ------------------------------------------------------------------ when read
def recorded(path, mode, training=PLAIN, count=4, k=3):
    record(training, path, count, mode=mode, snapshot_every=k)
    return path


def reading(path, training=PLAIN, **options):
    return explaind.open_run(path, **{"model": training.make(), "loss": training.loss, **options})


def read_all(run):
    for s in run.steps:
        run.theta(s)
        run.gradients(s)


def test_the_model_and_the_loss_are_needed(tmp_path, mode):
    training = Training(loss=lambda a, b: nn.functional.cross_entropy(a, b))
    path = recorded(tmp_path / "run", mode, training)
    assert explaind.open_run(path).hyper(1)[0]["lr"] == 0.01
    assert len(explaind.open_run(path).sample_ids(2)) == 4
    with pytest.raises(errors.QuestionError, match=r"takes the model[\s\S]*model=model"):
        explaind.open_run(path).gradients(1)
    with pytest.raises(errors.QuestionError, match=r"takes the loss[\s\S]*<lambda>[\s\S]*loss=loss"):
        explaind.open_run(path, model=mlp()).gradients(1)


DRIFTED = r"computed again, step \d does not come out[\s\S]*the same bits[\s\S]*mode='steps'"


def test_another_loss_is_drift(tmp_path, mode):
    path = recorded(tmp_path / "run", mode)
    with pytest.raises(errors.StoreError, match=DRIFTED):
        read_all(reading(path, loss=nn.CrossEntropyLoss(label_smoothing=1e-4)))


def test_another_model_of_the_same_parameters_is_drift(tmp_path, mode):
    path = recorded(tmp_path / "run", mode)
    with pytest.raises(errors.StoreError, match=DRIFTED):
        read_all(reading(path, model=nn.Sequential(nn.Linear(5, 8), nn.GELU("tanh"), nn.Linear(8, 3))))


def test_another_batch_is_drift(tmp_path, mode, monkeypatch):
    path = recorded(tmp_path / "run", mode)
    original = Run.batch

    def tampered(run, s):
        batch = original(run, s)
        if s == 3:
            batch.micro[0].inputs[1, 2] += 1e-3
        return batch

    monkeypatch.setattr(Run, "batch", tampered)
    with pytest.raises(errors.StoreError, match=r"step 3 does not"):
        read_all(reading(path))


def test_one_bit_of_a_snapshot_is_drift(tmp_path, mode, monkeypatch):
    """Of theta_3, or of the optimizer's state then: step 4 starts from there."""
    path = recorded(tmp_path / "run", mode)
    flipped = {"parameters": "theta", "snapshots": "optimizer_state"}[mode]
    for name in {flipped, "theta"}:
        with monkeypatch.context() as patch:
            original = getattr(Run, name)

            def tampered(run, s=0, original=original, **options):
                found = original(run, s, **options)
                if s == 3:
                    tensor = next(iter(found.values()))
                    tensor = tensor["exp_avg"] if isinstance(tensor, dict) else tensor
                    tensor.view(torch.int32)[0, 0] ^= 1 << 16  # the last bits may be rounded away
                return found

            patch.setattr(Run, name, tampered)
            with pytest.raises(errors.StoreError, match="step 4 does not"):
                reading(path).gradients(4)


@pytest.mark.parametrize("key", ["theta_hash", "buffer_hash", "gradient_hash"])
def test_one_bit_of_a_hash_is_drift(tmp_path, key, monkeypatch):
    path = recorded(tmp_path / "run", "parameters" if key == "gradient_hash" else "snapshots", Training(model=cnn))
    original = Run._read_header

    def tampered(run, s):
        header = copy.deepcopy(original(run, s))
        header[key] = f"{int(header[key], 16) ^ (s == 2):032x}"
        return header

    monkeypatch.setattr(Run, "_read_header", tampered)
    what = {"theta_hash": "parameters", "buffer_hash": "buffers", "gradient_hash": "gradient"}[key]
    with pytest.raises(errors.StoreError, match=rf"step 2 does not[\s\S]*its {what}"):
        read_all(reading(path, Training(model=cnn)))


def test_an_undeclared_change_that_no_check_saw_is_found_when_the_run_is_read(tmp_path, mode):
    loop = Loop(tmp_path / "run", mode)
    for s in range(4):
        loop.step(after=half if s == 2 else lambda _: None)
    run = explaind.open_run(tmp_path / "run", model=mlp())
    with pytest.raises(errors.StoreError, match="step 3 does not"):
        read_all(run)
    assert len(explaind.open_run(tmp_path / "run", model=mlp(), until=2).gradients(2)) == 4


def test_versions_then_and_now_are_named(tmp_path, mode, monkeypatch):
    path = recorded(tmp_path / "run", mode)
    original = environment
    monkeypatch.setattr("explaind_core.run.recompute.environment", lambda d: original(d) | {"torch": "9.9"})
    with pytest.raises(errors.StoreError, match=rf"torch {torch.__version__.split('+')[0]}\S* then and 9.9 now"):
        read_all(reading(path, loss=nn.CrossEntropyLoss(label_smoothing=0.1)))


def test_threads_are_set_to_what_they_were(tmp_path, mode):
    present = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        path = recorded(tmp_path / "run", mode, Training(model=lambda: nn.Sequential(nn.Linear(5, 3))))
    finally:
        torch.set_num_threads(present)
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return super().forward(x)

    read_all(explaind.open_run(path, model=nn.Sequential(Spy(5, 3)), loss=PLAIN.loss))
    assert set(seen) == {2}
    assert torch.get_num_threads() == present


# ------------------------------------------------------------------ interruptions
def test_until_between_snapshots_and_a_killed_run(tmp_path, mode):
    reference = record(PLAIN, tmp_path / "steps", 7)
    path = recorded(tmp_path / "run", mode, count=7)
    for until in (1, 3, 4, 6):
        run = reading(path, until=until)
        assert len(run.steps) == until
        assert torch.equal(run.theta(until)["0.weight"], reference.theta(until)["0.weight"])
        assert torch.equal(run.gradients(until)["0.weight"], reference.gradients(until)["0.weight"])
    (path / "closed.json").unlink()
    (path / "steps/000/000007.safetensors").unlink()
    (path / "snapshots/000006.safetensors").unlink()  # killed between a step and its snapshot
    run = reading(path)
    assert len(run.steps) == 6
    assert torch.equal(run.theta(6)["0.weight"], reference.theta(6)["0.weight"])


@pytest.mark.parametrize("name", ["mlp AdamW one-cycle", "cnn SGD ragged", "transformer dropout clipped"])
def test_restored_and_resumed(tmp_path, mode, name):
    training = replace(TRAININGS[name], scheduler=None)
    reference = record(training, tmp_path / "steps", 8)
    path = recorded(tmp_path / "run", mode, training, count=5)
    model = training.make()
    optimizer = training.optimizer(model.parameters())
    run = reading(path, training)
    assert run.restore(model, optimizer) == 5
    with explaind.Recorder(path, model, optimizer, training.loss, mode=mode, snapshot_every=3, resume=True) as recorder:
        steps(training, recorder, model, optimizer, range(6, 9))
    run = reading(path, training)
    for s in reversed(run.steps):
        for found in ("theta", "buffers", "gradients"):
            a, b = getattr(run, found)(s), getattr(reference, found)(s)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[n], b[n]) for n in a)


def test_resuming_elsewhere_or_in_another_mode_is_refused(tmp_path, mode):
    path = recorded(tmp_path / "run", mode)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(errors.RecordingError, match="does not stand where step 4"):
        explaind.Recorder(path, model, optimizer, PLAIN.loss, mode=mode, resume=True)
    with pytest.raises(errors.RecordingError, match=rf"another mode[\s\S]*mode='{mode}'"):
        explaind.Recorder(path, model, optimizer, PLAIN.loss, resume=True)


def test_buffers_that_change_between_steps_are_kept(tmp_path, mode):
    training = Training(model=cnn)
    model = training.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, loss = training.x, training.y, training.loss
    left = []
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, mode=mode, snapshot_every=3) as recorder:
        for _ in range(5):
            with torch.no_grad():
                model(x + 1)  # statistics move, in training mode
            model[2].eval()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            recorder.batch(x, y, ids=range(12))
            optimizer.step()
            model.train()
            left.append(model[2].running_mean.clone())
    run = reading(tmp_path / "run", training)
    read_all(run)
    assert torch.equal(run.buffers(5)["2.running_mean"], left[4])
    assert run.buffers_before(3).keys() >= {"2.running_mean"}


# ------------------------------------------------------------------ what is kept, and where
def stretches(folder):
    return [p for p in folder.iterdir() if p.name.startswith("explaind-steps-")]


def test_at_most_two_stretches_are_kept_and_each_walk_computes_each_once(tmp_path, monkeypatch):
    path = recorded(tmp_path / "run", "snapshots", count=9)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    computed = []
    original = Recomputation._run_again
    monkeypatch.setattr(
        Recomputation, "_run_again", lambda self, start: computed.append(start) or original(self, start)
    )
    run = reading(path)
    for s in [*run.steps, *reversed(run.steps)]:
        run.theta(s)
        run.gradients(s)
        assert len(stretches(tmp_path / "temporary")) <= 2
    assert computed == [0, 3, 6, 0]
    run.close()
    assert not stretches(tmp_path / "temporary")
    run.gradients(2)
    assert stretches(tmp_path / "temporary")
    del run
    gc.collect()
    assert not stretches(tmp_path / "temporary")


def test_only_snapshots_hold_parameters(tmp_path):
    training = Training(model=lambda: nn.Sequential(nn.Linear(5, 400), nn.GELU(), nn.Linear(400, 3)))
    sizes = {}
    for mode in ("steps", *MODES):
        path = recorded(tmp_path / mode, mode, training, count=7)
        sizes[mode] = sum(os.path.getsize(p) for p in path.glob("steps/*/*")) / 7 / (4 * 3603)
    assert 1.9 < sizes["steps"] < 2.6
    assert 0.9 < sizes["parameters"] < 1.5
    assert sizes["snapshots"] < 0.3
    assert json.loads((path / "manifest.json").read_text())["mode"] == "snapshots"
