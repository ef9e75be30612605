"""What registering and recording refuse: early, clearly, losing nothing that was recorded. The wording is tested."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.plugins import Registry
from explaind_core.store import locations
from support.linear_loop import Loop

TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def loop(tmp_path):
    made = Loop(tmp_path / "run", train_size=6)
    made.step()
    return made


def test_an_optimizer_without_a_rule_names_what_there_is(tmp_path):
    class Unknown(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

    with pytest.raises(errors.RuleNotFoundError) as caught:
        Loop(tmp_path / "run", Unknown)
    text = str(caught.value)
    assert f"no registered rule speaks for the optimizer {Unknown.__module__}." in text
    assert "torch.optim.adamw.AdamW" in text
    assert "subclass of explaind.UpdateRule" in text
    assert not (tmp_path / "run").exists()


def test_a_subclass_is_another_optimizer_and_the_error_names_its_base_rule(tmp_path):
    class Mine(torch.optim.AdamW):
        pass

    with pytest.raises(errors.RuleNotFoundError, match=r"a rule exists for its base class: .*AdamWRule"):
        Loop(tmp_path / "run", Mine)


def test_two_rules_for_one_optimizer_are_both_named():
    registry = Registry()

    class Other:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rule(optimizer):
            class Rival(explaind.UpdateRule):
                def coefficients(self, step):
                    raise NotImplementedError

            return Rival() if isinstance(optimizer, torch.optim.SGD) else None

    registry.register(Other, name="rival")
    with pytest.raises(errors.AmbiguousRuleError) as caught:
        registry.rule_for(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
    assert "SGDRule (plugin 'explaind_optimizers', explaind-core" in str(caught.value)
    assert "Rival (plugin 'rival', registered by hand" in str(caught.value)


class Misspelled:
    @staticmethod
    @explaind.hookimpl
    def explaind_update_rulez():
        return None


class Raising:
    @staticmethod
    @explaind.hookimpl
    def explaind_update_rules():
        raise RuntimeError("boom")


class ReturnsAClass:
    @staticmethod
    @explaind.hookimpl
    def explaind_update_rules():
        return [explaind.UpdateRule]


def test_a_plugin_with_a_misspelled_hook_is_refused():
    with pytest.raises(errors.PluginError, match=r"explaind_update_rulez[\s\S]*named explaind_update_rules or"):
        Registry(discover=False).register(Misspelled, name="misspelled")


def test_a_plugin_without_any_hook_is_refused():
    with pytest.raises(errors.PluginError, match="implements no hook"):
        Registry(discover=False).register(object(), name="empty")


@pytest.mark.parametrize(
    ("plugin", "wording"),
    [(Raising, "plugin 'p' raised RuntimeError: boom"), (ReturnsAClass, "a class: return an instance")],
)
def test_a_plugin_that_misbehaves_is_named(plugin, wording):
    registry = Registry(discover=False)
    registry.register(plugin, name="p")
    with pytest.raises(errors.PluginError, match=wording):
        registry.rules()


@pytest.mark.parametrize("option", ["differentiable", "capturable"])
def test_an_option_that_the_rule_does_not_model_is_refused_by_name(tmp_path, option):
    with pytest.raises(errors.UnsupportedOptionError) as caught:
        Loop(tmp_path / "run", lambda p: torch.optim.AdamW(p, **{option: True}))
    assert f"AdamWRule does not model the option {option}=True" in str(caught.value)
    assert f"{option} in [False]" in str(caught.value)


def test_an_option_switched_on_later_is_refused_before_its_step(loop):
    loop.optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(errors.UnsupportedOptionError, match="differentiable=True"):
        loop.step()
    assert loop.readable() == 1


def test_a_batch_never_declared(loop):
    loop.backward()
    with pytest.raises(errors.RecordingError, match=r"no batch was declared before optimizer.step\(\)[\s\S]*step 2"):
        loop.optimizer.step()
    assert loop.readable() == 1


@pytest.mark.parametrize(
    ("ids", "wording"),
    [
        ([0, 1, 2, 3, 4, 6], r"1 ids are out of range[\s\S]*0 <= id < 6 \(train_size\)[\s\S]*\[6\]"),
        ([-1, 1, 2, 3, 4, 5], r"1 ids are out of range[\s\S]*\[-1\]"),
        ([0, 1], r"do not have the same number of samples[\s\S]*6 ids[\s\S]*2 ids"),
        (torch.zeros(6), r"one integer per sample[\s\S]*torch.float32"),
        (torch.zeros(6, 1, dtype=torch.int64), r"one integer per sample[\s\S]*shape \(6, 1\)"),
    ],
)
def test_ids_that_make_no_sense(loop, ids, wording):
    with pytest.raises(errors.RecordingError, match=wording):
        loop.step(ids=ids)
    assert loop.readable() == 1


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(loop, factor):
    before = loop.model.weight.detach().clone()
    with pytest.raises(errors.NonFiniteError, match=r"the loss is NaN or infinite[\s\S]*step 2[\s\S]*1 steps recorded"):
        loop.step(factor=factor)
    assert torch.equal(loop.model.weight, before)
    assert loop.readable() == 1


def test_a_logged_nan_is_named(loop):
    with pytest.raises(errors.NonFiniteError, match=r"accuracy is nan[\s\S]*after step 1"):
        loop.recorder.log(accuracy=float("nan"))


def test_a_parameter_changed_outside_step(loop):
    with torch.no_grad():
        loop.model.weight.clamp_(-0.1, 0.1)
    with pytest.raises(errors.RecordingError, match=r"changed outside optimizer.step\(\)[\s\S]*'weight', between"):
        loop.step()


def test_a_tensor_that_the_model_does_not_own(tmp_path):
    stranger = nn.Parameter(torch.ones(2, 7))
    with pytest.raises(errors.RecordingError, match=r"no parameter of the model[\s\S]*\(2, 7\)"):
        Loop(tmp_path / "run", lambda p: torch.optim.SGD([*p, stranger], lr=0.1))


def test_inputs_that_cannot_be_stored(loop):
    loop.backward()
    with pytest.raises(errors.RecordingError, match=r"holds a set, which cannot be stored without pickle[\s\S]*inputs"):
        loop.recorder.batch({"x": {1, 2}}, loop.targets, ids=range(6))


def test_a_path_that_is_taken(loop):
    with pytest.raises(errors.StoreError, match=r"at this path already[\s\S]*resume=True[\s\S]*overwrite=True"):
        explaind.Recorder(loop.path, loop.model, loop.optimizer)


def test_overwrite_never_deletes_what_is_not_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.StoreError, match="not a recorded run"):
        Loop(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_full_disk_loses_nothing(loop, monkeypatch):
    def full(path, parts):
        raise OSError(errno.ENOSPC, "No space left on device")

    loop.recorder.flush()
    monkeypatch.setattr(locations, "write", full)
    with pytest.raises(errors.StoreError, match=r"the disk is full[\s\S]*free some space; [\s\S]* are intact"):
        loop.step()
    monkeypatch.undo()
    assert loop.readable() == 1


def test_a_killed_training_leaves_every_finished_step(tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {TESTS!r})
from support.linear_loop import Loop
loop = Loop({str(tmp_path / "run")!r})
for _ in range(5):
    loop.step()
loop.recorder.flush()
loop.backward()
loop.recorder.batch(loop.inputs, loop.targets, ids=range(6))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    run = explaind.open_run(tmp_path / "run", model=nn.Linear(3, 2))
    assert len(run.steps) == 5
    assert not run.complete
    assert all(step.drift == 0 for step in explaind.decompose(run))


def test_a_metric_called_step_is_refused(loop):
    loop.recorder.log(loss=1.0)
    with pytest.raises(errors.RecordingError, match="a metric is called step") as caught:
        loop.recorder.log(step=3, loss=2.0)
    assert "kept anyway" in caught.value.remedy
    assert explaind.open_run(loop.path, model=loop.model).metrics.loss.values.tolist() == [1.0]
