"""Proofs of rules that are like none of torch's, and what their ways through the code may know."""

from __future__ import annotations

import subprocess
import sys
from types import MappingProxyType

import pytest
import torch

import explaind_core as explaind
from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import ProofError
from explaind_core.operators import Diagonal, OfReadout
from explaind_core.symbolic import prove


class TwoAverages(UpdateRule):
    """A filter with two states, a factor of norms in front of it, and a counter of the group's."""

    options = frozenset({"lr", "betas", "k"})
    proved_for = MappingProxyType({"betas": ((..., ...),)})
    filter_states = ("fast", "slow")

    def coefficients(self, step):
        a, b = step.hyper["betas"]
        trust = step.theta.norm() / step.gradient.norm()
        return StepCoefficients(
            filter=LinearFilter(A=((a, 0.0), (0.0, b)), B=(1 - a, 1 - b), C=(a, b), D=2 - a - b),
            gradient_operator=trust,
            preconditioner=step.hyper["lr"] / step.hyper_after["k"],
        )

    def recursion(self, step):
        u = step.norm(step.theta) / step.sqrt(step.mean(step.gradient**2) * step.theta.numel()) * step.gradient
        for name, beta in zip(("fast", "slow"), step.hyper["betas"], strict=True):
            step.state[name] = beta * step.state[name] + (1 - beta) * u
        step.hyper_after["k"] = step.hyper["k"] + 1
        return step.theta - step.hyper["lr"] / step.hyper_after["k"] * (step.state["fast"] + step.state["slow"])


def test_two_states_norms_and_counters_of_the_group_are_proved():
    (found,) = prove(TwoAverages).configurations
    assert found.every_step
    assert str(found).startswith("alpha_{s,i} = beta1**(s - i)*(1 - beta1) + beta2**(s - i)*(1 - beta2)")
    # Without the names of the states there is no hypothesis for an induction.
    (found,) = prove(type("Unnamed", (TwoAverages,), {"filter_states": ()})).configurations
    assert not found.every_step
    swapped = type("Swapped", (TwoAverages,), {"filter_states": ("slow", "fast")})
    with pytest.raises(ProofError, match="the optimizer's 'slow'"):
        prove(swapped)


class Sign(UpdateRule):
    """Lion: a preconditioner that is made of what the filter reads out."""

    options = frozenset({"lr", "betas", "weight_decay"})
    proved_for = MappingProxyType({"betas": ((..., ...),)})
    filter_states = ("m",)

    def coefficients(self, step):
        lr, (a, b) = step.hyper["lr"], step.hyper["betas"]
        return StepCoefficients(
            filter=LinearFilter(A=((b,),), B=(1 - b,), C=(a,), D=1 - a),
            preconditioner=OfReadout(lambda out: Diagonal((lr / out.abs()).where(out != 0, 0.0))),
            decoupled_decay=lr * step.hyper["weight_decay"],
        )

    def recursion(self, step):
        a, b = step.hyper["betas"]
        c = step.state["m"] * a + step.gradient * (1 - a)
        step.state["m"] = step.state["m"] * b + step.gradient * (1 - b)
        return step.theta - step.hyper["lr"] * (step.sign(c) + step.hyper["weight_decay"] * step.theta)


def test_a_preconditioner_of_what_is_read_out_is_proved():
    (found,) = prove(Sign).configurations
    assert found.every_step
    assert "r_s = lr*weight_decay*theta[s - 1]" in str(found)

    class Old(Sign):
        def recursion(self, step):
            new = Sign.recursion(self, step)
            return new + 0.1 * step.hyper["lr"] * step.sign(step.gradient)

    with pytest.raises(ProofError, match="the update as a whole"):
        prove(Old)


class Meets(UpdateRule):
    """Ways through a step part by the sign of g, and lead to one state: the last g, and its square, weighted by way."""

    options = frozenset({"lr"})
    recomputed = None

    def recursion(self, step):
        last, size = step.state["last"], step.state["size"]
        step.state["last"], step.state["size"] = step.gradient, self.weight(step.gradient) * step.gradient**2
        return step.theta - step.hyper["lr"] * self.weight(step.gradient) * (self.weight(last) + size) * step.gradient

    def coefficients(self, step):
        last, size = (step.before.get(n, torch.zeros_like(step.theta)) for n in ("last", "size"))
        size = size if self.recomputed is None else self.recomputed * last**2
        idle = LinearFilter(A=((1.0,),), B=(0.0,), C=(0.0,), D=1.0)  # whose state has no name: no induction
        P = step.hyper["lr"] * self.weight(step.gradient) * (self.declared_weight(last) + size)
        return StepCoefficients(filter=idle, preconditioner=P)

    def weight(self, x):
        return 2 if x > 0 else 3

    declared_weight = weight


def test_ways_that_meet_know_only_what_is_true_of_both():
    assert prove(Meets).proved
    for recomputed in (2, 3):  # right on one way only
        with pytest.raises(ProofError, match="step 2"):
            prove(type("Wrong", (Meets,), {"recomputed": recomputed}))
    for wrong_weights in ((2, 5), (5, 3)):
        weight = {"declared_weight": lambda _, x, pair=wrong_weights: pair[int(not x > 0)] if x != 0 else 3}
        with pytest.raises(ProofError, match="step 2"):
            prove(type("Wrong", (Meets,), weight))


@pytest.mark.parametrize(("first", "following"), [(1, lambda x, g: x - g**2), (-1, lambda x, _: x)])
def test_an_induction_does_not_take_for_granted_that_states_are_not_negative(first, following):
    class Rule(UpdateRule):
        options = frozenset({"lr"})

        def recursion(self, step):
            x = step.state["x"]
            step.state["x"] = following(x, step.gradient) if step.clock > 1 else first
            return step.theta - step.hyper["lr"] * abs(x) * step.gradient

        def coefficients(self, step):
            return StepCoefficients(preconditioner=step.hyper["lr"] * step.before.get("x", 0.0))

    with pytest.raises(ProofError, match=r"coefficient of g_t(?s:.*)expected: .*Abs\(x_t-1\)"):
        prove(Rule, steps=1)


def test_sympy_is_imported_by_proofs_only():
    code = (
        "import sys, explaind_core as e; assert 'sympy' not in sys.modules; assert not hasattr(e, 'nothing');"
        "e.symbolic.prove; assert 'sympy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert explaind.symbolic.prove is prove
