"""Modes that store less, interrupted: runs that end anywhere, are restored and go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import explaind_core as explaind
from explaind_core import errors
from support.mode_loops import MODES, PLAIN, read_all, reading, recorded
from support.mode_trainings import TRAININGS, Training, cnn, mlp, record, steps


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


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
