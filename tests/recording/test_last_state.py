"""Where the last recorded step left a model: copies and hashes answer the same questions alike."""

from __future__ import annotations

import pytest
import torch

from explaind_core import errors
from explaind_core.recording.last_state import state_at_start, stored_state
from explaind_core.recording.subject import Subject
from explaind_core.rules import default_registry
from support.mode_trainings import Training, cnn, mlp, record

MODES = ["steps", "parameters", "snapshots"]


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def subject_of(model, trained=None):
    optimizer = torch.optim.SGD(model.parameters() if trained is None else trained, lr=0.1)
    return Subject(model, [optimizer], [default_registry().rule_for(optimizer)])


def at_start(mode, subject):
    return state_at_start(mode, subject, subject.theta(), subject.buffers())


def move(tensor):
    with torch.no_grad():
        tensor.reshape(-1)[0] += 1


def names(subject):
    return {name for group in subject.groups() for name in group["params"]}


def test_a_step_has_a_state_of_its_own_and_the_one_before_is_as_it_was(mode):
    subject = subject_of(mlp())
    before = at_start(mode, subject)
    before.check_untouched("outside optimizer.step()")
    move(subject.model[0].weight)
    after = before.after(names(subject), before.parameters_now())
    after.check_untouched("outside optimizer.step()")
    assert (before.step, after.step) == (0, 1)
    assert (before.trained, after.trained) == (frozenset(), names(subject))
    with pytest.raises(
        errors.RecordingError,
        match=r"a parameter changed outside optimizer\.step\(\)[\s\S]*parameter '0.weight', between step 0 and step 1",
    ):
        before.check_untouched("outside optimizer.step()")
    move(subject.model[2].bias)
    with pytest.raises(
        errors.RecordingError, match=r"changed inside the closure[\s\S]*between step 1 and step 2[\s\S]*last step left"
    ):
        after.check_untouched("inside the closure")


def test_parameters_that_steps_of_other_optimizers_moved_stand_where_these_left_them():
    subject = subject_of(mlp())
    state = at_start("steps", subject)
    move(subject.model[0].weight)
    state.check_untouched("here", moved={"0.weight": subject.model[0].weight.detach().clone()})
    state.check_untouched("here", moved={"0.weight": None})
    with pytest.raises(errors.RecordingError, match=r"'0.weight'"):
        state.check_untouched("here", moved={"0.weight": torch.zeros(8, 5)})


def test_buffers_that_moved_are_told_and_become_part_of_the_next_state(mode):
    subject = subject_of(cnn())
    state = at_start(mode, subject)
    assert not state.moved_buffers()
    move(subject.model[2].running_mean)
    moved = state.moved_buffers()
    assert torch.equal(moved["2.running_mean"], subject.model[2].running_mean)
    assert moved.keys() == ({"2.running_mean"} if mode != "snapshots" else subject.buffers().keys())
    assert not state.after(names(subject), state.parameters_now()).moved_buffers()


def test_a_parameter_that_is_never_trained_is_refused_when_it_changed(mode):
    model = mlp()
    subject = subject_of(model, model[2].parameters())
    state = at_start(mode, subject)
    move(model[0].bias)
    with pytest.raises(errors.RecordingError, match=r"does not train changed[\s\S]*'0.bias', (up to )?step 1"):
        state.after(names(subject), state.parameters_now()).snapshot()


def test_what_a_file_keeps(mode):
    subject = subject_of(cnn())
    state = at_start(mode, subject)
    move(subject.model[2].running_var)
    after = state.after(names(subject), state.parameters_now())
    header, tensors = after.snapshot()
    theta, buffers = {f"theta/{name}" for name in names(subject)}, {f"buffer/{name}" for name in subject.buffers()}
    if mode == "snapshots":
        assert after.header.keys() == {"theta_hash", "buffer_hash"}
        assert (after.tensors(), header["trained"], tensors.keys()) == ({}, sorted(names(subject)), theta | buffers)
    else:
        assert (after.header, header, tensors) == ({}, {}, {})
        assert after.tensors().keys() == theta | {"buffer/2.running_var"}


@pytest.mark.parametrize("count", [0, 3])
def test_a_stored_run_gives_the_state_that_its_recording_had(tmp_path, mode, count):
    training = Training(model=cnn)
    run = record(training, tmp_path / "run", count, mode=mode, snapshot_every=2)
    model = training.make()
    if count:
        run.restore(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    subject = subject_of(model)
    state = stored_state(mode, subject, run)
    assert (state.step, state.difference(), state.moved_buffers()) == (count, None, {})
    assert state.trained == (names(subject) if count else frozenset())
    move(model[1].bias)
    assert state.difference() == ("theta_hash" if mode == "snapshots" and count else "parameter '1.bias'")
