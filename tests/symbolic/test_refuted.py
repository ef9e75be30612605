"""Proofs must be able to fail: wrong declarations are refuted by the term that is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import explaind_optimizers as builtin
from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import ProofError
from explaind_core.operators import Diagonal
from explaind_core.symbolic import prove


def wrong(base, change, **attributes):
    """A rule like ``base``, but for what ``change(step, right coefficients)`` returns."""

    def coefficients(self, step):
        return change(step, base.coefficients(self, step))

    return type("Wrong", (base,), {"coefficients": coefficients, **attributes})


def filtered(right, **changes):
    return replace(right, filter=replace(right.filter, **changes))


def beta(step):
    return step.hyper["betas"][0]


#: What is wrong, the rule that has it wrong, and what its refutation must say, in this order.
WRONG = {
    "power of beta in what is read out": (
        wrong(builtin.AdamWRule, lambda step, right: filtered(right, C=(right.filter.C[0] * beta(step),))),
        ["coefficient of g_1, -P_2 alpha_{2,1} E_1", "step 2; amsgrad=False", "*beta1_2*(1 -", "*beta1_2**2*(1 -"],
    ),
    "power of beta in what is remembered": (
        wrong(builtin.AdamWRule, lambda step, right: filtered(right, A=((beta(step) ** 2,),))),
        ["the filter's state and the optimizer's 'exp_avg'", "step 2"],
    ),
    "no bias correction": (
        wrong(builtin.AdamWRule, lambda step, right: replace(right, filter=LinearFilter.ema(beta(step)))),
        ["coefficient of g_1, -P_1 alpha_{1,1} E_1", "step 1"],
    ),
    "sign of the decay": (
        wrong(builtin.AdamWRule, lambda _, right: replace(right, decoupled_decay=-1 * right.decoupled_decay)),
        ["coefficient of theta_0, -P_1 alpha_{1,1} W_1 - rho_1", "expected: -lr_1*weight_d", "got:      lr_1*weight_d"],
    ),
    "the current learning rate": (
        wrong(builtin.ASGDRule, lambda step, right: replace(right, preconditioner=step.hyper["lr"])),
        ["coefficient of g_2, -P_2 alpha_{2,2} E_2", "step 2", "expected: -eta_1\n", "got:      -lr_2\n"],
    ),
    "decay inside the filter": (
        wrong(
            builtin.AdamWRule,
            lambda step, right: replace(right, decoupled_decay=0.0, coupled_decay=step.hyper["weight_decay"]),
        ),
        ["coefficient of theta_0, -P_1 alpha_{1,1} W_1 - rho_1", "got", "exp_avg_sq_1"],
    ),
    "decay outside the filter": (
        wrong(
            builtin.SGDRule,
            lambda step, right: replace(
                right, coupled_decay=0.0, decoupled_decay=step.hyper["lr"] * step.hyper["weight_decay"]
            ),
            proved_for={"momentum": (...,), "dampening": (0,), "nesterov": (False,), "maximize": (False,)},
            filter_states=(),
        ),
        [
            "coefficient of theta_0, -P_2 alpha_{2,1} W_1",
            "step 2",
            "expected: -lr_2*weight_decay_1*momentum_2",
            "got:      0",
        ],
    ),
    "the division behind the momentum": (
        wrong(
            builtin.RMSpropRule,
            lambda step, right: StepCoefficients(
                filter=right.filter,
                preconditioner=right.gradient_operator @ right.preconditioner,
                coupled_decay=step.hyper["weight_decay"],
            ),
            proved_for={"momentum": (...,), "centered": (False,), "maximize": (False,)},
            filter_states=(),
        ),
        ["coefficient of g_1, -P_2 alpha_{2,1} E_1", "expected", "square_avg_1", "got", "square_avg_2"],
    ),
    "a buffer that is lost where momentum is 0 for a while": (
        wrong(builtin.SGDRule, lambda step, right: right if step.hyper["momentum"] else filtered(right, A=((0.0,),))),
        ["'momentum_buffer'", "step 2; momentum=any then 0 then any"],
    ),
    "the average instead of the largest": (
        wrong(
            builtin.AdamRule,
            lambda step, _: builtin.AdamRule().coefficients(replace(step, hyper={**step.hyper, "amsgrad": False})),
        ),
        ["step 2; amsgrad=True", "expected", "(max_exp_avg_sq_2", "got", "(exp_avg_sq_2"],
    ),
    "the optimizer's count instead of the parameter's": (
        wrong(builtin.AdamWRule, lambda step, _: builtin.AdamWRule().coefficients(replace(step, clock=step.step))),
        ["coefficient of g_2, -P_2 alpha_{2,2} E_2", "expected", "beta1_2**2", "got", "beta1_2**3"],
    ),
    "the rectified phase, which no first step is in": (
        wrong(
            builtin.RAdamRule,
            lambda _, right: (
                replace(right, preconditioner=right.preconditioner * 2.0)
                if isinstance(right.preconditioner, Diagonal)
                else right
            ),
        ),
        ["coefficient of g_t", "step t", "> 0", "got:      -2*"],
    ),
    "a step where the sign has changed": (
        wrong(
            builtin.RpropRule,
            lambda step, right: (
                replace(right, preconditioner=Diagonal(step.after["step_size"] / step.gradient.abs()))
                if step.gradient != 0
                else right
            ),
        ),
        ["step 2", "-g_1*g_2 > 0", "expected: 0"],
    ),
    "no relative step size": (
        wrong(builtin.AdafactorRule, lambda step, right: replace(right, preconditioner=step.hyper["lr"])),
        ["coefficient of g_1", "mean(theta_0**2)"],
    ),
    "what was observed": (
        wrong(
            builtin.AdagradRule,
            lambda step, right: replace(right, preconditioner=Diagonal(-step.displacement / step.gradient)),
        ),
        ["expected", "sum_1"],
    ),
    "alpha one power off": (
        type("Wrong", (builtin.AdamWRule,), {"alpha": lambda _, s, i, h: builtin.AdamRule().alpha(s + 1, i, h)}),
        ["the closed form in its alpha(): alpha_{s,i}", "expected: beta1**(s - i)", "got:      beta1**(s + 1 - i)"],
    ),
    "alpha without dampening": (
        type("Wrong", (builtin.SGDRule,), {"alpha": lambda _, s, i, h: h["momentum"] ** (s - i)}),
        ["the closed form in its alpha(): alpha_{s,i}", "momentum=any, nesterov=False", "dampening"],
    ),
    "another entry named as the filter's": (
        type("Wrong", (builtin.AdamWRule,), {"filter_states": ("exp_avg_sq",)}),
        ["the optimizer's 'exp_avg_sq', which filter_states names"],
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


def test_what_can_be_neither_proved_nor_refuted_is_said_to_be_so():
    """Where the gradient is 0, the declared P_s = size / |g| has no value: no numbers show a difference."""
    rule = wrong(
        builtin.RpropRule,
        lambda step, right: replace(right, preconditioner=Diagonal(step.after["step_size"] / step.gradient.abs())),
    )
    with pytest.raises(ProofError, match=r"^what Wrong declares could not be proved to be its recursion"):
        prove(rule)


def test_the_same_in_another_form_is_proved():
    """v is computed anew, and its root taken in parts: only with the states expanded are both the same."""

    def anew(step, right):
        b, zero = step.hyper["betas"][1], torch.zeros_like(step.theta)
        v = torch.lerp(step.before.get("exp_avg_sq", zero), step.gradient.square(), 1 - b)
        if step.hyper["amsgrad"]:
            v = torch.maximum(step.before.get("max_exp_avg_sq", zero), v)
        root = torch.sqrt(v) / (1 - b**step.clock) ** 0.5
        return replace(right, preconditioner=Diagonal(step.hyper["lr"] / (root + step.hyper["eps"])))

    fewer = {**builtin.AdamWRule.proved_for, "maximize": (True,)}
    assert prove(wrong(builtin.AdamWRule, anew, proved_for=fewer), steps=2).proved


# ------------------------------------------------------------------ what the author is told
class Bare(UpdateRule):
    options = frozenset({"lr", "momentum"})

    def coefficients(self, step):
        return StepCoefficients(preconditioner=step.hyper["lr"])

    def recursion(self, step):
        return step.theta - step.hyper["lr"] * step.gradient


def test_a_rule_without_a_recursion_is_told_what_to_write():
    class Silent(UpdateRule):
        def coefficients(self, step):
            raise AssertionError

    with pytest.raises(ProofError, match=r"(?s)Silent has no recursion.*recursion\(self, step\).*no_closed_form"):
        prove(Silent())
    Silent.no_closed_form = "it is a secret"
    assert prove(Silent).reason == "it is a secret"
    assert not prove(Silent).proved
    assert "it is a secret" in str(prove(Silent))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda step: float(step.hyper["lr"]), r"(?s)Bare.coefficients does not run on symbols: float\(\).*x.item\(\)"),
        (lambda step: step.hyper["lr"] if step.hyper["momentum"] else 0.0, r"(?s)momentum_1 is zero.*proved_for"),
        (lambda step: step.hyper["lr"] if step.hyper["momentum"] > 0 else 0.0, r"(?s)momentum_1 is zero.*proved_for"),
        (lambda step: torch.fft.fft(step.gradient), r"torch.fft_fft is not among the operations"),
        (lambda step: step.gradient.cholesky(), r"no attribute 'cholesky'"),
        (lambda step: step.gradient.mean(dim=-1), r"no axes"),
        (lambda step: step.gradient.norm(3), r"a norm that the proof does not know"),
        (lambda step: step.after["m"], r"the state after the step, by the rule's recursion, has no entry 'm'"),
        (lambda step: step.hyper["rate"], r"the parameter group has no entry 'rate'"),
        (lambda step: range(step.gradient), r"a whole number is needed"),
    ],
)
def test_what_does_not_run_on_symbols_is_named(body, message):
    rule = type("Bare", (Bare,), {"coefficients": lambda _, step: StepCoefficients(preconditioner=body(step))})
    with pytest.raises(ProofError, match=message):
        prove(rule)


def test_too_many_cases_are_refused():
    def recursion(_, step):
        questions = [step.gradient + k * step.theta > 0 for k in range(10)]
        return step.theta - step.hyper["lr"] * step.gradient * (1 + 0 * sum(questions))

    with pytest.raises(ProofError, match="more than 500 cases"):
        prove(type("Bare", (Bare,), {"recursion": recursion}))
