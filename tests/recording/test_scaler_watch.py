"""Gradient scalers that the recorder is told of: skipped steps are seen, whatever the optimizers."""

from __future__ import annotations

import pytest
import torch

import explaind_core as explaind
from explaind_core import errors
from support.joint_loops import Joint, closes

INFINITE = float("inf")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def scaled(**options):
    return torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2, **options)


def train(joint, recorder, scaler, factors, *, members=(0, 1), unscale=False, spoiled=None):
    """One iteration per factor of the loss; ``spoiled``: iteration -> the parameter whose gradient overflows alone."""
    for s, factor in enumerate(factors, 1):
        joint.zero_grad()
        ids = joint.ids(s)
        value = joint.loss(joint.model(joint.inputs[ids]), joint.targets[ids])
        scaler.scale(value * factor).backward()
        if (spoiled or {}).get(s):
            joint.model.get_parameter(spoiled[s]).grad.fill_(INFINITE)
        joint.declare(recorder, s)
        for member in members:
            if unscale:
                scaler.unscale_(joint.optimizers[member])
            scaler.step(joint.optimizers[member])
        scaler.update()


class Single(Joint):
    """One optimizer of all parameters."""

    def __init__(self, **options):
        super().__init__("adamw", "adamw", torch.float32)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=0.02, **options)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_skipped_steps_of_one_optimizer_are_seen(path, fused, unscale):
    joint, scaler = Single(fused=fused), scaled()
    with explaind.Recorder(path, joint.model, joint.optimizers[0], joint.loss, scaler=scaler) as recorder:
        train(joint, recorder, scaler, [1, INFINITE, 1, INFINITE, INFINITE, 1], members=(0,), unscale=unscale)
        assert recorder.skipped == 3
    run = explaind.open_run(path, model=joint.model)
    assert [run.batch(s).ids.tolist() for s in run.steps] == [joint.ids(s).tolist() for s in (1, 3, 6)]
    closes_in_single_precision(run)
    explaind.attribute(run, joint.inputs, keep=("train",), progress=False)


def closes_in_single_precision(run):
    for split in explaind.decompose(run):
        assert split.drift == 0
        assert split.error <= 1e-6 + 4 * split.rounding


@pytest.mark.parametrize("unscale", [False, True])
def test_skipped_rounds_of_several_optimizers_are_seen(path, unscale):
    joint, scaler = Joint("nesterov", "adamw"), scaled()
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss, scaler=scaler) as recorder:
        train(joint, recorder, scaler, [1, INFINITE, 1, INFINITE, INFINITE, 1], unscale=unscale)
        assert recorder.skipped == 3
    run = explaind.open_run(path, model=joint.model)
    assert [run.batch(s).ids.tolist() for s in run.steps] == [joint.ids(s).tolist() for s in (1, 3, 6)]
    assert [run.stepped(s) for s in run.steps] == [(0, 1)] * 3
    assert len({scaler.get_scale()} & {16.0}) == 0  # it grew, and backed off
    closes(run, joint.inputs)
    explaind.attribute(run, joint.inputs, keep=("train",), progress=False)


@pytest.mark.parametrize("members", [(0, 1), (1, 0)])
@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_is_skipped_while_the_other_steps_was_idle(path, members, fused):
    joint = Joint("nesterov", lambda ps: torch.optim.AdamW(ps, lr=0.02, fused=fused))
    scaler = scaled()
    spoiled = {2: "0.weight", 3: "3.bias", 5: "2.weight"}  # of the first, the second, the second optimizer
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss, scaler=scaler) as recorder:
        train(joint, recorder, scaler, [1, 1, 1, INFINITE, 1, 1], members=members, spoiled=spoiled)
        assert recorder.skipped == 1
    run = explaind.open_run(path, model=joint.model)
    assert [run.stepped(s) for s in run.steps] == [(0, 1), (1,), (0,), (0,), (0, 1)]
    assert [run.batch(s).ids.tolist() for s in run.steps] == [joint.ids(s).tolist() for s in (1, 2, 3, 5, 6)]
    closes(run, joint.inputs)
    explaind.attribute(run, joint.inputs, keep=("train",), progress=False)


def test_optimizers_that_take_turns_are_skipped_one_by_one(path):
    joint, scaler = Joint("nesterov", "adamw"), scaled()
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss, scaler=scaler) as recorder:
        for s, factor in enumerate([1, INFINITE, INFINITE, 1, INFINITE, 1], 1):
            train_one(joint, recorder, scaler, s, factor)
        assert recorder.skipped == 3
    run = explaind.open_run(path, model=joint.model)
    assert [run.stepped(s) for s in run.steps] == [(1,), (0,), (0,)]
    assert [run.batch(s).ids.tolist() for s in run.steps] == [joint.ids(s).tolist() for s in (1, 4, 6)]
    closes(run, joint.inputs)


def train_one(joint, recorder, scaler, s, factor):
    joint.zero_grad()
    ids = joint.ids(s)
    scaler.scale(joint.loss(joint.model(joint.inputs[ids]), joint.targets[ids]) * factor).backward()
    recorder.gradient_factor(0.5)
    joint.declare(recorder, s)
    scaler.step(joint.optimizers[s % 2])
    scaler.update()


def test_what_was_declared_of_a_skipped_gradient_is_forgotten(path):
    joint, scaler = Single(), scaled()
    with explaind.Recorder(path, joint.model, joint.optimizers[0], scaler=scaler) as recorder:
        recorder.gradient_factor(0.25)
        train(joint, recorder, scaler, [INFINITE, 1], members=(0,))
    assert explaind.open_run(path).gradient_factor(1) == 1.0


def test_a_batch_is_not_taken_over_from_a_skipped_round(path):
    joint, scaler = Joint("nesterov", "adamw"), scaled()
    with explaind.Recorder(path, joint.model, joint.optimizers, scaler=scaler) as recorder:
        train(joint, recorder, scaler, [INFINITE], members=(0,))
        joint.zero_grad()
        joint.backward(2)
        with pytest.raises(errors.RecordingError, match="no batch was declared"):
            joint.optimizers[0].step()
        assert recorder.skipped == 1


def test_metrics_after_a_skipped_round_belong_to_the_step_before(path):
    joint, scaler = Joint("nesterov", "adamw"), scaled()
    with explaind.Recorder(path, joint.model, joint.optimizers, scaler=scaler) as recorder:
        train(joint, recorder, scaler, [1])
        train(joint, recorder, scaler, [INFINITE], members=(0,))
        recorder.log(loss=2.0)
    assert explaind.open_run(path).metrics.step.values.tolist() == [1]


def test_the_scaler_is_left_as_it_was(path):
    joint, scaler = Single(), scaled()
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    recorder = explaind.Recorder(path, joint.model, joint.optimizers[0], scaler=scaler)
    scaler.scale(INFINITE * other.param_groups[0]["params"][0].sum()).backward()
    scaler.step(other)  # not the recorder's business
    scaler.update()
    assert recorder.skipped == 0
    train(joint, recorder, scaler, [1], members=(0,))
    recorder.close()
    assert "step" not in vars(scaler)
    train(joint, type("Nobody", (), {"batch": lambda *_, **__: None})(), scaler, [INFINITE], members=(0,))
    assert (recorder.steps, recorder.skipped) == (1, 0)


@pytest.mark.parametrize("enabled", [False, True])
def test_without_infinities_a_scaler_changes_nothing(path, enabled):
    joint, scaler = Single(), scaled(enabled=enabled)
    with explaind.Recorder(path, joint.model, joint.optimizers[0], joint.loss, scaler=scaler) as recorder:
        train(joint, recorder, scaler, [1, 1, 1], members=(0,))
        assert (recorder.steps, recorder.skipped) == (3, 0)
    closes_in_single_precision(explaind.open_run(path, model=joint.model))


def test_what_is_no_scaler(path):
    joint = Single()
    with pytest.raises(errors.RecordingError, match=r"no gradient scaler[\s\S]*got: *int"):
        explaind.Recorder(path, joint.model, joint.optimizers[0], scaler=1024)
    assert not path.exists()
