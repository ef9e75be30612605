"""Modes that store less, while recording: loops that do more than they declare are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.recording.early_check import EarlyCheck
from support.mode_loops import MODES, PLAIN, Loop, half, noise
from support.mode_trainings import mlp, steps


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


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
