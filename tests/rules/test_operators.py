"""Every operator against its dense matrix, and every filter against explicit step learning rates (float64)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core import errors
from explaind_core.operators import Composition, Diagonal, Left, RankOne, Right, Rotated, Scalar, Sum

SHAPES = [(), (3,), (2, 3), (2, 3, 2)]


def tensor(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simple_operators(shape):
    """Operators that fit a shape, each with the matrix that it must be, written with kron and outer products."""
    size = torch.Size(shape).numel()
    eye = torch.eye(size, dtype=torch.float64)
    weight, u, v = tensor(1, *shape), tensor(2, *shape), tensor(3, *shape)
    yield Scalar(-1.5), -1.5 * eye
    yield Diagonal(weight), torch.diag(weight.flatten())
    yield RankOne(u, v), torch.outer(u.flatten(), v.flatten())
    if shape:
        first, last = shape[0], shape[-1]
        left, right = tensor(4, first, first), tensor(5, last, last)
        yield Left(left), torch.kron(left, torch.eye(size // first, dtype=torch.float64))
        yield Right(right), torch.kron(torch.eye(size // last, dtype=torch.float64), right.mT.contiguous())
        rotations = [torch.linalg.qr(tensor(6 + a, n, n))[0] for a, n in enumerate(shape)]
        whole = torch.eye(1, dtype=torch.float64)
        for rotation in rotations:
            whole = torch.kron(whole, rotation)
        yield Rotated(Diagonal(weight), tuple(rotations)), whole @ torch.diag(weight.flatten()) @ whole.T
        yield Diagonal(tensor(9, last)), torch.diag(tensor(9, last).expand(shape).flatten())


def pairs(shape):
    simple = list(simple_operators(shape))
    (a, da), (b, db) = simple[1], simple[-1]
    return [*simple, (a @ b, da @ db), (b @ a, db @ da), (a + b, da + db), (2.5 * a, 2.5 * da)]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_operator_is_its_matrix(shape):
    x = tensor(11, *shape)
    for operator, matrix in pairs(shape):
        torch.testing.assert_close(operator.apply(x).flatten(), matrix @ x.flatten(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(operator.dense(shape), matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_adjoint_is_the_transpose(shape):
    x, y = tensor(11, *shape), tensor(12, *shape)
    for operator, matrix in pairs(shape):
        torch.testing.assert_close(operator.adjoint.dense(shape), matrix.T, rtol=1e-12, atol=1e-12)
        forth, back = (operator.apply(x) * y).sum(), (x * operator.adjoint.apply(y)).sum()
        torch.testing.assert_close(forth, back, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("misfit", "wording"),
    [
        (lambda: Diagonal(torch.ones(4)).apply(torch.ones(3)), r"Diagonal does not fit[\s\S]*\(3,\)[\s\S]*\(4,\)"),
        (lambda: Diagonal(torch.ones(2, 3)).apply(torch.ones(3)), "Diagonal does not fit"),
        (lambda: Left(torch.eye(2)).apply(torch.ones(3, 2)), r"2 x 2 matrix does not fit axis 0"),
        (lambda: Right(torch.eye(2)).apply(torch.ones(())), "does not fit axis -1"),
        (lambda: Left(torch.ones(2, 3)), "square"),
        (lambda: RankOne(torch.ones(2), torch.ones(3)), "one shape"),
        (lambda: RankOne(torch.ones(2), torch.ones(2)).apply(torch.ones(3)), "RankOne does not fit"),
        (lambda: Rotated(Scalar(1.0), (torch.eye(2),)).apply(torch.ones(2, 2)), "one entry per axis"),
        (lambda: Sum(()), "at least one term"),
        (lambda: explaind.StepCoefficients(preconditioner=torch.ones(2)), r"bare tensor[\s\S]*operators.Diagonal"),
        (lambda: explaind.StepCoefficients(preconditioner="fast"), "preconditioner is not an operator"),
        (lambda: explaind.StepCoefficients(preconditioner=float("nan")), "preconditioner is not finite"),
        (lambda: explaind.LinearFilter(A=((1.0,),), B=(1.0, 2.0), C=(1.0,)), "do not agree on the number of states"),
        (lambda: explaind.LinearFilter(D=float("inf")), "not finite"),
        (lambda: explaind.LinearFilter(D="one"), "neither a number nor an operator"),
    ],
)
def test_a_malformed_declaration_says_so(misfit, wording):
    with pytest.raises(errors.CoefficientError, match=wording):
        misfit()


# ------------------------------------------------------------------ filters
def coefficient(shape, operators):
    number = st.floats(-1, 1)
    diagonal = st.builds(lambda s: Diagonal(tensor(s, *shape)), st.integers(0, 99))
    return st.one_of(number, diagonal) if operators else number


@st.composite
def filters(draw, shape):
    k, n, operators = draw(st.integers(0, 2)), draw(st.integers(1, 5)), draw(st.booleans())
    one = coefficient(shape, operators)
    row = st.lists(one, min_size=k, max_size=k)
    matrix = st.lists(row, min_size=k, max_size=k)
    made = st.builds(explaind.LinearFilter, A=matrix, B=row, C=row, D=one)
    return [draw(made) for _ in range(n)]


def times(a, b):
    """Product of two matrices whose entries are dense [D, D] matrices, stored as [rows][columns]."""
    return [[sum(a[i][j] @ b[j][k] for j in range(len(b))) for k in range(len(b[0]))] for i in range(len(a))]


def dense(value, shape):
    operator = value if isinstance(value, explaind.operators.LinearOperator) else Scalar(value)
    return operator.dense(shape)


def explicit_alpha(sequence, s, i, shape):
    """alpha_{s,i} = C_s A_{s-1} ... A_{i+1} B_i as a dense matrix; D_s for i = s."""
    if i == s:
        return dense(sequence[s].D, shape)
    product = [[dense(b, shape)] for b in sequence[i].B]
    for between in range(i + 1, s):
        product = times([[dense(a, shape) for a in row] for row in sequence[between].A], product)
    return times([[dense(c, shape) for c in sequence[s].C]], product)[0][0]


@settings(deadline=None, max_examples=60)
@given(sequence=filters((3,)))
def test_the_recurrence_is_the_explicit_sum_over_step_learning_rates(sequence):
    shape = (3,)
    gradients = [tensor(20 + s, *shape) for s in range(len(sequence))]
    state = tuple(torch.zeros(shape, dtype=torch.float64) for _ in range(sequence[0].order))
    for s, current in enumerate(sequence):
        out, state = current.advance(state, gradients[s])
        first = 0 if current.order else s  # without a state nothing earlier is remembered
        expected = sum(explicit_alpha(sequence, s, i, shape) @ gradients[i] for i in range(first, s + 1))
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@given(beta=st.floats(0, 0.999), s=st.integers(1, 6))
def test_ema_is_the_step_learning_rate_of_theorem_3_1(beta, s):
    sequence = [explaind.LinearFilter.ema(beta, bias_correction=t) for t in range(1, s + 1)]
    for i in range(1, s + 1):
        alpha = explicit_alpha(sequence, s - 1, i - 1, ()).item()
        assert alpha == pytest.approx((1 - beta) * beta ** (s - i) / (1 - beta**s), rel=1e-12, abs=1e-300)


def test_composition_applies_the_rightmost_first():
    shift, scale = Left(torch.tensor([[0.0, 1.0], [0.0, 0.0]])), Diagonal(torch.tensor([2.0, 3.0]))
    assert Composition((shift, scale)).apply(torch.ones(2)).tolist() == [3.0, 0.0]
