"""What the conformance kit promises beside the rules it checks: nothing is hidden, and a case is what it says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.conformance.cases import observed, replayed
from explaind_core.conformance.one_case import Conformance
from explaind_core.conformance.search import ConformanceError
from explaind_core.errors import UnsupportedOptionError
from explaind_core.testing import Case, check_update_rule, run_case
from explaind_optimizers import SGDRule, SparseAdamRule


def test_a_nan_is_never_lost():
    for first, second in (
        (Conformance(one_step=math.nan), Conformance()),
        (Conformance(), Conformance(one_step=math.nan)),
    ):
        assert math.isnan(first.merged(second).one_step)


def test_cases_and_refusals_are_counted():
    both = Conformance(cases=2, refused=1, rollout=0.5).merged(Conformance(cases=3, rollout=0.25))
    assert (both.cases, both.refused, both.rollout) == (5, 1, 0.5)


def test_sparse_gradients_have_repeated_rows():
    steps = [
        step
        for seed in range(8)
        for step in observed(
            SparseAdamRule(), torch.optim.SparseAdam, Case(gradients=[["sparse"]], shapes=((4, 3),), seed=seed)
        )
    ]
    gradients = [step.gradients["p0"] for step in steps]
    assert all(g.is_sparse for g in gradients)
    assert any(len(g._indices()[0].unique()) < g._nnz() for g in gradients)  # some rows twice
    assert any(g._nnz() > 0 and g.coalesce()._nnz() < 4 for g in gradients)  # some rows left out


def test_a_stored_case_is_the_observed_one():
    gradients = [["yes", "none", "zero", "some zeros"], ["yes", "yes", "none", "yes"]]
    case = Case(options={"lr": 0.1, "momentum": 0.9}, schedule=({}, {"lr": 0.3}), gradients=gradients)
    for seen, through in zip(*(f(SGDRule(), torch.optim.SGD, case) for f in (observed, replayed)), strict=True):
        assert seen.hyper == through.hyper
        assert list(seen.gradients) == list(through.gradients)
        for name, theta in seen.theta.items():
            assert torch.equal(theta, through.theta[name])
    assert seen.hyper["p0"]["lr"] == 0.3  # the first group's schedule
    assert seen.hyper["p1"]["lr"] == 0.1


def test_one_group_is_one_group():
    case = Case(options={"lr": 0.1}, second_group=None, schedule=[{"lr": 0.5}])
    (step,) = observed(SGDRule(), torch.optim.SGD, case)
    assert {hyper["lr"] for hyper in step.hyper.values()} == {0.5}


class Holds(torch.optim.SGD):
    """An optimizer that keeps an option as an attribute of itself, whatever its groups say."""

    def __init__(self, params, lr=0.1, scale=1.0):
        super().__init__(params, lr=lr)
        self.held = scale

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad * self.held
        return super().step(closure)


class HoldsRule(SGDRule):
    optimizers = (f"{Holds.__module__}.Holds",)
    options = SGDRule.options | {"scale"}
    attributes = {"scale": "held"}  # noqa: RUF012

    def coefficients(self, step):
        return explaind.StepCoefficients(preconditioner=step.hyper["lr"], gradient_operator=step.hyper["scale"])


def test_options_that_an_optimizer_keeps_to_itself_are_recorded_and_rebuilt(tmp_path):
    for stored in (False, True):
        assert run_case(HoldsRule(), Holds, Case(options={"lr": 0.1, "scale": 3.0}, stored=stored)).one_step < 1e-15
    model = nn.Linear(2, 1).double()
    optimizer = Holds(model.parameters(), scale=2.0)
    optimizer.param_groups[0]["scale"] = 5.0  # which it never looks at
    with explaind.Recorder(tmp_path / "run", model, optimizer, rule=HoldsRule()) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 2, dtype=torch.float64)).square().sum().backward()
            recorder.batch(torch.ones(4, 2), None, ids=range(4))
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model, rule=HoldsRule())  # rebuilt from what was recorded
    assert run.hyper(1)[0]["scale"] == 2.0
    assert max(step.error for step in explaind.decompose(run)) < 1e-14
    assert max(step.drift for step in explaind.decompose(run)) == 0


def test_a_step_that_raised_is_not_taken_for_an_outer_one(tmp_path):
    """Hooks of an outer and an inner step() run both; after an error only the stack tells them from two steps."""

    class Fails(Holds):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    model = nn.Linear(2, 1).double()
    optimizer = Fails(model.parameters(), scale=2.0)
    with explaind.Recorder(tmp_path / "run", model, optimizer, rule=HoldsRule()) as recorder:
        for s in range(4):
            optimizer.zero_grad()
            model(torch.ones(4, 2, dtype=torch.float64)).square().sum().backward()
            recorder.batch(torch.ones(4, 2), None, ids=range(4))
            optimizer.fails = s == 1
            if optimizer.fails:
                with pytest.raises(RuntimeError, match="out of memory"):
                    optimizer.step()
                recorder.discard_batch()
            else:
                optimizer.step()
    assert recorder.steps == 3


def test_an_option_kept_as_an_attribute_can_be_refused():
    class Narrow(HoldsRule):
        options = SGDRule.options
        fixed = SGDRule.fixed | {"scale": (1.0,)}

    model = nn.Linear(2, 1)
    with pytest.raises(UnsupportedOptionError, match="scale=2"):
        explaind.Recorder("never", model, Holds(model.parameters(), scale=2.0), rule=Narrow())


def test_names_that_a_loaded_optimizer_adds_to_its_defaults_are_no_options():
    """torch's own __setstate__ does; its groups do not have them."""
    SGDRule().check_options({"lr": 0.1}, ["lr", "unheard_of"])
    with pytest.raises(UnsupportedOptionError, match="unheard_of"):
        SGDRule().check_options({"lr": 0.1, "unheard_of": 1}, ["lr", "unheard_of"])


def test_a_rollout_that_drifts_is_refuted():
    """Every step is right from the real parameters; the filter is not, from its own."""

    class Forgets(SGDRule):
        def coefficients(self, step):
            m = (
                step.before.get("momentum_buffer", torch.zeros_like(step.theta))
                if step.before.get("momentum_buffer") is not None
                else 0
            )
            u = step.gradient
            ratio = torch.where(u == 0, torch.zeros_like(u), (0.9 * m + u) / torch.where(u == 0, torch.ones_like(u), u))
            return explaind.StepCoefficients(preconditioner=explaind.operators.Diagonal(step.hyper["lr"] * ratio))

    report = run_case(
        Forgets(),
        torch.optim.SGD,
        Case(options={"momentum": 0.9, "lr": 0.1}, schedule=[{}] * 3, gradients=[["yes"] * 4] * 3),
    )
    assert report.one_step < 1e-14  # which is why a frozen P must not be trusted because one step fits
    with pytest.raises(ConformanceError):  # a zero gradient shows it
        check_update_rule(Forgets, lambda g, **o: torch.optim.SGD(g, momentum=0.9, **o), max_examples=40)
