"""kernel_slices() against attribute() by the adjoint and similarity(), which have dense oracles of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from support.attribution_oracles import modules
from support.axes_oracle import AXES, influences
from support.axes_runs import BATCHES, CASES, DATA, INPUTS, OPTIMIZERS, TARGETS, example, network, record_batches

TRAINED = [
    ("adamw", "micro"), ("nesterov", "plain"), ("shampoo", "plain"), ("muon", "used"), ("ademamix", "plain"),
    ("schedule-free", "evaluated"), ("lion", "plain"), ("nesterov", "missing"),
]  # fmt: skip
assert {*TRAINED} <= {*CASES}
LAST = len(BATCHES)
WINDOWS = st.sampled_from([None, {"all": slice(1, LAST + 1)}, {"a": [2], "b": [3, 4]}, {"late": [LAST - 1, LAST]}])


def options(run, windows, nodes, train, n):
    return {
        "steps": windows, "nodes": nodes, "tolerance": 1e-6, "train": train, "test": slice(0, n), "progress": False,
    }  # fmt: skip


@given(
    trained=st.sampled_from(TRAINED), windows=WINDOWS, nodes=st.sampled_from([1, 3, "adaptive"]),
    train=st.sampled_from([None, [0, 3, 4], {"some": [1, 2], "others": [0]}]), n=st.integers(1, len(INPUTS)),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_both_matrices_equal_what_is_asked_for_apart(trained, windows, nodes, train, n):
    run = example(*trained)
    asked = options(run, windows, nodes, train, n)
    found = explaind.kernel_slices(run, INPUTS, **asked)
    kernel = explaind.attribute(run, INPUTS, keep=("step", "layer", "train", "test"), **asked)
    largest = float(abs(kernel.final).max())
    for name in ("kernel", "regularization", "residual", "omitted"):
        np.testing.assert_allclose(found[name].values, kernel[name].values, rtol=0, atol=1e-10 * largest, err_msg=name)
    assert explaind.closure_error(found) <= 1e-12 * largest
    over = ("step", "parameter", "train")
    similar = explaind.similarity(run, INPUTS, over=over, per=("step", "layer"), **asked)
    assert found.similarity.dims == similar.dims
    np.testing.assert_allclose(found.similarity.values, similar.values, rtol=0, atol=1e-10)


def test_similarity_is_the_cosine_of_the_explicit_tensors():
    run = example("adamw", "plain")
    truth = influences(run, INPUTS, 2, None)
    steps = [LAST - 1, LAST]
    kernel = truth.expected(AXES, layers=modules(truth), steps=steps)["kernel"]
    kernel = kernel.sum((AXES.index("gradient_step"), AXES.index("output")))  # first
    rest = [axis for axis in AXES if axis not in ("gradient_step", "output")]
    tensors = np.moveaxis(kernel, (rest.index("layer"), rest.index("test")), (0, 1))
    flat = tensors.reshape(*tensors.shape[:2], -1)
    unit = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    found = explaind.kernel_slices(run, INPUTS, steps={"late": steps}, nodes=2, progress=False)
    np.testing.assert_allclose(found.similarity.values[0], unit @ unit.swapaxes(-1, -2), rtol=0, atol=1e-10)


def test_a_sample_that_nothing_influenced_has_no_similarity():
    run = example("adamw", "plain")
    dead = torch.zeros_like(INPUTS[:2])
    found = explaind.kernel_slices(run, dead, steps={"all": slice(1, 3)}, layers=["0"], nodes=1, progress=False)
    # Zero inputs: the first layer's weights do nothing, but its biases may.
    assert np.isfinite(found.kernel).all()
    assert ((abs(found.kernel).sum("train") == 0) == np.isnan(found.similarity).all("other")).all()


@pytest.mark.parametrize("memory", [2000, 4000])
def test_what_does_not_fit_is_refused_before_any_work(memory):
    with pytest.raises(QuestionError, match="memory budget"):
        explaind.kernel_slices(example("adamw", "plain"), INPUTS, memory=memory, progress=False)


def test_late_windows_start_where_gradients_matter(monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    run = record_batches(
        model, lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.3, 0.9)), torch.randn(4, 2).double(),
        torch.randn(4, 1).double(), [[s % 4, (s + 1) % 4] for s in range(60)], loss=nn.MSELoss(),
    )  # fmt: skip
    inputs = torch.randn(2, 2).double()
    asked = {"keep": ("train", "test"), "steps": [59, 60], "nodes": 1, "progress": False}
    fast = explaind.attribute(run, inputs, strategy="features", **asked)
    assert "below rounding before step 2" in fast.attrs["tail_dropped"]
    slow = explaind.attribute(run, inputs, strategy="adjoint", **asked)
    np.testing.assert_allclose(fast.kernel.values, slow.kernel.values, rtol=0, atol=1e-15)


def test_a_layer_without_gradients_so_far_has_no_similarity_there():
    first = ["0.weight", "0.bias"]
    run = record_batches(
        network(), OPTIMIZERS["adamw"], DATA, TARGETS, BATCHES, missing={1: first, 2: first}
    )  # fmt: skip
    asked = options(run, {"a": [1], "b": [2, 3]}, 1, None, len(INPUTS))
    found = explaind.kernel_slices(run, INPUTS, **asked).similarity
    assert np.isnan(found.sel(step="a", layer="0")).all()
    assert np.isfinite(found.sel(step="b")).all()
    apart = explaind.similarity(run, INPUTS, over=("step", "parameter", "train"), per=("step", "layer"), **asked)
    np.testing.assert_allclose(found.values, apart.values, rtol=0, atol=1e-10)
