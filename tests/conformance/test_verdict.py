"""check-plugin: kit and proof in one verdict; trials guessed from a constructor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from typer.testing import CliRunner

import explaind_core as explaind
from explaind_core.cli.app import app
from explaind_core.conformance.search import check_trials
from explaind_core.errors import ConformanceError, PluginError, QuestionError
from explaind_core.plugins import Registry
from explaind_core.rules.trials import default_trials, find_optimizer
from explaind_core.testing import Trials, check_plugin, check_update_rule
from explaind_optimizers import SGDRule


class Plain(torch.optim.Optimizer):
    """Every kind of option that the guess must know, and one that it cannot."""

    def __init__(
        self, params, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-8, maximize=False, norm=None, mode="x"
    ):
        if weight_decay and betas[0] == 0.5:
            raise ValueError("a combination that is not allowed")
        values = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "maximize": maximize}
        super().__init__(params, {**values, "norm": norm, "mode": mode})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    sign = -1 if group["maximize"] else 1
                    p.sub_(group["lr"] * (sign * p.grad + group["weight_decay"] * p))


class PlainRule(explaind.UpdateRule):
    optimizers = (f"{Plain.__module__}.Plain",)
    options = frozenset({"lr", "betas", "weight_decay", "eps", "maximize", "norm"})
    fixed = {"mode": ("x",)}  # noqa: RUF012

    def coefficients(self, step):
        return explaind.StepCoefficients(
            preconditioner=step.hyper["lr"],
            gradient_operator=-1.0 if step.hyper["maximize"] else 1.0,
            coupled_decay=step.hyper["weight_decay"],
        )

    def recursion(self, step):
        sign = -1 if step.hyper["maximize"] else 1
        return step.theta - step.hyper["lr"] * (sign * step.gradient + step.hyper["weight_decay"] * step.theta)

    proved_for = {"maximize": (False, True)}  # noqa: RUF012


class Wrong(PlainRule):
    def coefficients(self, step):
        return explaind.StepCoefficients(preconditioner=step.hyper["lr"], coupled_decay=step.hyper["weight_decay"])


def registered(**hooks):
    class Plugin:
        pass

    for name, function in hooks.items():
        setattr(Plugin, name, staticmethod(explaind.hookimpl(function)))
    made = Registry(discover=False)
    made.register(Plugin, name="a plugin")
    return made


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, Plain.__module__, sys.modules[__name__])


def test_what_is_drawn_is_guessed_from_the_constructor(importable):
    trials = default_trials(PlainRule())
    assert trials.make_optimizer is Plain
    assert set(trials.hyper) == {"lr", "betas", "weight_decay", "eps", "maximize", "mode"}
    assert set(trials.scheduled) == {"lr", "betas", "weight_decay", "eps"}
    assert trials.untested == ("norm",)
    report = check_trials(PlainRule(), trials, max_examples=30)
    assert report.refused > 0  # counted, not hidden
    assert report.one_step < 1e-14


def test_a_plugin_says_how_its_trainings_are_drawn(importable):
    given = Trials(Plain, {"lr": st.just(0.5)}, name="mine")
    registry = registered(
        explaind_update_rules=lambda: [PlainRule()],
        explaind_trials=lambda rule: [given] if isinstance(rule, PlainRule) else None,
    )
    assert registry.trials_for(PlainRule()) == (given,)
    assert registry.trials_for(SGDRule())[0].untested == ("foreach", "fused")  # nobody else's business: guessed


def test_a_plugin_whose_trials_raise_is_named():
    def broken(rule):
        raise RuntimeError("no trials today")

    with pytest.raises(PluginError, match=r"a plugin.*no trials today"):
        registered(explaind_trials=broken).trials_for(SGDRule())


def test_an_optimizer_that_is_not_installed_is_an_error():
    class Elsewhere(PlainRule):
        optimizers = ("not_installed_anywhere.Optimizer",)

    with pytest.raises(ConformanceError, match="no optimizer that Elsewhere speaks for is installed") as caught:
        find_optimizer(Elsewhere())
    assert "not_installed_anywhere.Optimizer" in str(caught.value)


def test_a_right_rule_is_exact_and_proved(importable):
    verdict = check_plugin(PlainRule, max_examples=20)
    assert (verdict.exact, verdict.proved, verdict.disproved, verdict.holds) == (True, True, False, True)
    text = str(verdict)
    assert "verdict: exact, proved" in text
    assert "untested: norm" in text
    assert "refused by the optimizer's constructor" in text


def test_a_wrong_rule_is_refuted_and_disproved(importable):
    verdict = check_plugin(Wrong, max_examples=20)
    assert (verdict.exact, verdict.proved, verdict.disproved, verdict.holds) == (False, False, True, False)
    text = str(verdict)
    assert "verdict: REFUTED, DISPROVED" in text
    assert "this runs:" in text


def flip(step):
    step.gradients.update({n: -g for n, g in step.gradients.items()})


def round_off(step):
    for hyper in step.hyper.values():
        hyper["lr"] = round(hyper["lr"], 2)


@pytest.mark.parametrize("damage", [flip, round_off])
def test_a_store_that_returns_something_else_is_refuted(monkeypatch, damage):
    """What the kit's round trip is for: a recorder that lost a gradient's sign, or a number's digits."""
    from explaind_core.conformance import cases

    class Careless(cases.Replay):
        def steps(self, **bounds):
            for step in super().steps(**bounds):
                damage(step)
                yield step

    monkeypatch.setattr(cases, "Replay", Careless)
    with pytest.raises(ConformanceError, match="store error"):
        check_update_rule(SGDRule, torch.optim.SGD, max_examples=30)


# ------------------------------------------------------------------ command line
def test_the_command_prints_the_verdict_and_returns_it():
    done = CliRunner().invoke(app, ["check-plugin", "explaind_optimizers:SGDRule", "--examples", "3"])
    assert done.exit_code == 0
    assert "verdict: exact, proved" in done.output


def test_the_command_fails_on_a_wrong_rule(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "import explaind_core as explaind\n"
        "class Rule(explaind.UpdateRule):\n"
        "    optimizers = ('torch.optim.sgd.SGD',)\n"
        "    options = frozenset({'lr', 'momentum', 'weight_decay', 'maximize'})\n"
        "    fixed = {'dampening': (0,), 'nesterov': (False,), 'foreach': (None,), 'differentiable': (False,),"
        " 'fused': (None,)}\n"
        "    def coefficients(self, step):\n"
        "        return explaind.StepCoefficients(preconditioner=step.hyper['lr'])\n"
    )
    command = [str(Path(sys.executable).parent / "explaind"), "check-plugin", "wrong:Rule", "--examples", "10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "REFUTED" in done.stdout
    assert "run_case(Rule(), SGD, Case(" in done.stdout
    assert "Rule has no recursion" in done.stdout  # neither proof nor reason


@pytest.mark.parametrize("name", ["nowhere:Rule", "explaind_optimizers:Nothing", "explaind_optimizers:explaind", "x"])
def test_the_command_says_what_is_no_rule(name):
    done = CliRunner().invoke(app, ["check-plugin", name])
    assert isinstance(done.exception, QuestionError)
    assert "MODULE:RULE" in str(done.exception) or "a subclass of explaind.UpdateRule" in str(done.exception)
