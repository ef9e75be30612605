"""Several optimizers on one model: where a round ends, and what gradients it may be fed."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from support.joint_loops import OTHERS, Joint, closes, opened


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def joint():
    return Joint("nesterov", "adamw")


def test_metrics_belong_to_the_round_that_is_not_over(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        for s, members in enumerate([(0, 1), (0,), (1,)], 1):
            joint.train(recorder, [members], first=s)
            recorder.log(iteration=s)
    run = opened(path, joint)
    assert run.metrics.iteration.values.tolist() == [1, 2, 3]
    assert run.metrics.step.values.tolist() == [1, 2, 3]


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_last_round_is_written_when_recording_ends(path, joint, interrupted):
    recorder = explaind.Recorder(path, joint.model, joint.optimizers)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext(), recorder:
        joint.train(recorder, [(0, 1), (1,)])
        assert recorder.steps == 1
        if interrupted:
            raise KeyboardInterrupt
    run = opened(path, joint)
    assert (len(run.steps), run.complete) == (2, not interrupted)
    assert run.stepped(2) == (1,)
    assert all(torch.equal(run.theta(2)[n], p) for n, p in joint.model.named_parameters())
    closes(run)


@pytest.mark.parametrize("by_hand", [False, True])
def test_new_gradients_between_two_steps_are_two_steps(path, joint, by_hand):
    """As in adversarial training: each optimizer's gradient is taken where the other one has left the model."""
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        for s in range(1, 7):
            if by_hand:
                ids = joint.ids(s)
                value = joint.loss(joint.model(joint.inputs[ids]), joint.targets[ids])
                parameters = list(joint.model.parameters())
                for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                    parameter.grad = gradient
            else:
                joint.zero_grad()
                joint.backward(s)
            joint.declare(recorder, s)
            joint.optimizers[s % 2].step()
    run = opened(path, joint)
    assert [run.stepped(s) for s in run.steps] == [(1,), (0,)] * 3
    assert [run.batch(s).ids.tolist() for s in run.steps] == [joint.ids(s).tolist() for s in range(1, 7)]
    closes(run, joint.inputs)
    # The samples' own gradients are those that were fed: they were taken where the step begins.
    explaind.attribute(run, joint.inputs, keep=("train", "step"), progress=False)


@pytest.mark.parametrize("zero", [None, False, True])
def test_a_gradient_taken_after_the_other_step_needs_a_batch_of_its_own(path, joint, zero):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0,)])
        if zero is None:
            joint.model[0].bias.grad.zero_()  # what is left there is not part of the next one
            for name in OTHERS[1:]:
                joint.model.get_parameter(name).grad = None
        else:
            joint.optimizers[1].zero_grad(set_to_none=zero)
        joint.backward(2)
        with pytest.raises(errors.RecordingError, match=r"no batch was declared[\s\S]*step 2"):
            joint.optimizers[1].step()
    assert len(opened(path, joint).steps) == 1


def test_gradients_accumulated_while_another_optimizer_steps_are_refused(path, joint):
    wording = (
        r"AdamW is about to be fed was not taken where this step begins[\s\S]*'0.bias', step 2"
        r"[\s\S]*after 1 steps[\s\S]*after 0, 1 of them[\s\S]*zero_grad\(\) before backward\(\)"
    )
    recorder = explaind.Recorder(path, joint.model, joint.optimizers)
    with pytest.raises(errors.RecordingError, match=wording), recorder:  # noqa: PT012
        for s, members in enumerate([(0,), (0, 1)], 1):
            joint.optimizers[0].zero_grad()
            joint.backward(s)
            joint.declare(recorder, s)
            for member in members:
                joint.optimizers[member].step()
    run = opened(path, joint)
    assert [run.stepped(s) for s in run.steps] == [(0,), (0,)]  # what was recorded is kept
    closes(run)


@pytest.mark.parametrize("how", ["stale", "added by hand", "half"])
def test_gradients_of_earlier_points_are_refused(path, joint, how):
    second = joint.optimizers[1]
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0,)])
        if how == "half":
            joint.model[0].bias.grad = None
            joint.backward(2)  # the others' are added to what is there
        joint.declare(recorder, 2)
        if how == "added by hand":
            for parameter in second.param_groups[0]["params"]:
                parameter.grad.add_(1.0)
        with pytest.raises(errors.RecordingError, match=r"not taken where this step begins[\s\S]*step 2"):
            second.step()


def test_a_gradient_that_is_zero_was_taken_anywhere(path, joint):
    """Unused parameters keep a zero where zero_grad(set_to_none=False) left it."""
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0, 1)])
        joint.zero_grad(set_to_none=False)
        joint.model[0].requires_grad_(False)  # no new one from here on
        joint.backward(2)
        joint.declare(recorder, 2)
        joint.optimizers[0].step()
        joint.optimizers[1].step()
    run = opened(path, joint)
    assert not run.gradients(2)["0.bias"].any()
    closes(run)


def test_clipping_between_the_steps_of_a_round(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        for s in (1, 2):
            joint.zero_grad()
            joint.backward(s)
            joint.declare(recorder, s)
            for optimizer in joint.optimizers:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.01)
                optimizer.step()
    run = opened(path, joint)
    assert [run.stepped(s) for s in run.steps] == [(0, 1), (0, 1)]
    closes(run)
    # Each optimizer's part of the gradient was multiplied by a factor of its own.
    whole = explaind.attribute(run, joint.inputs, keep=("step",), nodes=2, progress=False)
    for keep in (("step", "train"), ("step", "parameter", "train")):
        split = explaind.attribute(run, joint.inputs, keep=keep, nodes=2, progress=False)
        total = split.kernel.sum([axis for axis in keep if axis != "step"])
        assert float(abs(total - whole.kernel).max()) < 1e-12 * float(abs(whole.kernel).max())
        smallest, largest = split.attrs["gradient_factor"]
        assert smallest < 0.9 * largest < 0.9


def test_a_batch_that_no_clipping_explains_is_refused(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers, joint.loss) as recorder:
        joint.zero_grad()
        joint.backward(1)
        joint.declare(recorder, 2)  # another one
        for optimizer in joint.optimizers:
            optimizer.step()
    with pytest.raises(errors.RecordingError, match="not that of its declared samples"):
        explaind.attribute(opened(path, joint), joint.inputs, keep=("train",), progress=False)


def test_a_second_step_on_the_same_gradient_is_refused(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0,)])
        with pytest.raises(errors.RecordingError, match=r"not taken where this step begins[\s\S]*step 2"):
            joint.optimizers[0].step()
    assert [opened(path, joint).stepped(1)] == [(0,)]


def test_gradient_factors_are_of_their_own_round(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        for s, (factor, members) in enumerate([(0.5, (0,)), (0.25, (0, 1)), (1.0, (1,))], 1):
            joint.zero_grad()
            joint.backward(s)
            recorder.gradient_factor(factor)  # before the batch ends the round before
            joint.declare(recorder, s)
            for member in members:
                joint.optimizers[member].step()
    assert [opened(path, joint).gradient_factor(s) for s in (1, 2, 3)] == [0.5, 0.25, 1.0]


def test_a_factor_declared_in_the_middle_of_a_round_is_refused(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0,)])
        recorder.gradient_factor(0.5)
        with pytest.raises(errors.RecordingError, match=r"factor was declared between[\s\S]*step 1[\s\S]*common norm"):
            joint.optimizers[1].step()


def test_discarding_a_batch_does_not_touch_the_round_before(path, joint):
    with explaind.Recorder(path, joint.model, joint.optimizers) as recorder:
        joint.train(recorder, [(0,)])
        recorder.discard_batch()
        joint.train(recorder, [(0, 1)], first=2)
    run = opened(path, joint)
    assert [run.batch(s).ids.tolist() for s in run.steps] == [joint.ids(s).tolist() for s in (1, 2)]


def test_a_parameter_that_another_optimizers_step_moves(path, joint):
    recorder = explaind.Recorder(path, joint.model, joint.optimizers)

    def meddle(*_):
        with torch.no_grad():
            joint.model[3].bias.add_(1.0)

    joint.zero_grad()
    joint.backward(1)
    joint.declare(recorder, 1)
    joint.optimizers[0].register_step_pre_hook(meddle)
    with pytest.raises(errors.RecordingError, match=r"changed in the step of another optimizer[\s\S]*'3.bias'"):
        joint.optimizers[0].step()


def test_a_parameter_that_is_moved_between_two_steps_of_a_round(path, joint):
    recorder = explaind.Recorder(path, joint.model, joint.optimizers)
    joint.train(recorder, [(0,)])
    with torch.no_grad():
        joint.model[0].weight.mul_(2.0)
    with pytest.raises(errors.RecordingError, match=r"changed outside optimizer.step\(\)[\s\S]*'0.weight'"):
        joint.optimizers[1].step()
