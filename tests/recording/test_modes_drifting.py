"""Modes that store less, when read: a run that does not come out as it was recorded is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.run.run import Run
from explaind_core.training_step.environment import environment
from support.mode_loops import MODES, PLAIN, Loop, half, read_all, reading, recorded
from support.mode_trainings import Training, cnn, mlp


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


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
