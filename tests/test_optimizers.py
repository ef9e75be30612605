"""Every rule against its optimizer through the conformance kit, and the kit against rules that are wrong."""

from __future__ import annotations

import pytest
import torch
from explaind_optimizers import _RULES, AdamRule, NAdamRule, RMSpropRule, SGDRule
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.coefficients import qualified_name
from explaind_core.conformance import Case, ConformanceError, run_case
from explaind_core.testing import check_update_rule

HYPER = {
    torch.optim.SGD: {
        "lr": st.floats(1e-4, 1.0),
        "momentum": st.sampled_from([0.0, 0.5, 0.99]),
        "dampening": st.sampled_from([0.0, 0.3]),
        "nesterov": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
        "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    },
    torch.optim.Adam: {
        "lr": st.floats(1e-4, 1.0),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.98]), st.sampled_from([0.0, 0.9, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    },
}
HYPER[torch.optim.AdamW] = HYPER[torch.optim.Adam]
COMMON = {
    "lr": st.floats(1e-4, 1.0),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "maximize": st.booleans(),
    "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}]),
}
BETAS = st.tuples(st.sampled_from([0.1, 0.5, 0.98]), st.sampled_from([0.5, 0.9, 0.999]))
HYPER |= {
    torch.optim.Adagrad: COMMON
    | {
        "lr_decay": st.sampled_from([0.0, 0.3]),
        "initial_accumulator_value": st.sampled_from([0.0, 0.1]),
        "kernel": st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    },
    torch.optim.Adadelta: COMMON | {"rho": st.sampled_from([0.0, 0.9]), "eps": st.sampled_from([1e-6, 1e-2])},
    torch.optim.Adamax: COMMON | {"betas": BETAS},
    torch.optim.NAdam: COMMON
    | {"betas": BETAS, "momentum_decay": st.sampled_from([4e-3, 0.1]), "decoupled_weight_decay": st.booleans()},
    torch.optim.RAdam: COMMON | {"betas": BETAS, "decoupled_weight_decay": st.booleans()},
    torch.optim.RMSprop: COMMON
    | {
        "alpha": st.sampled_from([0.5, 0.99]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "centered": st.booleans(),
        "momentum": st.sampled_from([0.0, 0.9]),
    },
    torch.optim.Rprop: {n: v for n, v in COMMON.items() if n != "weight_decay"},
    torch.optim.ASGD: COMMON | {"lambd": st.sampled_from([1e-4, 0.1]), "t0": st.sampled_from([1e6, 2.0])},
    torch.optim.Adafactor: COMMON
    | {"d": st.sampled_from([1.0, 2.0]), "eps": st.sampled_from([(None, 1e-3), (1e-5, 0.5)])},
}
SCHEDULED = {
    "lr": st.floats(1e-4, 1.0),
    "momentum": st.sampled_from([0.0, 0.9]),
    "betas": BETAS,
    "eps": st.sampled_from([1e-8, 1e-3]),
    "weight_decay": st.floats(0, 0.2),
    "dampening": st.sampled_from([0.0, 0.5]),
    "lambd": st.floats(0, 0.1),
    "rho": st.floats(0, 0.9),
    "alpha": st.floats(0.1, 0.9),
    "lr_decay": st.floats(0, 0.5),
    "maximize": st.booleans(),
}
#: What an optimizer itself cannot have changed, or left out, in the middle of a run.
CONSTANT = {torch.optim.RMSprop: {"momentum"}, torch.optim.Adafactor: {"eps"}}
RULES = {name: rule for rule in _RULES for name in rule.optimizers}


def maker(kind, hyper):
    """Flattens the drawn implementation switch, and mends combinations that torch refuses."""

    def make(groups, kernel=None, **options):
        if options.get("nesterov") and (options["momentum"] == 0 or options["dampening"] != 0):
            options["nesterov"] = False
        return kind(groups, **options, **(kernel or {}))

    return make


def check(kind, max_examples):
    hyper = dict(HYPER[kind])
    defaults = kind([nn.Parameter(torch.ones(1, 1))]).defaults
    scheduled = {n: s for n, s in SCHEDULED.items() if n in defaults and n not in CONSTANT.get(kind, ())}
    presence = ["yes", "yes", "none", "zero", "some zeros"]
    if kind is torch.optim.SGD:  # torch's fused SGD fails by itself where a momentum buffer is missing
        hyper["kernel"] = st.sampled_from([{}, {"foreach": True}, {"foreach": False}])
    return check_update_rule(
        RULES[qualified_name(kind)],
        maker(kind, hyper),
        hyper=hyper,
        scheduled=scheduled,
        presence=presence,
        max_examples=max_examples,
    )


@pytest.mark.parametrize("kind", list(HYPER), ids=lambda kind: kind.__name__)
def test_the_declaration_is_exact(kind):
    report = check(kind, max_examples=40)
    assert report.one_step <= 1e-14
    assert report.cases >= 50
    assert report.one_step_float32 < 1e-5  # reported; rounding, and whatever P = 1 / eps makes of it


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(HYPER), ids=lambda kind: kind.__name__)
def test_the_declaration_is_exact_in_the_long_run(kind):
    assert check(kind, max_examples=300).one_step <= 1e-14


def test_fused_sgd_is_exact():
    hyper = HYPER[torch.optim.SGD] | {"kernel": st.just({"fused": True})}
    check_update_rule(SGDRule, maker(torch.optim.SGD, hyper), hyper=hyper, presence=["yes", "zero"], max_examples=20)


# ------------------------------------------------------------------ the kit must be able to fail
class NoMomentum(SGDRule):
    def coefficients(self, step):
        return explaind.StepCoefficients(preconditioner=step.hyper["lr"])


class DividesBehindTheMomentum(RMSpropRule):
    def coefficients(self, step):
        right = super().coefficients(step)
        return explaind.StepCoefficients(
            filter=right.filter,
            preconditioner=right.gradient_operator @ right.preconditioner,
            coupled_decay=step.hyper["weight_decay"],
        )


class ForgetsTheProduct(NAdamRule):
    """mu_product recomputed in float64: off by 1e-9, as torch keeps it in single precision."""

    def coefficients(self, step):
        if not hasattr(step.after, "_entries"):
            return super().coefficients(step)
        product = 1.0
        beta1, decay = step.hyper["betas"][0], step.hyper["momentum_decay"]
        for t in range(1, step.clock + 1):
            product *= beta1 * (1 - 0.5 * 0.96 ** (t * decay))
        step.after._entries["mu_product"] = torch.tensor(product, dtype=torch.float64)
        return super().coefficients(step)


class WrongSign(AdamRule):
    def coefficients(self, step):
        right = super().coefficients(step)
        return explaind.StepCoefficients(
            filter=right.filter, preconditioner=right.preconditioner, coupled_decay=-1 * right.coupled_decay
        )


@pytest.mark.parametrize(
    ("rule", "kind", "hyper"),
    [
        (NoMomentum, torch.optim.SGD, {"momentum": st.just(0.9)}),
        (DividesBehindTheMomentum, torch.optim.RMSprop, {"momentum": st.just(0.9)}),
        (ForgetsTheProduct, torch.optim.NAdam, {}),
        (WrongSign, torch.optim.Adam, {"weight_decay": st.just(0.1)}),
    ],
)
def test_a_wrong_declaration_is_refuted_by_the_smallest_case_as_code(rule, kind, hyper):
    with pytest.raises(
        ConformanceError, match=rf"{rule.__name__} does not explain {kind.__name__}: one_step error"
    ) as caught:
        check_update_rule(rule, kind, hyper=hyper, max_examples=30)
    code = str(caught.value)
    case = eval(code[code.index("Case(options") : code.index("))", code.index("seed=")) + 1], {"Case": Case})
    assert len(case.schedule) <= 3  # shrunk
    assert run_case(rule(), kind, case).one_step > 1e-14


def test_an_adjoint_that_is_none_is_refuted():
    class Lopsided(explaind.operators.Diagonal):
        @property
        def adjoint(self):
            return explaind.operators.Diagonal(2 * self.weight)

    class Rule(SGDRule):
        def coefficients(self, step):
            return explaind.StepCoefficients(preconditioner=Lopsided(torch.full_like(step.theta, step.hyper["lr"])))

    with pytest.raises(ConformanceError, match="adjoints error"):
        check_update_rule(Rule, torch.optim.SGD, max_examples=5)


def test_what_the_declaration_leaves_out_shows_up_as_error():
    class Forgetful(explaind.UpdateRule):
        optimizers = ("torch.optim.sgd.SGD",)
        options = frozenset(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0).defaults)

        def coefficients(self, step):
            return explaind.StepCoefficients(preconditioner=step.hyper["lr"])  # no momentum

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return [Forgetful()]

    from explaind_core.plugins import Registry
    from explaind_core.testing import record_example

    registry = Registry(discover=False)
    registry.register(Plugin, name="forgetful")
    run = record_example(steps=4, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), registry=registry)
    errors = [split.error for split in explaind.decompose(run)]
    assert errors[0] < 1e-12  # the first step has no past
    assert min(errors[1:]) > 0.1
