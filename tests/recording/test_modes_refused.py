"""Modes that store less, where something goes wrong: loops that do more than they declare, runs that drift."""

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
from explaind_core.recording.early_check import EarlyCheck
from explaind_core.run.recompute import Recomputation
from explaind_core.run.run import Run
from explaind_core.training_step.environment import environment
from support.mode_trainings import TRAININGS, Training, cnn, mlp, record, steps

MODES = ["parameters", "snapshots"]
PLAIN = Training()


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


class Loop:
    """One step at a time, with a place for what a loop does beside what it declares."""

    def __init__(self, path, mode, model=None, loss=None, **options):
        self.training = Training(model=(lambda: model) if model else mlp)
        self.model = self.training.make()
        self.loss = loss or nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.recorder = explaind.Recorder(path, self.model, self.optimizer, self.loss, mode=mode, **options)
        self.x, self.y = self.training.x, self.training.y

    def step(self, *, more=lambda _: 0.0, x=None, after=lambda _: None, **declared):
        self.optimizer.zero_grad()
        (self.loss(self.model(self.x if x is None else x), self.y) + more(self.model)).backward()
        self.recorder.batch(self.x, self.y, ids=range(12), **declared)
        after(self.model)
        self.optimizer.step()


# ------------------------------------------------------------------ while recording
def noise(model):
    for p in model.parameters():
        p.grad.add_(0.01 * torch.randn_like(p))


def half(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"more": lambda m: 1e-2 * sum((p**2).sum() for p in m.parameters())}, "add something to the loss"),
        ({"after": noise}, "add something to the loss"),
        ({"after": half}, r"multiplied the gradient by 0\.5"),
        ({"weight": 0.25}, r"multiplied the gradient by 4"),
        ({"after": lambda m: m[0].weight.grad.mul_(1 + 2**-22)}, "as small as rounding"),
    ],
)
def test_a_loop_that_does_more_than_it_declares_is_refused_before_its_first_step(tmp_path, mode, what, message):
    loop = Loop(tmp_path / "run", mode)
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(errors.RecordingError, match=rf"computed again[\s\S]*step 1[\s\S]*{message}[\s\S]*mode='steps'"):
        loop.step(**what)
    assert all(torch.equal(before[n], t) for n, t in loop.model.state_dict().items())
    assert loop.recorder.steps == 0


def test_other_inputs_than_those_declared_are_found(tmp_path, mode):
    loop = Loop(tmp_path / "run", mode)
    with pytest.raises(errors.RecordingError, match="computed again"):
        loop.step(x=loop.x + 1)


def test_what_begins_later_is_found_at_a_power_of_two(tmp_path, mode):
    loop = Loop(tmp_path / "run", mode)
    for _ in range(3):
        loop.step()
    with pytest.raises(errors.RecordingError, match="step 4"):
        loop.step(after=half)


def test_the_check_is_rare_and_comes_first():
    check = EarlyCheck(None, "snapshots", None, None)
    assert check.due(77)
    check._checked = True
    assert [s for s in range(1, 3001) if check.due(s)] == [*(2**k for k in range(10)), 1000, 1024, 2000, 2048, 3000]


def test_gradient_records_a_loop_of_another_kind(tmp_path, mode):
    def gradient(model, micro):
        value = nn.functional.cross_entropy(model(micro.inputs), micro.targets)
        (value + 1e-2 * sum((p**2).sum() for p in model.parameters())).backward()

    loop = Loop(tmp_path / "run", mode, gradient=gradient, snapshot_every=2)
    for _ in range(3):
        loop.step(more=lambda m: 1e-2 * sum((p**2).sum() for p in m.parameters()))
    run = explaind.open_run(tmp_path / "run", model=mlp(), gradient=gradient)
    assert torch.equal(run.theta(3)["0.weight"], loop.model[0].weight)
    assert run.gradients(3).keys() == run.parameters.keys()
    with pytest.raises(errors.StoreError, match="computed again"):
        explaind.open_run(tmp_path / "run", model=mlp()).gradients(1)


def test_what_no_mode_but_steps_can_record_is_refused_by_name(tmp_path, mode):
    model = mlp()
    options = {"mode": mode, "loss": nn.MSELoss()}
    with pytest.raises(errors.RecordingError, match="LBFGS iterates inside a step"):
        explaind.Recorder(tmp_path / "a", model, torch.optim.LBFGS(model.parameters()), **options)
    sparse = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 1))
    with pytest.raises(errors.RecordingError, match=r"sparse gradients[\s\S]*'0'"):
        explaind.Recorder(tmp_path / "b", sparse, torch.optim.SGD(sparse.parameters(), lr=1.0), **options)
    with pytest.raises(errors.RecordingError, match="takes the loss"):
        explaind.Recorder(tmp_path / "c", model, torch.optim.SGD(model.parameters(), lr=1.0), mode=mode)
    with pytest.raises(errors.RecordingError, match="no such mode"):
        explaind.Recorder(tmp_path / "d", model, torch.optim.SGD(model.parameters(), lr=1.0), mode="sometimes")
    assert not list(tmp_path.iterdir())
    loop = Loop(tmp_path / "e", mode)
    with pytest.raises(errors.RecordingError, match="how the gradient was rounded"):
        loop.recorder.gradient_factor(0.3)


def test_a_model_that_is_not_called_cannot_be_computed_again(tmp_path, mode):
    loop = Loop(tmp_path / "run", mode)
    loop.loss(nn.functional.linear(nn.functional.gelu(loop.model[0](loop.x)), loop.model[2].weight), loop.y).backward()
    loop.recorder.batch(loop.x, loop.y, ids=range(12))
    with pytest.raises(errors.RecordingError, match=r"was not called[\s\S]*gradient="):
        loop.optimizer.step()


def test_a_changed_parameter_is_found_by_hash(tmp_path, mode):
    loop = Loop(tmp_path / "run", mode)
    loop.step()
    with torch.no_grad():
        loop.model[0].weight[0, 0] *= 1 + 2**-22
    with pytest.raises(errors.RecordingError, match=r"changed outside optimizer\.step[\s\S]*between step 1 and step 2"):
        loop.step()


def test_a_frozen_parameter_that_changes_is_found_at_the_snapshot(tmp_path):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    x, y, loss = PLAIN.x, PLAIN.y, nn.CrossEntropyLoss()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, mode="snapshots", snapshot_every=3) as recorder:

        def step():
            optimizer.zero_grad()
            loss(model(x), y).backward()
            recorder.batch(x, y, ids=range(12))
            optimizer.step()

        step()
        step()
        with torch.no_grad():
            model[0].bias[0] += 1
        with pytest.raises(errors.RecordingError, match=r"does not train changed[\s\S]*'0.bias'"):
            step()
        with torch.no_grad():  # a group that joins brings it along
            model[0].bias.zero_()
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters()})
        with pytest.raises(errors.RecordingError, match=r"a parameter changed[\s\S]*'0.bias'"):
            step()


def test_an_optimizer_that_cannot_be_built_again_is_found_at_the_first_step(tmp_path):
    class Odd(torch.optim.SGD):
        def __init__(self, params, lr, secret):
            super().__init__(params, lr)

    rule = explaind.InferredRule()

    def loop(path, **options):
        model = mlp()
        optimizer = Odd(model.parameters(), 0.1, "x")
        options |= {"mode": "snapshots", "rule": rule}
        with explaind.Recorder(path, model, optimizer, nn.CrossEntropyLoss(), **options) as recorder:
            steps(PLAIN, recorder, model, optimizer, [1, 2])

    with pytest.raises(errors.RecordingError, match=r"first step[\s\S]*cannot be rebuilt[\s\S]*make_optimizer"):
        loop(tmp_path / "a")
    loop(tmp_path / "b", make_optimizer=lambda groups: Odd(groups, 0.1, "x"))
    run = explaind.open_run(tmp_path / "b", model=mlp(), make_optimizer=lambda groups: Odd(groups, 0.1, "x"))
    assert len(run.gradients(2)) == 4


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
