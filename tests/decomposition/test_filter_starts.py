"""Filters whose states start elsewhere than at zero: declared by the rule, prehistory in the sum, exact and proved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.decomposition import term_names
from explaind_core.errors import CoefficientError, ConformanceError, DisprovedError
from explaind_core.symbolic import prove
from explaind_core.testing import Case, check_update_rule, record_example, run_case


class Warm(torch.optim.Optimizer):
    """Momentum that starts at a constant: ``m_0 = initial_value``."""

    def __init__(self, params, lr=0.1, mu=0.9, initial_value=0.25, weight_decay=0.0):
        values = {"lr": lr, "mu": mu, "initial_value": initial_value, "weight_decay": weight_decay}
        super().__init__(params, values)

    def created(self, p, group):
        return torch.full_like(p, group["initial_value"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if "m" not in self.state[p]:
                        self.state[p]["m"] = self.created(p, group)
                    m = self.state[p]["m"]
                    m.mul_(group["mu"]).add_(p.grad + group["weight_decay"] * p)
                    p.sub_(group["lr"] * m)


class Undeclared(explaind.UpdateRule):
    """Everything but where m starts."""

    optimizers = (f"{Warm.__module__}.Warm",)
    options = frozenset({"lr", "mu", "initial_value", "weight_decay"})
    filter_states = ("m",)

    def coefficients(self, step):
        return explaind.StepCoefficients(
            preconditioner=step.hyper["lr"],
            filter=explaind.LinearFilter.momentum(step.hyper["mu"]),
            coupled_decay=step.hyper["weight_decay"],
        )

    def recursion(self, step):
        g = step.gradient + step.hyper["weight_decay"] * step.theta
        m = step.state["m"] = step.hyper["mu"] * step.state.get("m", step.hyper["initial_value"]) + g
        return step.theta - step.hyper["lr"] * m

    def alpha(self, s, i, hyper):
        return hyper["mu"] ** (s - i)


class WarmRule(Undeclared):
    def filter_start(self, step):
        return (step.hyper["initial_value"],)


class Anchored(Warm):
    """m_0 = theta_0 / 2: no constant, but no gradient either."""

    def created(self, p, group):
        return p / 2


class AnchoredRule(WarmRule):
    def recursion(self, step):
        g = step.gradient + step.hyper["weight_decay"] * step.theta
        m = step.state["m"] = step.hyper["mu"] * step.state.get("m", step.theta / 2) + g
        return step.theta - step.hyper["lr"] * m

    def filter_start(self, step):
        return (step.theta / 2,)


class Early(Warm):
    """Fills its state when it is made, and counts from 0."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "m": self.created(p, group).detach().clone()}

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["step"] += 1


class Two(Warm):
    """Two averages, of which the second starts at a constant, and the first at zero."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    fast = state.setdefault("fast", torch.zeros_like(p))
                    slow = state.setdefault("slow", torch.full_like(p, group["initial_value"]))
                    fast.mul_(0.5).add_(p.grad, alpha=0.5)
                    slow.mul_(group["mu"]).add_(p.grad)
                    p.sub_(group["lr"] * (fast - slow))


class TwoRule(WarmRule):
    filter_states = ("fast", "slow")
    alpha = explaind.UpdateRule.alpha

    def coefficients(self, step):
        mu = step.hyper["mu"]
        both = explaind.LinearFilter(A=((0.5, 0.0), (0.0, mu)), B=(0.5, 1.0), C=(0.5, -mu), D=-0.5)
        return explaind.StepCoefficients(preconditioner=step.hyper["lr"], filter=both)

    def recursion(self, step):
        state, g = step.state, step.gradient
        fast = state["fast"] = state["fast"] / 2 + g / 2
        slow = state["slow"] = step.hyper["mu"] * state.get("slow", step.hyper["initial_value"]) + g
        return step.theta - step.hyper["lr"] * (fast - slow)

    def filter_start(self, step):
        return (0.0, step.hyper["initial_value"])


PAIRS = [(Warm, WarmRule), (Anchored, AnchoredRule), (Early, WarmRule), (Two, TwoRule)]


@pytest.mark.parametrize(("kind", "rule"), PAIRS, ids=lambda kind: kind.__name__)
def test_every_step_closes_and_the_start_is_prehistory(kind, rule):
    run = record_example(steps=6, make_optimizer=lambda p: kind(p, weight_decay=0.1 * (kind is Warm)), rule=rule())
    splits = list(explaind.decompose(run))
    assert max(split.error for split in splits) < 1e-14
    assert all(update.prehistory.any() for split in splits for update in split.updates.values())
    assert "prehistory" in term_names(run)


def test_it_was_off_without_the_declaration():
    run = record_example(steps=3, make_optimizer=Warm, rule=Undeclared())
    assert max(split.error for split in explaind.decompose(run)) > 1e-2


def test_the_prehistory_is_the_decaying_start():
    run = record_example(steps=3, make_optimizer=Warm, rule=WarmRule())
    for split in explaind.decompose(run):
        for update in split.updates.values():
            wanted = torch.full_like(update.prehistory, -0.1 * 0.9**split.step * 0.25)
            torch.testing.assert_close(update.prehistory, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_is_what_the_optimizers_dtype_holds_of_it(dtype):
    make = lambda p: Warm(p, lr=1.0, mu=1.0, initial_value=1 / 3)  # noqa: E731
    run = record_example(steps=1, make_optimizer=make, rule=WarmRule(), dtype=dtype)
    (split,) = explaind.decompose(run)
    held = torch.tensor(1 / 3, dtype=dtype).double()
    assert all(torch.equal(u.prehistory, -held.expand_as(u.prehistory)) for u in split.updates.values())


@pytest.mark.parametrize("strategy", ["forward", "reverse", "features", "adjoint"])
def test_attributions_close_with_it(strategy):
    run = record_example(steps=4, make_optimizer=Warm, rule=WarmRule())
    inputs = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    keep = ("step", "gradient_step") if strategy == "features" else ("step",)
    result = explaind.attribute(run, inputs, keep=keep, nodes=8, strategy=strategy, progress=False)
    assert explaind.closure_error(result) < 1e-10
    assert float(np.abs(result.prehistory).max()) > 1e-3


def test_a_tape_goes_back_over_it():
    from explaind_core.decomposition import Tape

    run = record_example(steps=5, make_optimizer=Warm, rule=WarmRule())
    with Tape(run, 5, segment=2) as tape:
        assert max(step.error for step in tape.backwards()) < 1e-14


def test_a_parameter_that_joins_late_starts_at_its_own_first_step(tmp_path):
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)]).double()
    optimizer, rule = Warm(model.parameters()), WarmRule()
    x = torch.ones(3, 2, dtype=torch.float64)
    with explaind.Recorder(tmp_path / "run", model, optimizer, rule=rule) as recorder:
        for s in range(5):
            optimizer.zero_grad()
            (model[0](x) + (model[1](x) if s >= 2 else 0)).square().sum().backward()
            recorder.batch(x, None, ids=range(3))
            optimizer.step()
    splits = list(explaind.decompose(explaind.open_run(tmp_path / "run", model=model, rule=rule)))
    assert max(split.error for split in splits) < 1e-14
    assert set(splits[1].updates) == {"0.weight", "0.bias"}
    assert len(splits[2].updates) == 4


@pytest.mark.parametrize("kind", [Warm, Early])
def test_a_used_optimizer_starts_at_what_it_held(kind):
    def used(parameters):
        parameters = list(parameters)
        optimizer = kind(parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        for _ in range(3):
            optimizer.step()
        return optimizer

    run = record_example(steps=3, make_optimizer=used, rule=WarmRule())
    assert max(split.error for split in explaind.decompose(run)) < 1e-14


def test_a_used_state_that_happens_to_be_zero_is_not_started_again():
    def used(parameters):
        parameters = list(parameters)
        optimizer = Warm(parameters)
        for p in parameters:
            optimizer.state[p] |= {"m": torch.zeros_like(p), "other": torch.ones_like(p)}
        return optimizer

    run = record_example(steps=3, make_optimizer=used, rule=WarmRule())
    assert max(split.error for split in explaind.decompose(run)) < 1e-14


def test_a_state_filled_by_the_constructor_is_found_without_a_declaration():
    run = record_example(steps=3, make_optimizer=Early, rule=Undeclared())
    assert max(split.error for split in explaind.decompose(run)) < 1e-14


def test_filters_without_a_start_have_no_prehistory():
    run = record_example(steps=2)
    assert "prehistory" not in term_names(run)
    assert all(u.prehistory is None for split in explaind.decompose(run) for u in split.updates.values())


# ------------------------------------------------------------------ the kit
HYPER = {"mu": st.sampled_from([0.0, 0.9]), "initial_value": st.sampled_from([0.0, 0.1, -2.0])}


@pytest.mark.parametrize(("kind", "rule"), PAIRS, ids=lambda kind: kind.__name__)
def test_the_kit_knows_starts(kind, rule):
    report = check_update_rule(rule, kind, hyper=HYPER, max_examples=15)
    assert max(report.one_step, report.store) < 1e-14
    assert max(report.rollout, report.alphas) < 1e-12


@pytest.mark.parametrize("start", [(), (0.5,), (-0.25,)])
def test_the_kit_refutes_a_wrong_start(start):
    class Wrong(WarmRule):
        def filter_start(self, step):
            return start

    with pytest.raises(ConformanceError, match="one_step error"):
        check_update_rule(Wrong, Warm, max_examples=10)


def test_the_explicit_sums_go_over_the_start_too():
    case = Case(options={"lr": 0.1}, schedule=[{}] * 5, gradients=[["yes"] * 4] * 5)
    found = run_case(WarmRule(), Warm, case)
    assert max(found.one_step, found.rollout, found.alphas) < 1e-14


@pytest.mark.parametrize(
    ("start", "got"), [((0.1, 0.2), "at most 1 starts"), (("x",), "or a number"), ((float("nan"),), "finite numbers")]
)
def test_a_start_that_does_not_fit_is_named(start, got):
    class Odd(WarmRule):
        def filter_start(self, step):
            return start

    run = record_example(steps=1, make_optimizer=Warm, rule=Odd())
    with pytest.raises(CoefficientError, match=r"Odd\.filter_start does not fit the filter") as caught:
        list(explaind.decompose(run))
    assert got in str(caught.value)


# ------------------------------------------------------------------ the proof
@pytest.mark.parametrize("rule", [WarmRule, AnchoredRule, TwoRule])
def test_starts_are_proved_for_every_step(rule):
    proof = prove(rule)
    assert proof.proved
    assert all(configuration.every_step for configuration in proof.configurations)


def test_a_start_that_is_not_declared_or_wrong_is_disproved():
    with pytest.raises(DisprovedError, match="what depends on no gradient and no parameter") as caught:
        prove(Undeclared)
    assert "initial_value_1" in str(caught.value.expected)

    class Doubled(WarmRule):
        def filter_start(self, step):
            return (2 * step.hyper["initial_value"],)

    with pytest.raises(DisprovedError):
        prove(Doubled)

    class Elsewhere(WarmRule):
        def coefficients(self, step):
            right = super().coefficients(step)
            return replace(right, preconditioner=2 * step.hyper["lr"])

    with pytest.raises(DisprovedError, match="the coefficient of g_1"):
        prove(Elsewhere)
