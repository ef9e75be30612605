"""Every rule against its optimizer through the conformance kit, and the kit against rules that are wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.conformance.search import ConformanceError, check_trials
from explaind_core.naming import qualified_name
from explaind_core.plugins import default_registry
from explaind_core.rules.trials import find_optimizer
from explaind_core.testing import Case, check_update_rule, run_case
from explaind_optimizers import _RULES, AdamRule, NAdamRule, RMSpropRule, SGDRule

RULES = {type(rule()).__name__: rule() for rule in _RULES if rule.optimizers[0].startswith("torch.")}
FAMILIES = [
    pytest.param(name, trials, id=f"{name}{f' ({trials.name})' if trials.name else ''}")
    for name in RULES
    for trials in default_registry().trials_for(RULES[name])
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own Adagrad
@pytest.mark.parametrize(("name", "trials"), FAMILIES)
def test_the_declaration_is_exact(name, trials):
    report = check_trials(RULES[name], trials, max_examples=30)
    assert report.one_step <= trials.tolerance
    assert report.store == 0
    assert report.cases >= 37
    assert report.refused == 0
    assert report.one_step_float32 < 1e-4  # reported; rounding, and what 1 / eps (or L-BFGS's 1 / <y, s>) makes of it


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("name", "trials"), FAMILIES)
def test_the_declaration_is_exact_in_the_long_run(name, trials):
    report = check_trials(RULES[name], trials, max_examples=300)
    assert report.cases >= 375
    assert report.one_step <= trials.tolerance


def test_a_centred_variance_that_underflows_is_zero():
    """In single precision g^2 is 0 where (the average of g)^2, in double precision, is not."""
    torch.manual_seed(0)
    theta = nn.Parameter(torch.randn(3))
    theta.grad = torch.full((3,), 1e-25)
    before = theta.detach().double()
    optimizer = torch.optim.RMSprop([theta], centered=True)
    optimizer.step()
    after = {k: v.double() for k, v in optimizer.state[theta].items()}
    step = explaind.RecordedStep(
        "theta", 1, 1, optimizer.param_groups[0], before, theta.grad.double(), theta.detach().double() - before, {},
        after, torch.float32,
    )  # fmt: skip
    assert torch.isfinite(RMSpropRule().coefficients(step).gradient_operator.weight).all()


def test_every_optimizer_of_torch_has_a_rule():
    known = {n for rule in RULES.values() for n in rule.optimizers}
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)]
    missing = {qualified_name(kind) for kind in kinds if kind is not torch.optim.Optimizer} - known
    assert not missing


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_option_is_modelled_or_refused_by_name(name):
    """No option of the installed version is left unsaid; the trials draw every one that is modelled."""
    kind = find_optimizer(RULES[name])
    options = set(kind([nn.Parameter(torch.ones(2, 2))]).defaults)
    rule = RULES[name]
    unsaid = options - rule.options - set(rule.fixed)
    for option in unsaid:
        with pytest.raises(explaind.errors.UnsupportedOptionError, match=option):
            rule.check_options({option: "something"}, [option])
    drawn = set()
    for trials in default_registry().trials_for(rule):
        for key, strategy in trials.hyper.items():
            drawn |= set().union(*strategy_keys(strategy)) if key.startswith("*") else {key}
        drawn |= set(trials.scheduled)
    left = (options & rule.options) - drawn
    assert left <= {"foreach", "fused"} | LEFT.get(name, set())


#: Options that the trials leave alone: numerical constants of Newton-Schulz, and what AdamW's constructor fixes.
LEFT = {"MuonRule": {"ns_coefficients", "eps"}, "AdamWRule": {"decoupled_weight_decay"}}


def strategy_keys(strategy):
    return [set(element) for element in getattr(strategy, "elements", ())] or [set()]


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
    line = next(line for line in code.splitlines() if line.startswith("print(run_case("))
    case = eval(line[line.index("Case(") : -2], {"Case": Case})
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
