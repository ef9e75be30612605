"""Steps like |m| sign(g): signs and magnitudes are compared by what they are, at zero too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import DisprovedError, ProofError
from explaind_core.operators import Diagonal, OfReadout
from explaind_core.symbolic import prove
from explaind_core.symbolic.algebra import is_zero, proves_zero
from explaind_core.symbolic.branches import Branch, Datum, branches
from explaind_core.symbolic.tensor import SymbolicTensor

X, M, G = (Datum(name, real=True) for name in "xmg")
V, N = Datum("v", nonnegative=True), Datum("n", negative=True)
B = sympy.Symbol("beta", positive=True)
AVERAGE = B * M + (1 - B) * G
Abs, sign, Max, Min, sqrt = sympy.Abs, sympy.sign, sympy.Max, sympy.Min, sympy.sqrt

SAME = {
    "sign(x) |x| is x": sign(X) * Abs(X) - X,
    "of an average": sign(AVERAGE) * Abs(AVERAGE) - AVERAGE,
    "sign of a product": sign(M * G) - sign(M) * sign(G),
    "magnitudes change places": Abs(M * G) * sign(M) - M * Abs(G),
    "a product's sign takes the magnitude": M * sign(M * G) - Abs(M) * sign(G),
    "an average's too": Abs(AVERAGE) * sign(AVERAGE * G) - AVERAGE * sign(G),
    "signs of signs": sign(sign(X) * Abs(G)) - sign(X) * sign(G) ** 2,
    "a third power": sign(X) ** 3 - sign(X),
    "a root": Abs(X) ** sympy.Rational(3, 2) * sign(X) - X * sqrt(Abs(X)),
    "the larger of x and -x": Max(X, -X) - Abs(X),
    "the positive part": (X + Abs(X)) / 2 - Max(X, 0),
    "clipped": sign(X) * Min(Abs(X), 1) - Max(Min(X, 1), -1),
    "scaled by a hyper-parameter": Abs((1 - B) * X) * sign(X) - (1 - B) * X,
    "never negative": Abs(V - 0) * sign(V) - V,
    "always negative": Max(N, 0) * Abs(X),
}
OTHER = {
    "|m| sign(g) is not m": Abs(M) * sign(G) - M,
    "nor g": Abs(M) * sign(G) - G,
    "the wrong sign": sign(X) * Abs(X) + X,
    "a sign too many": sign(M * G) - sign(M),
    "the average's sign is not the gradient's": sign(AVERAGE) - sign(G),
    "the negative part": (X - Abs(X)) / 2 - Max(X, 0),
    "clipped elsewhere": sign(X) * Min(Abs(X), 1) - Max(Min(X, 2), -2),
    "a size above 1 is no average": Abs(1 - Abs(X)) - (1 - Abs(X)),
    "roots of data above 1": sqrt((1 - Abs(X)) ** 2) - (1 - Abs(X)),
    "not for negative ones": Min(N, -1) - N,
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_in_signs_and_magnitudes_is_proved(name):
    assert is_zero(SAME[name], Branch()) is True


@pytest.mark.parametrize("name", OTHER)
def test_what_differs_for_some_signs_is_not(name):
    assert not proves_zero(OTHER[name], Branch())
    assert is_zero(OTHER[name], Branch()) is False


@pytest.mark.parametrize("expr", [X / Abs(X) - sign(X), Abs(M) * G / Abs(G) - Abs(M) * sign(G)])
def test_what_has_no_value_at_zero_is_proved_only_where_it_is_none(expr):
    assert is_zero(expr, Branch()) is None
    symbol = X if expr.has(X) else G
    for branch, zero in branches(lambda _: bool(SymbolicTensor(symbol) == 0)):
        if not zero:
            assert is_zero(expr, branch) is True


# ------------------------------------------------------------------ rules
class Magnitude(UpdateRule):
    """theta <- theta - lr |m| sign(g): the size of the average, the direction of the gradient."""

    options = frozenset({"lr", "beta"})

    def coefficients(self, step):
        g, m = step.gradient, step.after["m"]
        some = g != 0
        size = torch.where(some, m.abs() / torch.where(some, g.abs(), torch.ones_like(g)), torch.zeros_like(g))
        return StepCoefficients(preconditioner=Diagonal(step.hyper["lr"] * size))

    def recursion(self, step):
        beta = step.hyper["beta"]
        m = step.state["m"] = beta * step.state["m"] + (1 - beta) * step.gradient
        return step.theta - step.hyper["lr"] * abs(m) * step.sign(step.gradient)


class OtherWay(Magnitude):
    """The same in other words: m sign(m g)."""

    def recursion(self, step):
        beta = step.hyper["beta"]
        m = step.state["m"] = beta * step.state["m"] + (1 - beta) * step.gradient
        return step.theta - step.hyper["lr"] * m * step.sign(m * step.gradient)


class Momentum(UpdateRule):
    """Plain momentum, whose recursion takes signs and magnitudes apart and puts them together again."""

    options = frozenset({"lr", "mu"})
    filter_states = ("m",)

    def coefficients(self, step):
        return StepCoefficients(preconditioner=step.hyper["lr"], filter=LinearFilter.momentum(step.hyper["mu"]))

    def recursion(self, step):
        m = step.state["m"] = step.hyper["mu"] * step.state["m"] + step.gradient
        return step.theta - step.hyper["lr"] * abs(m) * step.sign(m)


class Clipped(Momentum):
    """theta <- theta - lr clip(m, -1, 1), declared as P_s = lr min(|m|, 1) / |m|."""

    def coefficients(self, step):
        def clip(out):
            some = out != 0
            size = out.abs().clamp(max=1) / torch.where(some, out.abs(), torch.ones_like(out))
            return Diagonal(step.hyper["lr"] * torch.where(some, size, torch.zeros_like(out)))

        return replace(super().coefficients(step), preconditioner=OfReadout(clip))

    def recursion(self, step):
        m = step.state["m"] = step.hyper["mu"] * step.state["m"] + step.gradient
        return step.theta - step.hyper["lr"] * step.max(step.min(m, 1), -1)


@pytest.mark.parametrize("rule", [Magnitude, OtherWay, Momentum, Clipped])
def test_rules_that_step_by_signs_and_magnitudes_are_proved(rule):
    assert prove(rule, steps=2).proved


def test_a_wrong_direction_is_disproved():
    class Wrong(Magnitude):
        def recursion(self, step):
            beta = step.hyper["beta"]
            m = step.state["m"] = beta * step.state["m"] + (1 - beta) * step.gradient
            return step.theta - step.hyper["lr"] * m

    with pytest.raises(DisprovedError, match="the coefficient of g_1"):
        prove(Wrong, steps=2)


def test_a_declaration_without_a_value_at_zero_is_neither():
    class Careless(Magnitude):
        def coefficients(self, step):
            size = step.after["m"].abs() / step.gradient.abs()
            return StepCoefficients(preconditioner=Diagonal(step.hyper["lr"] * size))

    with pytest.raises(ProofError, match="could not be proved") as caught:
        prove(Careless, steps=2)
    assert not isinstance(caught.value, DisprovedError)
