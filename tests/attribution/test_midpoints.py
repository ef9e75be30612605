"""nodes="midpoint:q": the paper's integration steps, against a plain loop over them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.derivatives.quadrature import Quadrature, midpoints
from explaind_core.run.run import Run
from support.smooth_runs import INPUTS, residuals, smooth


def slopes(run: Run, step: int, points) -> np.ndarray:
    """``sum_j w_j df/dtheta(theta_{s-1} + t_j Delta_s) Delta_s``, one derivative after the other: [test, output]."""
    before, after = run.theta(step - 1), run.theta(step)
    moved = {n: after[n] - before[n] for n in before}
    total = torch.zeros(len(INPUTS), 3, dtype=torch.float64)
    for t, weight in points:
        theta = {n: before[n] + t * moved[n] for n in before}
        total += weight * torch.func.jvp(
            lambda p: torch.func.functional_call(run.model, p, (INPUTS,)), (theta,), (moved,)
        )[1].detach()  # fmt: skip
    return total.numpy()


@settings(deadline=None, max_examples=12)
@given(q=st.integers(1, 12), strategy=st.sampled_from(["forward", "reverse", "features", "adjoint"]))
def test_midpoints_are_the_papers_integration_steps(q, strategy):
    run = smooth()
    keep = ("step", "train", "test", "output") if strategy in ("features", "adjoint") else ("step", "test", "output")
    result = explaind.attribute(run, INPUTS, keep=keep, nodes=f"midpoint:{q}", strategy=strategy, progress=False)
    kernel = result.kernel.sum("train") if "train" in keep else result.kernel
    for s in run.steps:
        expected = slopes(run, s, [((j + 0.5) / q, 1 / q) for j in range(q)])
        np.testing.assert_allclose(kernel.sel(step=s), expected, rtol=0, atol=1e-12)  # plain descent has no other term
    assert explaind.closure_error(result) < 1e-12


@given(q=st.integers(1, 2000))
def test_midpoints_are_equal_parts_of_the_step(q):
    nodes, weights = zip(*midpoints(q), strict=True)
    assert len(nodes) == q
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    assert set(weights) == {1 / q}
    assert min(nodes) == pytest.approx(0.5 / q)
    assert np.diff([*nodes, 1 + 0.5 / q]) == pytest.approx(1 / q)
    # Exact for straight lines only: the integral of t^2 comes out 1 / (12 q^2) too small.
    assert sum(w * t for t, w in midpoints(q)) == pytest.approx(0.5)
    missing = 1 / 3 - sum(w * t * t for t, w in midpoints(q))
    assert missing == pytest.approx(1 / (12 * q * q), rel=1e-6, abs=1e-14)


def test_the_error_of_midpoints_falls_with_their_square():
    errors = [residuals(smooth(), nodes=f"midpoint:{q}").max() for q in (8, 16, 32)]
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([4, 4], rel=0.05)
    assert residuals(smooth(), nodes="midpoint:1").max() == residuals(smooth(), nodes=1).max()


def test_midpoints_are_a_fixed_number_of_nodes():
    result = explaind.attribute(smooth(), INPUTS, nodes="midpoint:3", tolerance=1e-9, progress=False)
    assert result.nodes.values.tolist() == result.evaluations.values.tolist() == [3] * 4
    assert result.converged.all()
    assert result.attrs["nodes_asked"] == "midpoint:3"
    assert np.isnan(result.attrs["tolerance"])
    assert not Quadrature("midpoint:3").adaptive
    assert Quadrature("midpoint:100").ladder == (100,)
    assert Quadrature("midpoint:3").points(3) == midpoints(3)


def test_what_verifies_and_plans_takes_midpoints():
    check = explaind.verify(smooth(), INPUTS, nodes="midpoint:100", progress=False)
    assert (check.asked, check.nodes_used, check.nodes_evaluated) == ("midpoint:100", 100, 100)
    assert ("integration steps (nodes per step)", "100.00 (midpoint:100)") in check.rows()
    assert explaind.plan(smooth(), INPUTS, nodes="midpoint:7").nodes == 7
    assert explaind.plan_similarity(smooth(), INPUTS, nodes="midpoint:7").nodes == 7


def test_a_result_of_other_midpoints_is_another_result(tmp_path):
    ask = {"out": tmp_path / "result.zarr", "progress": False}
    explaind.attribute(smooth(), INPUTS, nodes="midpoint:2", **ask)
    with pytest.raises(explaind.errors.ExplaindError, match="another question"):
        explaind.attribute(smooth(), INPUTS, nodes="midpoint:3", **ask)
    with pytest.raises(explaind.errors.ExplaindError, match="another question"):
        explaind.attribute(smooth(), INPUTS, nodes=2, **ask)
