"""The reverse-time adjoint: transposes of everything, single parameters, and the quadrature."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
import xarray as xr

import explaind_core as explaind
from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import NonFiniteError, QuestionError
from explaind_core.operators import Composition, Diagonal, Left
from explaind_core.run.run import Run
from support.attribution_oracles import modules
from support.axes_oracle import Influences, assert_answers, influences
from support.axes_runs import BATCHES, CASES, DATA, INPUTS, TARGETS, example, network, record_batches
from support.growing_filter import Grown


@lru_cache
def oracle(case: tuple[str, str], nodes: int | str = 2) -> Influences:
    return influences(example(*case), INPUTS, nodes)


def ask(run: Run, keep, **question) -> xr.Dataset:
    options = {"nodes": 2, "progress": False, "strategy": "adjoint"} | question
    return explaind.attribute(run, INPUTS, keep=keep, **options)


# ------------------------------------------------------------------ transposes
def skew(n: int, seed: int) -> torch.Tensor:
    """A matrix that is nowhere near its transpose."""
    generator = torch.Generator().manual_seed(100 * n + seed)
    return 0.6 * torch.randn(n, n, generator=generator, dtype=torch.float64).triu() + 0.1


class Skewed(torch.optim.Optimizer):
    """Every operator of its update is a matrix: two states, which feed each other, behind and before a matrix."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                E, A, B, C, D, P = (skew(len(p), seed) for seed in range(6))
                state, u = self.state[p], E @ p.grad + 0.1 * p
                first, second = (state.get(name, torch.zeros_like(p)) for name in ("first", "second"))
                out = C @ first + 0.3 * second + D @ u
                state["first"], state["second"] = A @ first + 0.2 * second + B @ u, 0.5 * (A @ first)
                p -= group["lr"] * torch.linspace(1, 2, len(p), dtype=p.dtype).view(-1, *[1] * (p.ndim - 1)) * (P @ out)


class SkewedRule(UpdateRule):
    optimizers = (f"{Skewed.__module__}.{Skewed.__qualname__}",)
    options = frozenset({"lr"})
    filter_states = ("first", "second")

    def coefficients(self, step):
        n = len(step.theta)
        E, A, B, C, D, P = (Left(skew(n, seed)) for seed in range(6))
        scale = torch.linspace(1, 2, n, dtype=torch.float64).view(-1, *[1] * (step.theta.ndim - 1))
        return StepCoefficients(
            filter=LinearFilter(A=((A, 0.2), (A * 0.5, 0.0)), B=(B, 0.0), C=(C, 0.3), D=D),
            preconditioner=Composition((Diagonal(step.hyper["lr"] * scale), P)),
            gradient_operator=E,
            coupled_decay=0.1,
        )


@lru_cache
def skewed(unrecorded: int = 0) -> Run:
    run = record_batches(network(), Skewed, DATA, TARGETS, BATCHES, rule=SkewedRule(), unrecorded=unrecorded)
    return explaind.open_run(run.path, model=run.model, rule=SkewedRule())


@pytest.mark.parametrize(("strategy", "unrecorded"), [("adjoint", 0), ("adjoint", 2), ("features", 0)])
def test_every_operator_is_transposed(strategy, unrecorded):
    """An optimizer none of whose operators is its own transpose, nor commutes with another."""
    run = skewed(unrecorded)
    assert max(step.error for step in explaind.decompose(run)) < 1e-12
    truth = influences(run, INPUTS, 2)
    for keep in (
        ("step", "layer", "train", "test", "output"),
        ("gradient_step", "train", "test"),
        ("step", "gradient_step", "layer", "train", "test", "output"),
    ):
        for question in ({}, {"gradient_steps": [1, 3], "train": [4, 0]}, {"steps": {"a": [1, 2], "b": [4]}}):
            result = ask(run, keep, strategy=strategy, **question)
            assert_answers(result, truth, keep, **question)


# ------------------------------------------------------------------ single parameters
MIXING = {"inferred", "lion", "shampoo", "muon", "lbfgs"}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_parameters_are_told_apart_where_the_optimizer_leaves_them_apart(case):
    keep = ("step", "gradient_step", "parameter", "train", "test")
    restricted = {"train": [4, 0], "gradient_steps": [1, 3], "layers": {"part": {"0.weight": 1}}}
    for question in ({}, restricted) if case[1] != "plain" else (restricted,):
        if case[0].split("+")[0] in MIXING:  # of several optimizers, that of the matrices
            with pytest.raises(QuestionError, match="the adjoint cannot keep the parameter axis") as error:
                ask(example(*case), keep, **question)
            assert "strategy, step" in error.value.where
            assert error.value.remedy == "say strategy='features', or keep layers"
            continue
        truth = oracle(case)
        result = ask(example(*case), keep, **question)
        masks = {"part": truth.mask("0.weight", entries=1)} if "layers" in question else modules(truth)
        assert_answers(result, truth, keep, **question | {"layers": masks})


@pytest.mark.parametrize("keep", [("train", "test"), ("step", "layer", "train", "output"), ("gradient_step", "test")])
@pytest.mark.parametrize("case", [("nesterov", "micro"), ("adamw", "missing"), ("lbfgs", "plain"), ("muon", "plain")])
def test_restrictions_and_parts_of_parameters(case, keep):
    truth, parts = oracle(case), {"part": {"0.weight": 1}, "row": {"2.weight": slice(1, 2)}}
    masks = {"part": truth.mask("0.weight", entries=1), "row": truth.mask("2.weight", entries=1)}
    for question in (
        {"layers": parts},
        {"layers": parts, "train": [4, 0], "steps": [2, 4], "test": [2, 0]},
        {"gradient_steps": [1, 3], "train": {"a": [0, 1], "b": [4]}, "steps": {"early": [1], "late": [3, 4]}},
    ):
        result = ask(example(*case), keep, **question)
        told = masks if "layers" in question else modules(truth)
        assert_answers(result, truth, keep, **question | {"layers": told})


def test_momentum_that_is_switched_on_and_off_again():
    """States that appear on the way start at zero, and ask nothing of what came before."""
    schedule = [{"momentum": mu} for mu in (0.0, 0.0, 0.8, 0.7)]
    run = record_batches(
        network(), lambda ps: torch.optim.SGD(ps, lr=0.2), DATA, TARGETS, BATCHES, schedule=schedule
    )  # fmt: skip
    truth = influences(run, INPUTS, 1)
    for keep in (("step", "train", "test", "output"), ("gradient_step", "layer", "test")):
        for steps in (None, {"late": [4]}, {"early": [2], "late": [4]}):
            assert_answers(ask(run, keep, nodes=1, steps=steps), truth, keep, steps=steps)


def test_a_filter_that_gains_a_state():
    schedule = [{"momentum": mu} for mu in (0.0, 0.0, 0.8, 0.7)]
    run = record_batches(
        network(), lambda ps: torch.optim.SGD(ps, lr=0.2), DATA, TARGETS, BATCHES, schedule=schedule, rule=Grown()
    )  # fmt: skip
    run = explaind.open_run(run.path, model=run.model, rule=Grown())
    truth = influences(run, INPUTS, 1)
    for keep in (("step", "train", "test", "output"), ("gradient_step", "layer", "test")):
        for steps in (None, {"late": [4]}, {"early": [2], "late": [4]}):
            result = ask(run, keep, nodes=1, steps=steps)
            assert_answers(result, truth, keep, steps=steps)
            assert "tail_dropped" not in result.attrs  # it is zero, and not merely small


# ------------------------------------------------------------------ the quadrature
def test_adaptive_nodes_with_layers_left_out():
    """The prediction of a step includes what no layer holds; or every step would miss the tolerance."""
    keep = ("step", "train", "test", "output")
    question = {"layers": {"part": {"0.weight": 1}, "last": "2"}, "nodes": "adaptive", "tolerance": 1e-9}
    result = ask(example("adamw", "used"), keep, **question)
    assert result.converged.all()
    forwards = explaind.attribute(
        example("adamw", "used"), INPUTS, keep=("step", "test", "output"), strategy="reverse",
        progress=False, **question,
    )  # fmt: skip
    assert result.nodes.values.tolist() == forwards.nodes.values.tolist()
    bound = 1e-9 * float(abs(result.final - result.initial).max())
    assert float(abs(result.residual).max()) <= bound + 1e-14
    # Going backwards, the search for the order goes on where the later step ended.
    ladders = [sum(range(1, q + 1)) for q in result.nodes.values.tolist()]
    assert result.evaluations.values.tolist()[-1] == ladders[-1]
    assert result.evaluations.sum() < sum(ladders)


def test_how_well_the_update_is_explained_is_told():
    run, keep = example("inferred", "plain"), ("step", "train")
    result, forwards = ask(run, keep), ask(run, ("step",), strategy="forward")
    for name in ("update_error", "correction"):
        np.testing.assert_allclose(result[name], forwards[name], rtol=1e-9)
    assert result.correction.max() > 0
    summed = ask(run, ("train", "test"))
    assert summed.attrs["correction"] == float(result.correction.max())
    assert summed.attrs["update_error"] == float(result.update_error.max())


def test_a_function_that_is_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        ask(example("adamw"), ("train",), output=lambda call, x: call(x).log() * 1e300)
