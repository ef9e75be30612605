"""SymbolicTensor does what torch does; questions branch, and are answered the same each time they are asked."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explaind_core import LinearFilter, StepCoefficients
from explaind_core.errors import ProofError
from explaind_core.operators import Diagonal, Scalar
from explaind_core.symbolic import Datum, SymbolicTensor
from explaind_core.symbolic.algebra import is_nonnegative, is_zero, linear_coefficients, proves_zero
from explaind_core.symbolic.branches import Branch, branches
from explaind_core.symbolic.tensor import exact, mean

X, Y, V = Datum("x", real=True), Datum("y", real=True), Datum("v", nonnegative=True)
A, B = sympy.symbols("a b", positive=True)

#: Functions of x and y (of either sign, not 0) and of v > 0, of one element each.
OPERATIONS = {
    "arithmetic": lambda x, y, v: (2 * x - y / 4 + 1 - (3 - x) * 0.5) / (v + 1) - 1 / v,
    "powers": lambda x, y, v: x**2 + v**0.5 + 2**y + x.pow(3) + v.pow(-0.5) + torch.pow(v, 1.5) + torch.pow(2.0, x),
    "roots": lambda x, y, v: v.sqrt() + v.rsqrt() + torch.sqrt(v) + torch.rsqrt(v) + x.square() + torch.square(y),
    "signs": lambda x, y, v: x.abs() * y.sign() + torch.abs(y) * torch.sign(x) + abs(x) - (-v) + x.neg(),
    "methods": lambda x, y, v: x.add(y, alpha=0.5).sub(v, alpha=2).mul(y).div(v).add(1).sub(x),
    "fused": lambda x, y, v: x.lerp(y, 0.3) + x.addcmul(x, y, value=0.7) + x.addcdiv(y, v, value=0.2),
    "functions": lambda x, y, v: torch.lerp(x, y, 0.25) + torch.exp(-x) + torch.log(v) + v.reciprocal() + x.exp(),
    "extrema": lambda x, y, v: torch.maximum(x, y) + x.minimum(v) * 2 + x.clamp(min=0.5) + torch.clamp(y, max=0.1),
    "clamped": lambda x, y, v: x.clamp(-0.2, 0.3) + y.clamp(min=0.1, max=0.2) + torch.clamp(v, min=1.0),
    "likeness": lambda x, y, v: (
        torch.zeros_like(x) + torch.ones_like(y) + torch.full_like(v, 0.3) * x + torch.full((), 0.5) * y
    ),
    "reductions": lambda x, y, v: (
        x.mean() + torch.sum(y) + x.norm() + torch.linalg.vector_norm(y) + torch.mean(v) + (x - y).norm(1)
    ),
    "masks": lambda x, y, v: x * (x > 0) + y * (y <= x) + (x >= y) * v + (x < 0) * 2 + (~(x > y)) * 3 + (x != y) * 4,
    "conditions": lambda x, y, v: (
        torch.where(x > y, x, y) + x.where(y > 0, 0.5) + torch.where((x > 0) & (y > 0), 1.0, v) + (x == y) * 7
    ),
    "logic": lambda x, y, v: torch.where((x > 0) | (y > 0), x, 2 * y) + torch.where(torch.logical_not(x > y), v, 0.25),
    "python": lambda x, y, v: x.double() + max(x, y) - min(y, v) + x.detach().clone() * 2 + x.item() * 0.5,
    "mixed": lambda x, y, v: torch.tensor(0.5).double() * x + y - torch.tensor(2.0) / v + y.to(torch.float64),
}
numbers = st.integers(-40, 40).filter(bool).map(lambda n: n / 16)


@pytest.mark.parametrize("name", OPERATIONS)
@settings(deadline=None, max_examples=8)
@given(numbers=st.tuples(numbers, numbers, numbers.map(abs)))
def test_operations_are_torchs(name, numbers):
    """The expression of the way that these numbers take, at these numbers, is what torch computes."""
    compute = OPERATIONS[name]
    expected = compute(*(torch.tensor(n, dtype=torch.float64) for n in numbers))
    at = dict(zip((X, Y, V), map(exact, numbers), strict=True))
    found = []
    for branch, result in branches(lambda _: compute(*map(SymbolicTensor, (X, Y, V)))):
        if branch.holds(lambda expr: sympy.N(expr.xreplace(at))):
            one_element = exact(result).replace(mean, lambda x: x).subs("n", 1)
            found.append(float(one_element.subs(sympy.Symbol("n", integer=True, positive=True), 1).xreplace(at)))
    assert len(found) == 1  # ways exclude each other
    assert found[0] == pytest.approx(float(expected), rel=1e-12, abs=1e-12)


def test_numbers_are_taken_as_they_are_written():
    assert exact(0.1) == sympy.Rational(1, 10)
    assert exact(1e-8) == sympy.Rational(1, 10**8)
    assert (0.96 ** SymbolicTensor(A)).expr == sympy.Rational(24, 25) ** A
    assert (SymbolicTensor(3) ** -0.5).expr == 1 / sympy.sqrt(3)
    assert float(SymbolicTensor(0.25)) == 0.25
    assert list(range(SymbolicTensor(2))) == [0, 1]


def test_means_are_linear_and_nothing_else():
    x, y = SymbolicTensor(X), SymbolicTensor(Y)
    assert (2 * x + A * y - 1).mean().expr == 2 * mean(X) + A * mean(Y) - 1
    assert (x.mean() * y).mean().expr == mean(X) * mean(Y)
    assert (x * y).mean().expr != mean(X) * mean(Y)
    assert mean(V).is_nonnegative
    assert mean(X).is_nonnegative is None
    assert (x.norm() / (2 * x).norm()).expr == sympy.Rational(1, 2)


def test_symbols_pass_through_filters_and_operators():
    x, a = SymbolicTensor(X), SymbolicTensor(A)
    declared = StepCoefficients(preconditioner=a, filter=LinearFilter.ema(a), coupled_decay=Diagonal(x))
    out, (state,) = declared.filter.advance((x,), a)
    assert (out.expr, state.expr) == (X * A + A * (1 - A),) * 2
    assert declared.preconditioner.apply(x).expr == A * X
    assert (Scalar(2.0) * a).apply(x).expr == 2 * A * X
    assert declared.coupled_decay.apply(x).expr == X**2
    with pytest.raises(TypeError):
        _ = a + "a"


# ------------------------------------------------------------------ questions
def ways(run):
    return [(branch.text(), result) for branch, result in branches(run)]


def test_questions_are_answered_once():
    x, y = SymbolicTensor(X), SymbolicTensor(Y)
    assert ways(lambda _: (bool(x > 1), bool(x > 1), bool(2 * x - 2 > 0), bool(x <= 1), bool(x < 1)))[0] == (
        "x - 1 > 0",
        (True, True, True, False, False),
    )
    assert len(ways(lambda _: (bool(A * x > 0), bool(x / A > 0), bool(-x < 0)))) == 2
    # Of x < y, x = y and x > y, exactly one holds.
    found = [result for _, result in ways(lambda _: (bool(x < y), bool(x == y), bool(x > y), bool(x != y)))]
    assert sorted(found) == [(False, False, True, True), (False, True, False, False), (True, False, False, True)]


def test_what_follows_is_not_asked():
    v, a, n = SymbolicTensor(V), SymbolicTensor(A), SymbolicTensor(sympy.Symbol("n", integer=True, positive=True))
    assert ways(lambda _: (bool(v + a > 0), bool(a == 0), bool(v >= 0), bool(n + 1 == 1), bool(a), bool(v < 0))) == [
        ("", (True, False, True, False, True, False))
    ]
    assert ways(lambda _: bool(SymbolicTensor(A) == SymbolicTensor(B))) == [("", False)]  # hyper-parameters are general


def test_an_answer_of_zero_is_put_in():
    x, y = SymbolicTensor(X), SymbolicTensor(Y)

    def run(branch):
        if x * y > 0:
            return x == 0, y == 0  # neither can be
        return branch.facts(X + Y) if x == 0 else None

    assert [tuple(map(bool, r)) if isinstance(r, tuple) else r for _, r in ways(run)] == [(False, False), Y, None]


def test_facts_settle_extrema_and_signs():
    def run(branch):
        larger = SymbolicTensor(X) > SymbolicTensor(Y)
        return bool(larger), branch.facts(sympy.Max(X, Y)), branch.facts(sympy.Min(X, Y))

    assert [result for _, result in ways(run)] == [(True, X, Y), (False, Y, X)]
    found = [branch.facts(abs(X) * sympy.sign(X)) for branch, _ in branches(lambda _: bool(SymbolicTensor(X) > 0))]
    assert str(found[0]) == "x"


def test_a_question_outside_of_branches_is_refused():
    with pytest.raises(ProofError, match="whether x > 0 does not follow from the symbols"):
        bool(SymbolicTensor(X) > 0)


# ------------------------------------------------------------------ is it zero?
@pytest.mark.parametrize(
    ("expr", "verdict"),
    [
        ((A + B) ** 2 - A**2 - 2 * A * B - B**2, True),
        (sympy.sqrt(V / (1 - A**3)) - sympy.sqrt(V) / sympy.sqrt(1 - A**3), True),  # valid averages: a < 1
        (sympy.sqrt((1 - A) * (1 - B) * X**2) - abs(X) * sympy.sqrt(1 - A) * sympy.sqrt(1 - B), True),
        (sympy.sqrt(X**2) - X, False),
        (sympy.sqrt(V) - V, False),
        (sympy.Max(V, 0) - V, True),
        (sympy.Max(V, (1 - A) * V, 0) - V, True),
        (sympy.nan, None),
        (X - X + sympy.Rational(1, 10**9), False),
    ],
)
def test_zero_is_proved_or_refuted(expr, verdict):
    assert is_zero(expr, Branch()) is verdict
    assert proves_zero(expr, Branch()) is (verdict is True)


def test_what_symbols_stand_for_may_decide():
    definition = {V: X**2}
    assert is_zero(V - X**2, Branch()) is False
    assert is_zero(V - X**2, Branch(), definition) is True
    assert is_zero(V - 2 * X**2, Branch(), definition) is False


def test_linear_coefficients_keep_their_form():
    expr = A * (B * X + (1 - B) * (Y - V)) + V**2
    assert linear_coefficients(expr, [X, Y]) == [A * B, A * (1 - B), V**2 + A * (1 - B) * -V]
    assert linear_coefficients(X * Y, [X, Y]) is None
    assert linear_coefficients(abs(X), [X]) is None


def test_never_negative_at_valid_hyper_parameters():
    assert is_nonnegative(A * V + (1 - A) * X**2)
    assert not is_nonnegative(A * V - (1 - A) * X**2)
