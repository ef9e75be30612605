"""The sympy proofs of the rules for optimizers of other packages, and their refutations."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
import sympy

import explaind_optimizers as builtin
from explaind_core import StepCoefficients, UpdateRule
from explaind_core.errors import ProofError
from explaind_core.operators import Diagonal, OfReadout
from explaind_core.symbolic import Datum, SymbolicTensor, prove
from explaind_core.symbolic.algebra import is_zero
from explaind_core.symbolic.branches import Branch, Option, branches
from explaind_core.symbolic.proof import _Configured
from explaind_core.symbolic.recursion import configurations, hyper_parameters

ELSEWHERE = [rule for rule in builtin._RULES if not rule.optimizers[0].startswith("torch.optim")]
#: Whose filter's states are no entries of the optimizer's state: without a hypothesis, there is no induction.
FIRST_STEPS = {rule.__name__ for rule in ELSEWHERE if not rule.filter_states}


def test_which_rules_have_no_proof_or_only_one_of_the_first_steps():
    assert {rule.__name__ for rule in ELSEWHERE if rule.no_closed_form} == {"SOAPRule", "ShampooRule"}
    assert len(ELSEWHERE) == 23
    families = {"SGDScheduleFreeRule", "AdamWScheduleFreeRule", "AdamWScheduleFreePaperRule", "RAdamScheduleFreeRule"}
    assert families | {"AggMoRule"} == FIRST_STEPS


@pytest.mark.parametrize("rule", ELSEWHERE, ids=lambda rule: rule.__name__)
def test_every_rule_is_proved_or_says_why_not(rule):
    proof = prove(rule)
    assert proof.reason == rule.no_closed_form
    assert bool(proof.configurations) is proof.proved is not bool(rule.no_closed_form)
    for found in proof.configurations:
        assert found.every_step is (rule.__name__ not in FIRST_STEPS)
    if rule.alpha is not UpdateRule.alpha:
        assert any(found.compared for found in proof.configurations)


def test_formulas_of_two_states_and_of_signs():
    b1, b2, b3, a = sympy.symbols("beta1 beta2 beta3 alpha", positive=True)
    s, i = sympy.symbols("s i", integer=True, positive=True)
    ademamix, lion = (
        next(_Configured(rule(), c).prove(1) for c in configurations(rule()))
        for rule in (builtin.AdEMAMixRule, builtin.LionRule)
    )
    fast, slow = (1 - b1) * b1 ** (s - i) / (1 - b1**s), a * (1 - b3) * b3 ** (s - i)
    assert sympy.simplify(ademamix.alpha["s,i"] - fast - slow) == 0
    assert sympy.simplify(lion.alpha["s,i"] - b1 * (1 - b2) * b2 ** (s - i - 1)) == 0
    assert sympy.simplify(lion.alpha["s,s"] - (1 - b1)) == 0


# ------------------------------------------------------------------ wrong declarations are refuted
def wrong(base, change, **attributes):
    """A rule like ``base``, but for what ``change(step, right coefficients)`` returns."""

    def coefficients(self, step):
        return change(step, base.coefficients(self, step))

    return type("Wrong", (base,), {"coefficients": coefficients, **attributes})


def filtered(right, **changes):
    return replace(right, filter=replace(right.filter, **changes))


def two(step):
    return step.hyper["betas"][1]


#: What is wrong, the rule that has it wrong, and what its refutation must say, in this order.
WRONG = {
    "Lion reads out with the other beta": (
        wrong(builtin.LionRule, lambda step, right: filtered(right, C=(two(step),), D=1 - two(step))),
        ["coefficient of g_2, -P_2 alpha_{2,2} E_2", "step 2", "expected: -lr_2*(beta1_2*(1 - beta2_1)"],
    ),
    "Lion remembers with the other beta": (
        wrong(builtin.LionRule, lambda step, right: filtered(right, A=((step.hyper["betas"][0],),))),
        ["the filter's state and the optimizer's 'exp_avg'", "step 2"],
    ),
    "a sign that is made of the gradient alone": (
        wrong(
            builtin.TigerRule,
            lambda step, right: replace(
                right,
                preconditioner=OfReadout(lambda _: Diagonal(step.hyper["lr"] / step.gradient.abs()))
                if step.gradient != 0
                else right.preconditioner,
            ),
        ),
        ["step 1", "g_1 != 0", "expected", "got"],
    ),
    "the trust ratio behind the momentum": (
        wrong(
            builtin.LARSRule,
            lambda step, right: replace(
                right,
                preconditioner=right.gradient_operator * step.hyper["lr"],
                gradient_operator=1.0,
                coupled_decay=step.hyper["weight_decay"] if step.theta.ndim > 1 else 0.0,
            ),
            proved_for={"ndim": (2,), "momentum": (...,), "nesterov": (False,), "maximize": (False,)},
            filter_states=(),
        ),
        ["coefficient of g_1, -P_2 alpha_{2,1} E_1", "step 2", "expected", "theta_0**2", "got", "theta_1**2"],
    ),
    "vectors with a trust ratio": (
        wrong(
            builtin.LARSRule,
            lambda step, right: replace(right, gradient_operator=step.theta.norm() / step.gradient.norm()),
            proved_for={"ndim": (1,), "momentum": (0,), "nesterov": (False,), "maximize": (False,)},
        ),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1", "expected: -lr_1\n", "theta_0**2"],
    ),
    "the weight of another step": (
        wrong(
            builtin.SGDScheduleFreeRule,
            lambda step, right: (
                builtin.SGDScheduleFreeRule().coefficients(
                    replace(step, hyper={**step.hyper, "k": step.hyper["k"] + 1})
                )
                if "k" in step.hyper
                else right
            ),
        ),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1", "step 1; point=gradient, k=counted", "expected", "2**r_1"],
    ),
    "the other point": (
        wrong(
            builtin.AdamWScheduleFreeRule,
            lambda step, _: builtin.AdamWScheduleFreeRule().coefficients(replace(step, point="evaluated")),
        ),
        [
            "coefficient of g_2, -P_2 alpha_{2,2} E_2",
            "step 2; point=gradient",
            "expected",
            "weight_sum_2*beta1_2",
            "got",
        ],
    ),
    "no weight of the slow average": (
        wrong(
            builtin.AdEMAMixRule,
            lambda step, right: filtered(right, C=(right.filter.C[0], step.hyper["betas"][2])),
        ),
        ["coefficient of g_1, -P_2 alpha_{2,1} E_1", "step 2", "expected", "alpha_2*beta3_2*(1 - beta3_1)", "got"],
    ),
    "no clip": (
        wrong(
            builtin.SophiaHRule,
            lambda step, right: replace(
                right,
                preconditioner=Diagonal(step.hyper["lr"] / step.after["hessian_moment"].clamp(min=step.hyper["eps"])),
            ),
        ),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1", "step 1", "> 0", "expected", "p_1", "got", "hessian_moment_1"],
    ),
    "LAMB's trust ratio of the step before": (
        wrong(
            builtin.LambRule,
            lambda step, _: builtin.LambRule().coefficients(
                replace(step, after={**step.after, "trust_ratio": step.before.get("trust_ratio", 1.0)})
            ),
        ),
        ["coefficient of theta_0, -P_1 alpha_{1,1} W_1", "adam=False", "expected: -trust_ratio_1*weight_decay", "got"],
    ),
    "d of after the step": (
        wrong(
            builtin.ProdigyRule,
            lambda step, right: replace(right, gradient_operator=step.hyper_after["d"], coupled_decay=0.0),
        ),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1", "step 1", "expected: -d_1**2*", "got", "d_next_1"],
    ),
    "no average of rates": (
        wrong(builtin.LaPropRule, lambda _, right: replace(right, preconditioner=1.0)),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1"],
    ),
    "AggMo's sum": (
        wrong(builtin.AggMoRule, lambda step, right: replace(right, preconditioner=step.hyper["lr"] * 2)),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1", "expected: -lr_1", "got:      -2*lr_1"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_refuted_by_the_term_that_differs(name):
    rule, parts = WRONG[name]
    with pytest.raises(ProofError, match=r"^what Wrong declares is not ") as caught:
        prove(rule)
    message = str(caught.value)
    for part in parts:
        assert part in message
        message = message[message.index(part) :]
    assert caught.value.expected != caught.value.got


def test_a_sign_without_a_value_at_zero_is_not_taken_for_proved():
    unguarded = wrong(
        builtin.TigerRule,
        lambda step, right: replace(right, preconditioner=OfReadout(lambda m: Diagonal(step.hyper["lr"] / m.abs()))),
    )
    with pytest.raises(ProofError, match=r"^what Wrong declares could not be proved .*the update as a whole"):
        prove(unguarded)


def test_signs_of_hyper_parameters_are_taken_out_of_magnitudes_where_they_have_one():
    x, (a, b) = Datum("x", real=True), sympy.symbols("a b", positive=True)
    assert is_zero(sympy.sign((a - 1) * x) + sympy.sign(x), Branch())
    assert is_zero(sympy.Abs((a * b - b) * x) - (1 - a) * b * sympy.Abs(x), Branch())
    assert is_zero(sympy.sign((a - b) * x) + sympy.sign(x), Branch()) is False


def test_what_is_zero_is_solved_and_put_in():
    x, y, a = Datum("x", real=True), Datum("y", real=True), sympy.Symbol("a", positive=True)

    def run(branch):
        if SymbolicTensor((1 - a) * (a * x + y)) != 0:
            return branch.facts(sympy.sign(a * (a * x + y)))
        return branch.facts(sympy.Abs(a**2 * x + a * y) + x)

    zero, other = (found for _, found in branches(run))
    assert zero == -y / a
    assert sympy.simplify(other - (a * x + y) / sympy.Abs(a * x + y)) == 0


# ------------------------------------------------------------------ what a configuration may say
class Counting(UpdateRule):
    """Whose rate falls with the group's own count, from an option that one package does not have."""

    options = frozenset({"lr", "step", "scale"})
    proved_for = MappingProxyType({"step": (lambda s: s - 1,), "lr scale": ((..., 2), (..., NotImplemented))})

    def coefficients(self, step):
        rate = step.hyper["lr"] * step.hyper.get("scale", 1)
        return StepCoefficients(preconditioner=rate / (step.hyper["step"] + 1))

    def recursion(self, step):
        rate = 2 * step.hyper["lr"] if "scale" in step.hyper else step.hyper["lr"]
        return step.theta - rate / step.step * step.gradient


def test_counters_options_that_are_absent_and_options_taken_together():
    proof = prove(Counting)
    assert [c.options["scale"] for c in proof.configurations] == [2, NotImplemented]
    assert all(c.every_step for c in proof.configurations)
    assert "scale: 2 or absent" in str(proof)
    late = type("Late", (Counting,), {"recursion": lambda _, step: step.theta - step.hyper["lr"] * step.gradient})
    with pytest.raises(ProofError, match=r"Late declares is not its recursion.*(?s:.*scale=2)"):
        prove(late)


class Axes(UpdateRule):
    """Which updates vectors only."""

    options = frozenset({"lr"})
    proved_for = MappingProxyType({"ndim": (1, 2)})

    def coefficients(self, step):
        return StepCoefficients(preconditioner=step.hyper["lr"] if step.gradient.ndim == 1 else 0.0)

    def recursion(self, step):
        return step.theta if step.theta.ndim == 2 else step.theta - step.hyper["lr"] * step.gradient


def test_the_number_of_axes_is_none_of_the_options():
    assert [c.options for c in prove(Axes).configurations] == [{"ndim": 1}, {"ndim": 2}]
    assert hyper_parameters(Axes(), {"ndim": 2}) == {"lr": SymbolicTensor(Option("lr", positive=True))}
