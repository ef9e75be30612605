"""Options outside of parameter groups: told when untested, compared with their defaults when a run is recorded."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import UnsupportedOptionError
from explaind_core.rules.held_options import constructor_options, held_options, is_same
from explaind_core.testing import check_plugin, record_example


def halved(gradient):
    return gradient / 2


def unchanged(gradient):
    return gradient


class Holding(torch.optim.Optimizer):
    """Descent with options in its groups, and others that its groups do not tell."""

    def __init__(
        self, params, lr=0.1, weight_decay=0.0, *, transform=unchanged, maximize=False, power=1.0, every=None, scale=1.0
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.transform = transform  # a callable
        self._maximize = maximize  # an attribute with another underscore
        self.strength = power  # an attribute of another name
        self.every = 1 if every is None else every  # what the constructor makes of a default is something else
        self.hidden = [scale]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    g = self.transform(p.grad) * self.strength * self.hidden[0]
                    p.sub_(group["lr"] * ((-g if self._maximize else g) + group["weight_decay"] * p))


class HoldingRule(explaind.UpdateRule):
    optimizers = (f"{Holding.__module__}.Holding",)
    options = frozenset({"lr", "weight_decay"})

    def coefficients(self, step):
        return explaind.StepCoefficients(preconditioner=step.hyper["lr"], coupled_decay=step.hyper["weight_decay"])

    def recursion(self, step):
        return step.theta - step.hyper["lr"] * (step.gradient + step.hyper["weight_decay"] * step.theta)


OFF = [
    ({"transform": halved}, "transform", "'transform'", "unchanged", "halved"),
    ({"maximize": True}, "maximize", "'_maximize'", "False", "True"),
    ({"power": 2.0}, "power or scale", "'strength'", "1.0", "2.0"),
    ({"every": 3}, "every", "'every'", "None", "3"),
]


def recorded(rule=None, **options):
    return record_example(steps=3, make_optimizer=lambda p: Holding(p, **options), rule=rule or HoldingRule())


@pytest.mark.parametrize(("options", "name", "attribute", "default", "value"), OFF)
def test_an_option_held_aside_that_no_rule_models_is_refused_by_name(options, name, attribute, default, value):
    with pytest.raises(UnsupportedOptionError) as caught:
        recorded(**options)
    text = str(caught.value)
    assert f"HoldingRule does not model the option {name}={value}" in text
    assert f"where:    attribute {attribute} of " in text
    assert f"expected: {name}={default}, as by default" in text
    assert f"got:      {name}={value}" in text
    assert "remedy:   train without this option, or model it" in text


def test_a_list_that_holds_an_option_is_compared_too():
    with pytest.raises(UnsupportedOptionError, match=r"attribute 'hidden'"):
        recorded(scale=3.0)


@pytest.mark.parametrize("options", [{}, {"every": 1}, {"transform": unchanged}, {"power": 1, "maximize": 0}])
def test_at_their_defaults_nothing_is_refused_and_the_run_closes(options):
    run = recorded(**options)
    assert max(step.error for step in explaind.decompose(run)) < 1e-14


def test_a_rule_that_models_one_is_not_refused_and_closes():
    class Modelling(HoldingRule):
        options = HoldingRule.options | {"maximize"}
        attributes = {"maximize": "_maximize"}  # noqa: RUF012

        def coefficients(self, step):
            ascent = -1.0 if step.hyper["maximize"] else 1.0
            return explaind.StepCoefficients(
                preconditioner=step.hyper["lr"],
                gradient_operator=ascent,
                coupled_decay=step.hyper["weight_decay"],
            )

    run = recorded(rule=Modelling(), maximize=True)
    assert max(step.error for step in explaind.decompose(run)) < 1e-14
    with pytest.raises(UnsupportedOptionError, match="transform=halved"):
        recorded(rule=Modelling(), maximize=True, transform=halved)


def test_values_that_a_rule_lists_as_fixed_are_the_ones_that_pass():
    class Narrow(HoldingRule):
        fixed = {"every": (1, 2)}  # noqa: RUF012

    recorded(rule=Narrow(), every=2)
    with pytest.raises(UnsupportedOptionError, match=r"expected: every=1 or 2"):
        recorded(rule=Narrow(), every=3)


def test_an_option_changed_during_training_is_refused_before_its_step(tmp_path):
    model = nn.Linear(2, 1).double()
    optimizer = Holding(model.parameters())
    x = torch.ones(3, 2, dtype=torch.float64)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        recorder.batch(x, None, ids=range(3))
        optimizer.step()

    with explaind.Recorder(tmp_path / "run", model, optimizer, rule=HoldingRule()) as recorder:
        step()
        optimizer.transform = halved
        with pytest.raises(UnsupportedOptionError, match="transform=halved"):
            step()
        recorder.discard_batch()
        assert recorder.steps == 1


def test_an_inferred_rule_knows_no_option_and_refuses_none():
    optimizer = Holding([nn.Parameter(torch.ones(1))], transform=halved)
    explaind.InferredRule().check_held_options(optimizer, unused=True)


def test_attributes_that_training_itself_changes_are_no_options():
    class Counting(Holding):
        def __init__(self, params, lr=0.1, warm=0):
            super().__init__(params, lr=lr)
            self.calls = warm

        def step(self, closure=None):
            self.calls += 1
            self.state.setdefault(self.param_groups[0]["params"][0], {})["t"] = torch.tensor(self.calls)
            super().step(closure)

    parameter = nn.Parameter(torch.ones(1))
    used = Counting([parameter])
    parameter.grad = torch.ones(1)
    used.step()
    assert list(held_options(used, {"lr", "weight_decay"}, unused=not used.state)) == []
    assert [h.attribute for h in held_options(Counting([parameter], warm=3), (), unused=True)] == ["calls"]


def test_a_scheduler_and_hooks_are_no_options():
    optimizer = Holding([nn.Parameter(torch.ones(1))])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_pre_hook(lambda *_: None)
    assert list(held_options(optimizer, (), unused=True)) == []


def test_an_optimizer_that_cannot_be_made_anew_is_compared_with_its_signature():
    class Needy(torch.optim.SGD):
        def __init__(self, params, model, lr=0.1, scale=1.0):
            super().__init__(params, lr=lr)
            self.scale = scale

    parameters = [nn.Parameter(torch.ones(1))]
    assert list(held_options(Needy(parameters, nn.Linear(1, 1)), (), unused=True)) == []
    (held,) = held_options(Needy(parameters, nn.Linear(1, 1), scale=2.0), (), unused=True)
    assert (held.option, held.attribute, held.value, held.default) == ("scale", "scale", 2.0, 1.0)


def test_options_that_go_through_to_a_base_class_are_seen():
    class Passing(Holding):
        def __init__(self, params, extra=0, **rest):
            super().__init__(params, **rest)
            self.extra = extra

    assert {"extra", "lr", "transform", "scale"} <= set(constructor_options(Passing))
    (held,) = held_options(Passing([nn.Parameter(torch.ones(1))], maximize=True), ())
    assert held.option == "maximize"


def test_what_a_base_class_is_handed_is_no_option():
    lion = pytest.importorskip("pytorch_optimizer").Lion
    assert "lr" in constructor_options(lion)
    assert "defaults" not in constructor_options(lion)  # of its base class, through **kwargs


def test_values_are_compared_by_what_they_are():
    assert is_same(torch.tensor(0.5, dtype=torch.float64), 0.5)
    assert not is_same(torch.tensor([1.0, 2.0]), 1.0)
    assert not is_same(lambda: 0, lambda: 0)
    assert not is_same([1, 2], (1, 3))


# ------------------------------------------------------------------ check-plugin
@pytest.fixture
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, Holding.__module__, sys.modules[__name__])


def test_check_plugin_lists_what_it_left_alone(importable):
    verdict = check_plugin(HoldingRule, max_examples=10)
    assert verdict.untested == verdict.unmodelled == ("transform", "maximize", "power", "every", "scale")
    assert verdict.unseen == ("power", "scale")
    text = " ".join(str(verdict).split())
    assert "left at their defaults, untested: transform, maximize, power, every, scale" in text
    assert "not named by the rule, refused in a recording unless at their defaults: transform," in text
    assert "neither in the parameter groups nor an attribute of that name: power, scale" in text
    assert verdict.holds


def test_trials_that_a_plugin_gives_hide_no_untested_option(importable):
    from explaind_core.plugins import Registry
    from explaind_core.testing import Trials

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_trials():
            return [Trials(Holding)]  # which draws nothing but learning rates

    registry = Registry(discover=False)
    registry.register(Plugin, name="a plugin")
    assert set(check_plugin(HoldingRule, max_examples=3, registry=registry).untested) >= {"weight_decay", "transform"}


def test_a_rule_that_claims_an_option_it_cannot_see_is_refuted(importable):
    """It lists maximize, which is drawn then; its step does not know of it."""

    class Claims(HoldingRule):
        options = HoldingRule.options | {"maximize"}

    verdict = check_plugin(Claims, max_examples=10)
    assert not verdict.exact
    assert "maximize" in verdict.families[0].refuted
