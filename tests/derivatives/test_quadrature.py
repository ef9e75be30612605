"""Nodes: Gauss-Legendre is exact where it should be, converges, and is spent where it is needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.derivatives.quadrature import Quadrature, gauss_legendre
from explaind_core.errors import QuestionError
from explaind_core.run.run import Run
from explaind_core.testing import record_example
from support.attribution_oracles import record
from support.smooth_runs import INPUTS, residuals, smooth


@settings(deadline=None, max_examples=25)
@given(q=st.integers(1, 32), data=st.data())
def test_polynomials_of_degree_2q_minus_1_are_integrated_exactly(q, data):
    degree = data.draw(st.integers(0, 2 * q - 1))
    integral = sum(w * t**degree for t, w in gauss_legendre(q))
    # Sums of q products in float64; nodes and weights carry a few roundings each.
    assert integral == pytest.approx(1 / (degree + 1), abs=1e-14)


@pytest.mark.parametrize("q", [1, 2, 3])
def test_a_polynomial_of_the_next_degree_is_not(q):
    assert abs(sum(w * t ** (2 * q) for t, w in gauss_legendre(q)) - 1 / (2 * q + 1)) > 1e-5


def test_nodes_are_inside_and_weights_positive():
    for q in (1, 2, 5, 32, 128):
        nodes, weights = zip(*gauss_legendre(q), strict=True)
        assert 0 < min(nodes) <= max(nodes) < 1
        assert min(weights) > 0
        assert len(nodes) == q


def test_the_error_falls_geometrically_for_a_smooth_model():
    errors = [residuals(smooth(), nodes=q).max() for q in range(1, 7)]
    for fewer, more in itertools.pairwise(errors):
        assert more < fewer / 4
    assert residuals(smooth(), nodes=32).max() < 1e-14  # down to the rounding of outputs below 10


def test_a_linear_model_needs_one_node(tmp_path):
    """Its Jacobian does not depend on the parameters."""
    torch.manual_seed(0)
    run = record(
        tmp_path / "run", nn.Linear(4, 3).double(), lambda ps: torch.optim.AdamW(ps, lr=0.5),
        torch.randn(12, 4).double(), torch.randint(3, (12,)),
    )  # fmt: skip
    result = explaind.attribute(run, INPUTS, nodes="adaptive", tolerance=1e-13, progress=False)
    assert result.nodes.values.tolist() == [1] * 4
    assert float(abs(result.residual).max()) < 1e-14


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6, 1e-9])
def test_adaptive_nodes_meet_the_tolerance(tolerance):
    result = explaind.attribute(smooth(), INPUTS, nodes="adaptive", tolerance=tolerance, progress=False)
    change = float(abs(result.final - result.initial).max())
    rounding = 8 * np.finfo(float).eps * max(float(abs(result.initial).max()), float(abs(result.final).max()), 10.0)
    assert result.converged.all()
    assert float(abs(result.residual).max()) <= tolerance * change + rounding


def test_a_tighter_tolerance_takes_more_nodes():
    spent = [
        int(explaind.attribute(smooth(), INPUTS, tolerance=t, progress=False).nodes.sum()) for t in (1e-2, 1e-5, 1e-9)
    ]
    assert spent[0] < spent[1] < spent[2]


def test_more_nodes_are_spent_where_they_are_needed(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    run = record(
        tmp_path / "run", model, lambda ps: torch.optim.SGD(ps, lr=1.0), torch.randn(12, 4).double(),
        torch.randint(3, (12,)), steps=6, rates=(1e-3, 1e-3, 2.0, 2.0, 1e-3, 1e-3),
    )  # fmt: skip
    nodes = explaind.attribute(run, INPUTS, tolerance=1e-6, progress=False).nodes.values
    assert min(nodes[2:4]) > max(nodes[0], nodes[1], nodes[5])


def test_what_was_evaluated_is_counted_with_its_refinements():
    result = explaind.attribute(smooth(), INPUTS, steps=1, tolerance=1e-9, progress=False)
    reached = int(result.nodes[0])
    climbed = [q for q in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if q <= reached]
    assert len(climbed) > 2
    assert int(result.evaluations[0]) == sum(climbed)


def kinked(path) -> Run:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    return record(
        path, model, lambda ps: torch.optim.SGD(ps, lr=3.0), torch.randn(12, 4).double(), torch.randint(3, (12,)),
        steps=3,
    )  # fmt: skip


def test_steps_that_miss_the_tolerance_are_marked_and_still_close(tmp_path):
    run = kinked(tmp_path / "run")
    result = explaind.attribute(run, INPUTS, tolerance=1e-9, max_nodes=2, progress=False)
    assert not result.converged.all()
    assert result.nodes.max() <= 2
    assert explaind.closure_error(result) <= 1e-12
    summed = explaind.attribute(run, INPUTS, tolerance=1e-9, max_nodes=2, keep=("layer",), progress=False)
    assert summed.attrs["steps_not_converged"] == int((~result.converged).sum())


def test_a_step_that_misses_the_tolerance_keeps_the_best_order_tried(tmp_path):
    run = kinked(tmp_path / "run")
    orders = (1, 2, 3, 4, 6)
    errors = [residuals(run, nodes=q, steps=1)[0] for q in orders]
    assert errors.index(min(errors)) < len(errors) - 1  # over kinks, more nodes may be worse
    result = explaind.attribute(run, INPUTS, tolerance=1e-12, max_nodes=6, steps=1, progress=False)
    assert int(result.nodes[0]) == orders[errors.index(min(errors))]
    assert int(result.evaluations[0]) == sum(orders)
    assert float(abs(result.residual).max()) == pytest.approx(min(errors), rel=1e-12)


def test_a_fixed_number_of_nodes_makes_no_promise_and_counts_as_converged(tmp_path):
    result = explaind.attribute(kinked(tmp_path / "run"), INPUTS, nodes=1, progress=False)
    assert result.converged.all()
    assert result.nodes.values.tolist() == result.evaluations.values.tolist() == [1, 1, 1]
    assert np.isnan(result.attrs["tolerance"])


@pytest.mark.parametrize(
    "nodes",
    [
        0, -1, 1.5, True, "many", None, "midpoint", "midpoint:", "midpoint:0", "midpoint:-3", "midpoint:2.5",
        "midpoint: 3", "midpoint:03", "midpoint:+3", "midpoint:1_0", "midpoint:\u0663", "Midpoint:3", "midpoint:3:3",
    ],
)  # fmt: skip
def test_a_number_of_nodes_is_a_positive_integer_or_adaptive(nodes):
    with pytest.raises(QuestionError, match="nodes is not a number of nodes") as error:
        Quadrature(nodes)
    assert error.value.expected == "'adaptive', 'left', 'midpoint:q' or an integer >= 1"


@pytest.mark.parametrize("tolerance", [0, -1e-3, float("nan")])
def test_a_tolerance_is_positive(tolerance):
    with pytest.raises(QuestionError, match="the tolerance is not positive"):
        Quadrature(tolerance=tolerance)


def test_max_nodes_is_positive():
    with pytest.raises(QuestionError, match="max_nodes is not positive"):
        Quadrature(most=0)


@pytest.mark.parametrize("most", [1, 5, 32, 500])
def test_the_ladder_of_orders_ends_at_max_nodes(most):
    ladder = Quadrature(most=most).ladder
    assert ladder[0] == 1
    assert ladder[-1] <= most
    assert list(ladder) == sorted(set(ladder))
    assert Quadrature(7).ladder == (7,)


# ------------------------------------------------------------------ nodes="left"
@pytest.mark.parametrize("strategy", ["forward", "reverse", "features", "adjoint"])
def test_left_is_the_first_order_at_the_parameters_before_the_step(strategy):
    """``kernel = df/dtheta(theta_{s-1}) update``: for plain descent, ``- lr <df/dtheta, g>``, as TracIn has it."""
    run = record_example(3, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))
    keep = ("step", "train", "test", "output") if strategy in ("features", "adjoint") else ("step", "test", "output")
    result = explaind.attribute(run, INPUTS, keep=keep, nodes="left", strategy=strategy, progress=False)
    gone = [d for d in result.kernel.dims if d not in ("step", "test", "output")]
    for s in run.steps:
        theta = {n: t.requires_grad_() for n, t in run.theta(s - 1).items()}
        with torch.enable_grad():
            values = torch.func.functional_call(run.model, theta, (INPUTS,))
            rows = [torch.autograd.grad(v, list(theta.values()), retain_graph=True) for v in values.flatten()]
        fed = run.gradients(s)
        expected = [-sum(float((g * fed[n]).sum()) for n, g in zip(theta, row, strict=True)) for row in rows]
        found = result.kernel.sum(gone).sel(step=s).values.ravel()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
    # f changes by more than that: what the first order misses is the residual.
    assert float(abs(result.residual).max()) > 1e-2
    assert explaind.closure_error(result) < 1e-12


def test_left_is_one_node_that_makes_no_promise():
    result = explaind.attribute(smooth(), INPUTS, nodes="left", tolerance=1e-9, progress=False)
    assert result.nodes.values.tolist() == result.evaluations.values.tolist() == [1] * 4
    assert result.converged.all()
    assert result.attrs["nodes_asked"] == "left"
    assert np.isnan(result.attrs["tolerance"])
    assert not Quadrature("left").adaptive
    assert Quadrature("left").ladder == (1,)
    assert Quadrature("left").points(1) == ((0.0, 1.0),)


def test_left_is_worse_than_a_node_in_the_middle():
    """First order against second."""
    assert residuals(smooth(), nodes="left").max() > 2 * residuals(smooth(), nodes=1).max()


def test_left_of_a_chord_is_at_its_first_parameters():
    run, keep = smooth(), ("step", "test", "output")
    chord = explaind.attribute(run, INPUTS, keep=keep, nodes="left", chords=4, progress=False)
    theta = run.theta(0)
    values = torch.func.functional_call(run.model, theta, (INPUTS,))
    moved = {n: run.theta(4)[n] - theta[n] for n in theta}
    slope = torch.func.jvp(lambda p: torch.func.functional_call(run.model, p, (INPUTS,)), (theta,), (moved,))[1]
    np.testing.assert_allclose(chord.kernel + chord.regularization, slope.detach()[None], rtol=0, atol=1e-12)
    np.testing.assert_allclose(chord.initial, values.detach(), rtol=0, atol=1e-14)
