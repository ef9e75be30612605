"""What recording refuses in its corners; the wording is tested, and that nothing recorded is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.plugins import Registry
from explaind_core.store.run_store import RunStore
from explaind_optimizers import SGDRule
from support.stepped_loop import Loop, N


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def loop():
    return Loop(lambda p: torch.optim.SGD(p, lr=0.1))


@pytest.fixture
def recorder(path, loop):
    made = explaind.Recorder(path, loop.model, loop.optimizer)
    loop.steps(made, 1, 1)
    return made


@pytest.mark.parametrize(
    "ids", [["a"] * N, None, [], torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.complex128)]
)
def test_ids_that_are_no_integers(recorder, loop, ids):
    with pytest.raises(errors.RecordingError, match=r"ids must be one integer per sample[\s\S]*batch of step 2"):
        recorder.batch(loop.x, None, ids=ids)


def test_every_tensor_of_a_batch_is_one_row_per_sample(recorder, loop):
    with pytest.raises(errors.RecordingError, match=r"ids and targets do not have the same number[\s\S]*2 ids"):
        recorder.batch(loop.x[:3], loop.y[:2], ids=range(3))
    with pytest.raises(errors.RecordingError, match=r"ids and inputs do not have[\s\S]*a batch axis"):
        recorder.batch(torch.tensor(1.0), None, ids=range(3))


def test_a_refused_batch_is_no_declared_batch(recorder, loop):
    loop.backward()
    with pytest.raises(errors.RecordingError):
        recorder.batch(loop.x, None, ids=[0])
    with pytest.raises(errors.RecordingError, match="no batch was declared"):
        loop.optimizer.step()


def test_a_batch_counts_for_one_step_only(recorder, loop):
    loop.backward()
    with pytest.raises(errors.RecordingError, match=r"no batch was declared[\s\S]*step 2[\s\S]*recorder.batch\(inputs"):
        loop.optimizer.step()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_factor_that_is_not_finite(recorder, factor):
    with pytest.raises(errors.NonFiniteError, match=r"gradient factor is not finite[\s\S]*step 2"):
        recorder.gradient_factor(factor)


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_a_step_that_makes_the_parameters_nan(path, recorder, loop, lr):
    loop.optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(errors.NonFiniteError, match=r"made a parameter NaN or infinite[\s\S]*'0.weight', step 2"):
        loop.steps(recorder, 2, 2)
    assert len(explaind.open_run(path).steps) == 1


def test_a_constant_mask_of_infinities_is_no_divergence(path):
    model = nn.Linear(3, 2)
    model.register_parameter("mask", nn.Parameter(torch.tensor([0.0, float("-inf")]), requires_grad=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(path, model, optimizer) as recorder:
        model(torch.ones(2, 3)).sum().backward()
        recorder.batch(torch.ones(2, 3), None, ids=[0, 1])
        optimizer.step()
    assert len(explaind.open_run(path).steps) == 1


# ------------------------------------------------------------------ closures
class Impatient(torch.optim.SGD):
    """Evaluates its closure as often as it is told."""

    calls = 2

    def step(self, closure=None):
        for _ in range(self.calls):
            closure()


def recorder_of(loop, path):
    """A recorder whose registry lets SGD's rule speak for :class:`Impatient`."""

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rule():
            return SGDRule()

    registry = Registry(discover=False)
    registry.register(Plugin, name="any")
    return explaind.Recorder(path, loop.model, loop.optimizer, registry=registry)


@pytest.mark.parametrize(
    ("calls", "wording"),
    [
        (2, r"Impatient called its closure more than once[\s\S]*step 1"),
        (0, r"never evaluated its closure[\s\S]*step 1"),
    ],
)
def test_a_closure_is_evaluated_once(path, calls, wording):
    loop = Loop(lambda p: Impatient(p, lr=0.1))
    loop.optimizer.calls = calls
    recorder = recorder_of(loop, path)
    recorder.batch(loop.x, loop.y, ids=range(N))
    with pytest.raises(errors.RecordingError, match=wording):
        loop.optimizer.step(lambda: loop.backward()[1])


def test_a_nan_in_a_closure_stops_before_the_step(path, recorder, loop):
    before = loop.model[0].weight.detach().clone()

    def closure():
        loop.optimizer.zero_grad()
        value = loop.model(loop.x).sum() * float("nan")
        value.backward()
        return value

    recorder.batch(loop.x, loop.y, ids=range(N))
    with pytest.raises(errors.NonFiniteError, match=r"gradient is not finite[\s\S]*12 of 12 entries"):
        loop.optimizer.step(closure)
    assert torch.equal(loop.model[0].weight, before)


# ------------------------------------------------------------------ models and places
def test_complex_parameters(path):
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(errors.RecordingError, match=r"complex parameters[\s\S]*'weight'[\s\S]*view_as_real"):
        explaind.Recorder(path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not path.exists()


def test_a_group_of_strangers_that_joins_later(path, recorder, loop):
    loop.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    with pytest.raises(errors.RecordingError, match=r"no parameter of the model[\s\S]*parameter group 1[\s\S]*\(7,\)"):
        loop.steps(recorder, 2, 2)
    assert len(explaind.open_run(path).steps) == 1


def test_a_parameter_that_is_not_trained_must_not_change_either(path, loop):
    optimizer = torch.optim.SGD(loop.model[0].parameters(), lr=0.1)
    recorder = explaind.Recorder(path, loop.model, optimizer)
    loop.backward()
    recorder.batch(loop.x, None, ids=range(N))
    with torch.no_grad():
        loop.model[2].bias.add_(1)
    with pytest.raises(errors.RecordingError, match=r"changed outside optimizer.step\(\)[\s\S]*'2.bias'"):
        optimizer.step()


def test_a_file_where_the_folder_should_be(path, loop):
    path.write_text("thesis")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(errors.StoreError, match=r"something at this path already|not a recorded run"):
            explaind.Recorder(path, loop.model, loop.optimizer, **options)
    assert path.read_text() == "thesis"


def test_resuming_where_there_is_no_run(path, loop):
    with pytest.raises(errors.StoreError, match="not a recorded run"):
        explaind.Recorder(path, loop.model, loop.optimizer, resume=True)


def test_resuming_with_another_optimizer(path, recorder, loop):
    recorder.close()
    with pytest.raises(errors.RecordingError, match=r"another optimizer[\s\S]*sgd.SGD[\s\S]*adamw.AdamW"):
        explaind.Recorder(path, loop.model, torch.optim.AdamW(loop.model.parameters()), resume=True)


def test_after_a_full_disk_the_gap_is_noticed(path, recorder, loop, monkeypatch):
    write = RunStore._write

    def full(self, at, content):
        if "steps" in at.parts:  # the batch still fits
            raise errors.StoreError("the disk is full")
        write(self, at, content)

    recorder.flush()
    monkeypatch.setattr(RunStore, "_write", full)
    with pytest.raises(errors.StoreError, match="the disk is full"):
        loop.steps(recorder, 2, 2)
    monkeypatch.undo()
    with pytest.raises(errors.StoreError, match="the disk is full"):
        loop.steps(recorder, 10, 10)
    with pytest.raises(errors.StoreError, match="the disk is full"):
        recorder.close()
    assert len(explaind.open_run(path, model=loop.model).steps) == 1


def test_a_run_without_a_step_has_nothing_to_replay(path, loop):
    explaind.Recorder(path, loop.model, loop.optimizer).close()
    run = explaind.open_run(path, model=loop.model)
    assert run.steps == range(1, 1)
    with pytest.raises(errors.StoreError, match=r"no finished step[\s\S]*train at least one"):
        list(explaind.decompose(run))
