"""Kernel, regularization and prehistory of every step, each on its own, against explicit double sums (float64).

That their sum is the observed update is checked elsewhere for all options; a wrong split could still sum to it.
"""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.plugins import Registry
from explaind_core.testing import record_example
from support.oracles import closed_split, declarations, explicit_split

SHAPES = [(), (3,), (4, 5), (2, 3, 2)]
KINDS = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]


class Bag(nn.Module):
    """Parameters of all kinds of shapes, without a forward pass: the tests write the gradients."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for index, shape in enumerate(SHAPES):
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{index}", nn.Parameter(value))


def feed(model, optimizer, schedule, seed, recorder=None):
    """One step per entry of ``schedule``: (hyper-parameters to set, what each parameter's gradient is)."""
    generator = torch.Generator().manual_seed(seed)
    for hyper, presence in schedule:
        for group in optimizer.param_groups:
            group.update(hyper)
        for parameter, what in zip(model.parameters(), presence, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.grad = {"some": gradient, "zero": gradient * 0, "none": None}[what]
        if recorder is not None:
            recorder.batch(torch.zeros(1), None, ids=[0])
        optimizer.step()


def recorded(kind, schedule, *, options=None, before=(), seed=0, dtype=torch.float64):
    """A run of ``schedule``; the steps of ``before`` are made first and not recorded."""
    model = Bag(seed, dtype)
    optimizer = kind(model.parameters(), **{"lr": 0.1, **(options or {})})
    feed(model, optimizer, before, seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        with explaind.Recorder(f"{folder}/run", model, optimizer) as recorder:
            feed(model, optimizer, schedule, seed + 2, recorder)
        return declarations(explaind.open_run(f"{folder}/run", model=model))


lr = st.floats(1e-3, 0.5)
decay = st.sampled_from([0.0, 0.01, 0.3])
presence = st.lists(st.sampled_from(["some", "some", "some", "zero", "none"]), min_size=4, max_size=4)
# Nesterov's momentum must be positive and undampened when torch builds the optimizer; later both may change.
momentum = st.fixed_dictionaries(
    {"lr": lr, "weight_decay": decay, "momentum": st.sampled_from([0.0, 0.4, 0.9]), "dampening": st.just(0.0)}
)
damped = st.fixed_dictionaries(
    {"lr": lr, "weight_decay": decay, "momentum": st.sampled_from([0.0, 0.6]), "dampening": st.floats(0, 0.9)}
)
betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.5, 0.95, 0.999]))
adam = st.fixed_dictionaries({"lr": lr, "weight_decay": decay, "betas": betas})
implementation = st.sampled_from([{"foreach": False}, {"foreach": True}, {"fused": True}])


@st.composite
def trainings(draw, kind):
    """Arguments of :func:`recorded`: every hyper-parameter may change at every step."""
    options = {"maximize": draw(st.booleans())} | draw(implementation)
    if kind is torch.optim.SGD:
        nesterov = draw(st.booleans())
        options |= {"nesterov": nesterov} | ({"momentum": 0.5} if nesterov else {})
        hyper = momentum if nesterov else damped
        # A fused or foreach buffer that is missing for some parameters only is torch's own business.
        present = presence.map(lambda p: ["some" if x == "none" else x for x in p]) if "fused" in options else presence
    else:
        options |= {"amsgrad": draw(st.booleans()), "eps": draw(st.sampled_from([1e-8, 1e-3]))}
        hyper, present = adam, presence
    schedule = draw(st.lists(st.tuples(hyper, present), min_size=1, max_size=6))
    if options.get("nesterov") and schedule[0][0]["momentum"] == 0:
        schedule[0][0]["momentum"] = 0.4  # the replay builds the optimizer from the first step's options
    return {"schedule": schedule, "options": options, "seed": draw(st.integers(0, 99))}


def equal(split, oracle, what):
    # Both sides are sums of at most 6 terms of size about 1 (P g) or, where a coordinate had no gradient yet, exact 0.
    scale = 1 + float(oracle.abs().max())
    torch.testing.assert_close(split, oracle, rtol=1e-11, atol=1e-12 * scale, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_and_regularization_are_the_explicit_double_sums(kind):
    @settings(deadline=None, max_examples=25)
    @given(training=trainings(kind))
    def check(training):
        steps, seen = recorded(kind, **training)
        for name, declared in seen.items():
            splits = [step.updates[name] for step in steps if name in step.updates]
            assert len(splits) == len(declared)
            if not declared:
                continue
            for oracle in (explicit_split(declared), closed_split(kind, declared)):
                for split, kernel, regularization in zip(splits, *oracle, strict=True):
                    equal(split.kernel, kernel, f"kernel of {name}")
                    equal(split.regularization, regularization, f"regularization of {name}")
                    assert split.prehistory is None
        for step in steps:
            # theta - update rounds theta twice at most (decay, update), its own size each: 2 eps |theta| in all.
            assert step.error <= 1e-12 + 2 * step.rounding
            assert step.drift == 0

    check()


def test_alphas_of_adamw_are_the_closed_form_of_theorem_3_1():
    b1, b2, schedule = 0.8, 0.9, [({}, ["some"] * 4)] * 5
    steps, seen = recorded(torch.optim.AdamW, schedule, options={"betas": (b1, b2), "weight_decay": 0.2, "lr": 0.05})
    for name, declared in seen.items():
        gradients = [step.gradient for step, _ in declared]
        for s, step in enumerate(steps, 1):
            v = sum((1 - b2) * b2 ** (s - i) * gradients[i - 1] ** 2 for i in range(1, s + 1)) / (1 - b2**s)
            alphas = [(1 - b1) * b1 ** (s - i) / (1 - b1**s) for i in range(1, s + 1)]
            kernel = -sum(0.05 / (v.sqrt() + 1e-8) * a * g for a, g in zip(alphas, gradients, strict=False))
            equal(step.updates[name].kernel, kernel, name)
            equal(step.updates[name].regularization, -0.05 * 0.2 * step.theta_before[name], name)


def test_regularization_of_sgd_is_the_sum_of_corollary_3_2():
    mu, wd, schedule = 0.7, 0.2, [({"lr": 0.1 / s}, ["some"] * 4) for s in range(1, 6)]
    steps, _ = recorded(torch.optim.SGD, schedule, options={"momentum": mu, "weight_decay": wd})
    for s, step in enumerate(steps, 1):
        for name, split in step.updates.items():
            pulls = [mu ** (s - i) * wd * steps[i - 1].theta_before[name] for i in range(1, s + 1)]
            equal(split.regularization, -0.1 / s * sum(pulls), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "maximize": True}])
def test_what_a_used_optimizer_remembers_is_prehistory(kind, options):
    options = options | ({"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {})
    everything, some = ["some"] * 4, ["some", "none", "zero", "some"]
    used = {"options": options, "before": [({}, everything)] * 3}
    steps, seen = recorded(kind, [({}, everything), ({}, some), ({}, everything)], **used)
    for step in steps:
        assert step.error <= 1e-12 + 2 * step.rounding
        # Shape () too: its state looks like a step counter, and must not be taken for one.
        assert all(split.prehistory.abs().min() > 0 for split in step.updates.values())
    for name, declared in seen.items():  # the other two parts know nothing of what was before
        splits = [step.updates[name] for step in steps if name in step.updates]
        for split, kernel, regularization in zip(splits, *explicit_split(declared), strict=True):
            equal(split.kernel, kernel, name)
            equal(split.regularization, regularization, name)


def test_momentum_switched_off_freezes_what_was_remembered_and_on_again_uses_it():
    # Gradients only at the first step: all later kernel comes from the buffer.
    schedule = [({"momentum": mu}, ["some" if s == 0 else "zero"] * 4) for s, mu in enumerate([0.5, 0.0, 0.0, 0.5])]
    steps, seen = recorded(torch.optim.SGD, schedule)
    for name, declared in seen.items():
        gradient = declared[0][0].gradient
        for step, weight in zip(steps, [1.0, 0.0, 0.0, 0.5], strict=True):
            equal(step.updates[name].kernel, -0.1 * weight * gradient, name)


def test_a_parameter_keeps_its_own_clock():
    schedule = [({}, ["some"] * 4), ({}, ["none", "some", "none", "some"]), ({}, ["some"] * 4)]
    _, seen = recorded(torch.optim.AdamW, schedule)
    assert [step.clock for step, _ in seen["p0"]] == [1, 2]
    assert [step.step for step, _ in seen["p0"]] == [1, 3]
    assert [step.clock for step, _ in seen["p1"]] == [1, 2, 3]


def test_a_parameter_without_gradient_has_no_update():
    steps, _ = recorded(torch.optim.AdamW, [({"weight_decay": 0.5}, ["some", "none", "some", "none"])])
    assert set(steps[0].updates) == {"p0", "p2"}
    assert torch.equal(steps[0].theta["p1"], steps[0].theta_before["p1"])  # no decay either


def test_a_step_in_which_nothing_moves_has_no_error():
    steps, _ = recorded(torch.optim.SGD, [({}, ["zero"] * 4), ({}, ["none"] * 4)])
    assert [step.error for step in steps] == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_reports_its_rounding_and_no_more(kind):
    steps, _ = recorded(kind, [({}, ["some"] * 4)] * 5, dtype=torch.float32)
    for step in steps:
        # theta rounds twice at most (2 eps |theta|); the update itself is some 10 operations of relative eps = 1.2e-7.
        assert 0 < step.error <= 10 * torch.finfo(torch.float32).eps + 2 * step.rounding
        assert step.drift == 0


def test_a_first_step_may_be_chosen_and_nothing_before_it_is_forgotten():
    run = record_example(steps=5)
    whole, part = list(explaind.decompose(run)), list(explaind.decompose(run, first=3, last=4))
    assert [step.step for step in part] == [3, 4]
    for name in run.parameters:
        assert torch.equal(part[0].updates[name].kernel, whole[2].updates[name].kernel)


# ------------------------------------------------------------------ rules that are wrong
def sgd_rule(declare, states=()):
    """A rule for SGD that declares what ``declare(step)`` returns."""

    class Rule(explaind.UpdateRule):
        optimizers = ("torch.optim.sgd.SGD",)
        options = frozenset(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0).defaults)
        filter_states = states

        def coefficients(self, step):
            return declare(step)

    return Rule()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def with_rule(rule, *, make=sgd, before=0):
    """A run whose registry knows ``rule`` only; its optimizer makes some steps before recording begins."""

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return [rule]

    registry = Registry(discover=False)
    registry.register(Plugin, name="one rule")

    def used(parameters):
        optimizer = make(parameters)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(before):
            optimizer.step()
        return optimizer

    return record_example(steps=3, make_optimizer=used, registry=registry)


def test_a_rule_that_returns_something_else_is_named():
    with pytest.raises(errors.CoefficientError, match=r"Rule.coefficients returned something else[\s\S]*StepCoeffic"):
        list(explaind.decompose(with_rule(sgd_rule(lambda _: 0.1))))


def test_a_rule_that_divides_by_zero_is_named_with_its_step():
    def declare(step):
        weight = torch.full_like(step.theta, float("inf") if step.step == 2 else 1.0)
        return explaind.StepCoefficients(explaind.operators.Diagonal(weight))

    with pytest.raises(errors.CoefficientError, match=r"not finite[\s\S]*parameter '0.weight', step 2"):
        list(explaind.decompose(with_rule(sgd_rule(declare))))


def test_a_rule_that_forgets_a_state_is_named_with_its_step():
    def declare(step):
        filter_ = explaind.LinearFilter.momentum(0.9) if step.step == 1 else explaind.LinearFilter()
        return explaind.StepCoefficients(0.1, filter=filter_)

    with pytest.raises(errors.CoefficientError, match=r"lost a state[\s\S]*'0.weight', its step 2[\s\S]*A=1, B=0"):
        list(explaind.decompose(with_rule(sgd_rule(declare))))


def test_a_used_optimizer_needs_a_rule_that_names_its_filter_states():
    def declare(step):
        return explaind.StepCoefficients(0.1, filter=explaind.LinearFilter.momentum(0.9))

    with pytest.raises(errors.RecordingError, match=r"used optimizer[\s\S]*\['momentum_buffer'\][\s\S]*filter_states"):
        list(explaind.decompose(with_rule(sgd_rule(declare), before=2)))
    named = with_rule(sgd_rule(declare, states=("momentum_buffer",)), before=2)
    assert max(step.error for step in explaind.decompose(named)) < 1e-12


def test_a_used_optimizer_without_filter_needs_no_filter_states():
    class Adagrad(explaind.UpdateRule):
        optimizers = ("torch.optim.adagrad.Adagrad",)
        options = frozenset(torch.optim.Adagrad([nn.Parameter(torch.ones(1))]).defaults)

        def coefficients(self, step):
            denominator = step.after["sum"].sqrt() + step.hyper["eps"]
            return explaind.StepCoefficients(explaind.operators.Diagonal(step.hyper["lr"] / denominator))

    run = with_rule(Adagrad(), make=torch.optim.Adagrad, before=2)
    assert max(step.error for step in explaind.decompose(run)) < 1e-12


def test_a_state_that_is_filled_before_the_first_step_is_unused():
    """Adagrad fills its sum when it is made, and its clock stands at 0: nothing of a filter is lost there."""

    class Adagrad(explaind.UpdateRule):
        optimizers = ("torch.optim.adagrad.Adagrad",)
        options = frozenset(torch.optim.Adagrad([nn.Parameter(torch.ones(1))]).defaults)

        def coefficients(self, step):
            inert = explaind.LinearFilter(A=((0.0,),), B=(1.0,), C=(0.0,), D=1.0)
            weight = step.hyper["lr"] / (step.after["sum"].sqrt() + step.hyper["eps"])
            return explaind.StepCoefficients(explaind.operators.Diagonal(weight), filter=inert)

    def make(parameters, **options):
        return torch.optim.Adagrad(parameters, **options, initial_accumulator_value=0.1)

    fresh = with_rule(Adagrad(), make=make)
    assert max(step.error for step in explaind.decompose(fresh)) < 1e-12
    with pytest.raises(errors.RecordingError, match=r"used optimizer[\s\S]*\['sum'\]"):
        list(explaind.decompose(with_rule(Adagrad(), make=make, before=1)))
