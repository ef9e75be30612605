"""attribute() against the dense oracle, for any kept axes, layers, steps, optimizers and nodes."""

from __future__ import annotations

from functools import lru_cache, partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.questions.question import Question
from explaind_core.run.run import Run
from explaind_core.testing import record_example
from support.attribution_oracles import SUBSETS, Dense, assert_equal, dense, modules, record

STEPS = 5
INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.5),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.05, amsgrad=True, weight_decay=0.1),
}
#: (what to ask for, the parameters it names: layer -> [(parameter, entries)])
LAYERS = {
    "prefix": (["2"], {"2": [("2.weight", ...), ("2.bias", ...)]}),
    "patterns": (
        {"weights": "*.weight", "biases": ["0.bias", "2.bias"]},
        {"weights": [("0.weight", ...), ("2.weight", ...)], "biases": [("0.bias", ...), ("2.bias", ...)]},
    ),
    "slices": (
        {"neuron": {"0.weight": (1, slice(None)), "0.bias": 1}, "others": {"0.weight": slice(2, 5)}},
        {"neuron": [("0.weight", 1), ("0.bias", 1)], "others": [("0.weight", slice(2, 5))]},
    ),
}


@lru_cache
def example(optimizer: str) -> Run:
    return record_example(STEPS, make_optimizer=OPTIMIZERS[optimizer])


@lru_cache
def oracle(optimizer: str, nodes: int) -> Dense:
    return dense(example(optimizer), INPUTS, nodes)


def layer_masks(truth: Dense, name: str | None) -> dict[str, torch.Tensor]:
    if name is None:
        return modules(truth)
    masks = LAYERS[name][1].items()
    return {layer: sum(truth.mask(n, entries=e) for n, e in parts) for layer, parts in masks}


def spec(name: str | None):
    return None if name is None else LAYERS[name][0]


some_steps = st.one_of(
    st.none(),
    st.builds(slice, st.integers(1, 3), st.integers(4, STEPS + 1), st.sampled_from([None, 2])),
    st.sampled_from([[1, 3, 4], [2, 5], range(2, 4), [5]]),
    st.integers(1, STEPS),
)


def as_list(steps) -> list[int]:
    if isinstance(steps, int):
        return [steps]
    every = range(1, STEPS + 1)
    return [s for s in every if steps is None or s in (every[slice(steps.start - 1, steps.stop - 1, steps.step)]
            if isinstance(steps, slice) else steps)]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    keep=st.sampled_from(SUBSETS),
    layers=st.sampled_from([None, *LAYERS]),
    steps=some_steps,
    optimizer=st.sampled_from([*OPTIMIZERS]),
    nodes=st.integers(1, 3),
    chunk=st.sampled_from([1, 2, 500]),
)
def test_any_question_is_answered_as_the_oracle_answers_it(keep, layers, steps, optimizer, nodes, chunk):
    truth = oracle(optimizer, nodes)
    with mock.patch.object(Question, "ask", partial(Question.ask, chunk=chunk)):
        result = explaind.attribute(
            example(optimizer), INPUTS, keep=keep, layers=spec(layers), steps=steps, nodes=nodes, progress=False
        )
    assert result.kernel.dims == keep
    assert_equal(result, truth.expected(keep, layer_masks(truth, layers), as_list(steps)))


@pytest.mark.parametrize("keep", SUBSETS, ids=lambda keep: "-".join(keep) or "nothing")
def test_every_subset_of_the_axes_sums_the_others(keep):
    result = explaind.attribute(example("adamw"), INPUTS, keep=keep, nodes=2, progress=False)
    truth = oracle("adamw", 2)
    assert_equal(result, truth.expected(keep, modules(truth), range(1, STEPS + 1)))


def test_the_order_in_which_axes_are_named_does_not_matter():
    one = explaind.attribute(example("sgd"), INPUTS, keep=("output", "step"), nodes=1, progress=False)
    other = explaind.attribute(example("sgd"), INPUTS, keep=("step", "output"), nodes=1, progress=False)
    assert one.identical(other)


def test_a_result_is_labelled():
    result = explaind.attribute(example("adamw"), INPUTS, steps=[2, 4], layers=["2"], nodes=2, progress=False)
    assert result.kernel.dims == result.regularization.dims == ("step", "layer", "test", "output")
    assert result.residual.dims == result.omitted.dims == ("step", "test", "output")
    assert result.initial.dims == result.final.dims == ("test", "output")
    labels = {name: values.values.tolist() for name, values in result.coords.items()}
    assert labels == {"step": [2, 4], "layer": ["2"], "test": [0, 1, 2], "output": [0, 1, 2]}
    assert result.nodes.values.tolist() == [2, 2]
    assert result.converged.all()
    wanted = {
        "optimizer": "torch.optim.adamw.AdamW", "dtype": "torch.float64", "output": "Outputs", "first_step": 2,
        "last_step": 4, "steps_asked": 2, "layers_restricted": 1, "nodes_asked": "2",
    }  # fmt: skip
    assert {key: result.attrs[key] for key in wanted} == wanted
    assert "added to the output" in result.attrs["sign"]


def test_without_the_step_axis_the_effort_is_kept_as_attributes():
    result = explaind.attribute(example("adamw"), INPUTS, keep=("layer",), nodes=3, progress=False)
    assert result.attrs["nodes_used"] == result.attrs["nodes_evaluated"] == 3 * STEPS
    assert result.attrs["steps_not_converged"] == 0
    assert result.attrs["update_error"] <= 1e-12  # float64


def test_what_restrictions_leave_out_is_kept_as_omitted():
    complete = explaind.attribute(example("adamw"), INPUTS, nodes=2, progress=False)
    restricted = explaind.attribute(example("adamw"), INPUTS, nodes=2, layers=["2"], progress=False)
    left_out = (complete.kernel + complete.regularization).sel(layer="0")
    np.testing.assert_allclose(restricted.omitted, left_out, atol=1e-12)
    assert not complete.omitted.any()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "amsgrad"])
def test_a_used_optimizer_adds_a_prehistory(tmp_path, optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data, targets = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    run = record(tmp_path / "run", model, OPTIMIZERS[optimizer], data, targets, unrecorded=3)
    truth = dense(run, INPUTS, 2)
    result = explaind.attribute(run, INPUTS, nodes=2, progress=False)
    assert float(abs(result.prehistory).max()) > 1e-4
    assert_equal(result, truth.expected(("step", "layer", "test", "output"), modules(truth), run.steps))


def test_a_fresh_optimizer_has_no_prehistory():
    assert "prehistory" not in explaind.attribute(example("sgd"), INPUTS, nodes=1, progress=False)


@settings(deadline=None, max_examples=10)
@given(keep=st.sampled_from(SUBSETS), nodes=st.sampled_from([1, 2, "adaptive"]))
def test_a_run_in_float32_closes_as_exactly_as_one_in_float64(keep, nodes):
    """Influences are stored in float32 where steps are kept; the residual takes up what that rounds off."""
    result = explaind.attribute(single(), INPUTS.float(), keep=keep, nodes=nodes, progress=False)
    assert explaind.closure_error(result) <= 1e-12
    assert result.kernel.dtype == ("float32" if "step" in keep else "float64")


@lru_cache
def single() -> Run:
    return record_example(STEPS, dtype=torch.float32)


def test_a_run_in_float32_equals_the_oracle_to_its_own_precision():
    truth = dense(single(), INPUTS.float(), 2)
    result = explaind.attribute(single(), INPUTS.float(), nodes=2, progress=False)
    keep = ("step", "layer", "test", "output")
    # A few dozen float32 roundings (6e-8 each) of numbers below 1.
    assert_equal(result, truth.expected(keep, modules(truth), single().steps), tolerance=4e-6)


def test_closure_error_reports_what_does_not_close():
    result = explaind.attribute(example("sgd"), INPUTS, nodes=1, progress=False)
    broken = result.assign(kernel=result.kernel + 0.25)
    # 0.25 too much in each of 5 steps and 2 layers
    assert explaind.closure_error(broken) == pytest.approx(0.25 * STEPS * 2)


def test_the_users_model_is_left_alone(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    data, targets = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    run = record(tmp_path / "run", model, OPTIMIZERS["sgd"], data, targets)
    model.train()
    assert run.model is not None
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (model, run.model)]
    explaind.attribute(run, INPUTS, nodes=2, progress=False)
    assert model.training
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    for m, state in zip((model, run.model), before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in m.state_dict().items())


def test_a_progress_bar_is_shown_only_where_asked_for(capsys):
    explaind.attribute(example("sgd"), INPUTS, nodes=1, progress=False)
    assert capsys.readouterr().out == ""
    explaind.attribute(example("sgd"), INPUTS, nodes=1, progress=True)
    assert "attributing" in capsys.readouterr().out
