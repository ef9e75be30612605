"""The reverse-time adjoint: transposes of everything, single parameters, blocks of test samples, and out=."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
from functools import lru_cache

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import explaind_core as explaind
from explaind_core import LinearFilter, StepCoefficients, UpdateRule
from explaind_core.errors import NonFiniteError, QuestionError
from explaind_core.operators import Composition, Diagonal, Left
from explaind_core.questions.restrictions import Sample
from explaind_core.results import result_writer as appending
from explaind_core.run.run import Run
from explaind_core.strategies.adjoint import Adjoint
from support.attribution_oracles import modules
from support.axes_oracle import AXES, Influences, assert_answers, influences
from support.axes_runs import BATCHES, CASES, DATA, INPUTS, TARGETS, example, network, record_batches

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.attribution.attribute")


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


class Grown(UpdateRule):
    """SGD's rule, but for a state that is only there once there is momentum."""

    optimizers = ("torch.optim.sgd.SGD",)
    options = frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "fused"})
    fixed = {"differentiable": (False,)}  # noqa: RUF012
    filter_states = ("momentum_buffer",)

    def coefficients(self, step):
        mu = step.hyper["momentum"]
        known = step.before.get("momentum_buffer") is not None
        return StepCoefficients(
            filter=LinearFilter.momentum(mu, first=not known) if mu else LinearFilter(),
            preconditioner=step.hyper["lr"],
        )


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


# ------------------------------------------------------------------ blocks of test samples, and out=
@pytest.fixture
def blocks(monkeypatch):
    """So many test samples in a pass."""
    original = module.choose

    def rows(size):
        monkeypatch.setattr(
            module, "choose", lambda *a: dataclasses.replace(original(*a), rows=size, passes=-(-3 // size))
        )

    return rows


@pytest.fixture
def walks(monkeypatch):
    """The blocks of test samples that were computed; ``walks.limit`` of them, then ``walks.error``."""

    class Walks(list):
        limit, error = 1000, KeyboardInterrupt

    done, original = Walks(), Adjoint.run

    def counting(self, *arguments):
        if len(done) >= done.limit:
            raise done.error
        done.append((self.block.start, self.block.stop))
        return original(self, *arguments)

    monkeypatch.setattr(Adjoint, "run", counting)
    return done


OUT = {
    "steps kept": {"keep": ("step", "layer", "train", "test", "output"), "nodes": "adaptive", "tolerance": 1e-7},
    "steps summed": {"keep": ("train", "test", "output"), "nodes": "adaptive", "tolerance": 1e-7},
    "missed": {"keep": ("train", "test"), "nodes": "adaptive", "tolerance": 1e-5, "max_nodes": 1},
    "restricted": {"keep": ("gradient_step", "test"), "test": [2, 0, 1], "train": [4, 0], "layers": ["2"]},
    "windows": {"keep": ("step", "train", "test"), "steps": {"early": [1], "late": [3, 4]}, "test": Sample(2)},
    "chords": {"keep": ("step", "train", "test"), "chords": 3, "nodes": "adaptive"},
}
RUN = ("nesterov", "used")


@pytest.mark.parametrize(("name", "rows"), [("steps kept", 1), *((name, 2) for name in OUT)])
def test_blocks_of_test_samples_are_put_together(name, rows, blocks, walks, tmp_path):
    """In memory and on disk; numbers as in one go, where the nodes are."""
    question = {"nodes": 3} | {k: v for k, v in OUT[name].items() if k not in ("nodes", "tolerance", "max_nodes")}
    whole = ask(example(*RUN), **question)
    samples = whole.sizes["test"]
    walks.clear()
    blocks(rows)
    cut = ask(example(*RUN), **question)
    assert walks == [(a, min(a + rows, samples)) for a in range(0, samples, rows)]
    xr.testing.assert_allclose(cut, whole, rtol=0, atol=1e-14)
    stored = ask(example(*RUN), out=tmp_path / "fixed.zarr", **question)
    xr.testing.assert_identical(stored.load(), cut)
    adaptive = ask(example(*RUN), **OUT[name])
    stored = ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name])
    for count in ("nodes_used", "nodes_evaluated"):  # in memory: the largest of any block, step by step
        if count in adaptive.attrs:
            assert 0 < stored.attrs[count] <= adaptive.attrs[count]
            adaptive.attrs[count] = stored.attrs[count]
    xr.testing.assert_identical(stored.load(), adaptive)
    assert explaind.closure_error(stored) < 1e-12


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["missed first", "missed last"])
@pytest.mark.parametrize("keep", [("step", "train", "test"), ("train", "test")])
def test_a_block_that_missed_the_tolerance_is_not_forgotten_for_one_that_met_it(keep, order, blocks, tmp_path):
    """One test sample's output is 0 throughout, which any number of nodes tells."""
    blocks(1)
    question = {"nodes": "adaptive", "max_nodes": 1, "tolerance": 1e-9, "output": lambda call, x: call(x) * x[:, :1]}
    inputs = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]], dtype=torch.float64)[order]
    options = {"keep": keep, "strategy": "adjoint", "progress": False, **question}
    memory = explaind.attribute(example(*RUN), inputs, **options)
    stored = explaind.attribute(example(*RUN), inputs, out=tmp_path / "result.zarr", **options)
    if "step" in keep:
        assert not memory.converged.any()
        assert not stored.converged.any()
    else:
        assert stored.attrs["steps_not_converged"] == memory.attrs["steps_not_converged"] == 4


@pytest.mark.parametrize(
    ("name", "limit", "error"),
    [("steps kept", 1, KeyboardInterrupt), ("steps summed", 2, KeyboardInterrupt), ("missed", 1, MemoryError)],
)
def test_an_interrupted_result_is_taken_up_behind_its_last_block(name, limit, error, blocks, walks, tmp_path):
    blocks(1)
    whole = ask(example(*RUN), out=tmp_path / "whole.zarr", **OUT[name]).load()
    walks.clear()
    walks.limit, walks.error = limit, error
    with pytest.raises(error):
        ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name])
    walks.clear()
    walks.limit = 1000
    resumed = ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name])
    assert walks == [(a, a + 1) for a in range(limit, 3)]
    xr.testing.assert_identical(resumed.load(), whole)
    walks.clear()
    xr.testing.assert_identical(ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name]).load(), whole)
    assert walks == []


@pytest.mark.parametrize("torn", ["kernel", "residual", "all"])
def test_a_block_that_was_cut_short_is_written_again(torn, blocks, walks, tmp_path):
    """Some chunks of it are written, whole or not; what is joined over the blocks is joined with it, or not."""
    blocks(1)
    question = OUT["steps kept"]
    whole = ask(example(*RUN), out=tmp_path / "whole.zarr", **question).load()
    walks.clear()
    walks.limit = 1
    with pytest.raises(KeyboardInterrupt):
        ask(example(*RUN), out=tmp_path / "result.zarr", **question)
    group = zarr.open_group(tmp_path / "result.zarr", mode="r+")
    for name, array in group.arrays():
        dims = array.metadata.dimension_names
        if "test" in dims and dims != ("test",) and torn in (name, "all"):
            array[tuple(1 if dim == "test" else slice(None) for dim in dims)] = 7.0
    if torn == "all":
        group["nodes"][...] = whole.nodes.values
    walks.clear()
    walks.limit = 1000
    xr.testing.assert_identical(ask(example(*RUN), out=tmp_path / "result.zarr", **question).load(), whole)
    assert walks == [(1, 2), (2, 3)]


def test_what_was_found_on_the_way_is_kept_with_the_result(tmp_path, blocks):
    """That tails were dropped, and the factor of the gradients: neither is known before the first block."""
    run = explaind.testing.record_example(
        30, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.1)
    )  # fmt: skip
    inputs, options = torch.ones(2, 4, dtype=torch.float64), {"nodes": 1, "progress": False, "strategy": "adjoint"}
    blocks(1)
    question = {"keep": ("train", "test"), "steps": [29, 30], **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adjoint, "run", _once(Adjoint.run))
        with pytest.raises(KeyboardInterrupt):
            explaind.attribute(run, inputs, out=tmp_path / "result.zarr", **question)
    stored = explaind.attribute(run, inputs, out=tmp_path / "result.zarr", **question)
    memory = explaind.attribute(run, inputs, **question)
    assert "tail_dropped" in stored.attrs
    assert stored.attrs["gradient_factor"] == [1, 1]
    xr.testing.assert_identical(stored.load(), memory)


def _once(run):
    calls = []

    def once(self, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(None)
        return run(self, *arguments)

    return once


@pytest.mark.parametrize(
    "other",
    [
        {"steps": {"a": [1, 2], "b": [4]}}, {"steps": {"a": [1], "c": [2, 4]}}, {"train": {"x": [0], "y": [4]}},
        {"train": {"x": [0], "y": [1]}}, {"gradient_steps": [1, 2]}, {"test": [0, 1, 2]}, {"test": [1, 0]},
        {"chords": 2}, {"nodes": "left"}, {"strategy": "features"}, {"keep": ("step", "train", "test")},
    ],
    ids=repr,
)  # fmt: skip
def test_the_result_of_another_question_is_not_touched(other, tmp_path):
    question = {"keep": ("step", "train", "test", "output"), "steps": {"a": [1], "b": [2, 4]}, "train": {"x": [0, 1]}}
    first = ask(example(*RUN), out=tmp_path / "result.zarr", **question).load()
    if other == {"test": [0, 1, 2]}:  # the same samples: the same question
        same = ask(example(*RUN), out=tmp_path / "result.zarr", **question | other)
        xr.testing.assert_identical(same.load(), first)
        return
    with pytest.raises(QuestionError, match="out= holds the result of another question"):
        ask(example(*RUN), out=tmp_path / "result.zarr", **question | other)
    xr.testing.assert_identical(explaind.open_result(tmp_path / "result.zarr").load(), first)


def test_without_the_test_axis_it_is_written_in_one_go(tmp_path):
    question = {"keep": ("step", "train"), "strategy": "adjoint"}
    stored = ask(example(*RUN), out=tmp_path / "result.zarr", **question).load()
    xr.testing.assert_identical(stored, ask(example(*RUN), **question))


# ------------------------------------------------------------------ out= of the other strategies
STEPWISE = {
    "reverse": {"keep": ("step", "parameter", "test")},
    "features": {"keep": ("step", "layer", "train", "test"), "gradient_steps": [1, 2, 4]},
    "features, all axes": {"keep": AXES},
    "features, windows": {"keep": ("step", "train"), "steps": {"a": [1], "b": [2], "c": [4]}},
    "reverse, chords and gaps": {"keep": ("step", "parameter"), "steps": [1, 2, 4], "chords": 2},
    "forward, chords": {"keep": ("step", "test", "output"), "chords": 2},
}


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("limit", [1, 2])
def test_steps_are_written_block_by_block_and_taken_up(name, limit, tmp_path, monkeypatch):
    """Blocks of one or two steps; what goes before the first step of a block is known again."""
    question = {"strategy": name.partition(",")[0], "nodes": "adaptive", "tolerance": 1e-7, **STEPWISE[name]}
    monkeypatch.setattr(appending, "BLOCK", 2 if limit == 2 else 1)
    whole = ask(example(*RUN), out=tmp_path / "whole.zarr", **question)
    memory = ask(example(*RUN), **question)
    xr.testing.assert_identical(whole.load(), memory)
    original, done = module.stepwise, []

    def interrupted(*arguments, **options):
        for part in original(*arguments, **options):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(part.window)
            yield part

    windows = whole.sizes["step"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "stepwise", interrupted)
        if limit < windows:
            with pytest.raises(KeyboardInterrupt):
                ask(example(*RUN), out=tmp_path / "result.zarr", **question)
    assert limit >= windows or (tmp_path / "result.zarr").exists()
    resumed = ask(example(*RUN), out=tmp_path / "result.zarr", **question)
    xr.testing.assert_identical(resumed.load(), whole.load())
    shutil.rmtree(tmp_path / "result.zarr")
