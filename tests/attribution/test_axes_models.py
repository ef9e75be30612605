"""attribute() over all seven axes on other models, losses and inputs, against the dense oracle."""

from __future__ import annotations

from functools import lru_cache
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from support.attribution_oracles import modules
from support.axes_oracle import AXES, SUBSETS, assert_answers, influences
from support.axes_runs import record_batches
from support.updates_oracle import sample_gradients

#: Ragged; a sample twice in the second batch.
BATCHES = [[0, 1, 2], [4, 4, 3], [5, 0]]
MICRO = [[([0, 1, 2], 0.75), ([3], 0.25)], [([4, 4], 0.5), ([5, 0], 0.5)], [([1], 1.0)]]
#: Enough to tell apart every way to an answer.
KEPT = [AXES, ("train", "test", "output"), ("step", "train"), ("gradient_step", "layer", "train", "test"),
        ("step", "parameter", "test"), ("step", "layer", "test", "output"), ()]  # fmt: skip


class Transformer(nn.Module):
    """One layer over embedded tokens; what it explains is the last position."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens))[:, -1])


class TiedLSTM(nn.Module):
    """A language model: the embedding is the output layer, too. Logits [n, V, T], as cross-entropy wants them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(5, 2), nn.LSTM(2, 2, batch_first=True)
        self.head = nn.Linear(2, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.lstm(self.embedding(tokens))[0]).mT


class Two(nn.Module):
    """Inputs by keyword, and a layer that training never reaches: it counts, but does not move."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.spare = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2)

    def forward(self, *, a, b):
        found = torch.tanh(self.left(a)) * self.right(b)
        return found if self.training else found + self.spare(a)


def numbers(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(n):
    return torch.randint(5, (n, 3))


def classes(n):
    return torch.randint(2, (n,))


def next_tokens(n):
    """Some of them padding, which the loss ignores: its normaliser is the whole batch's number of tokens."""
    targets = torch.randint(5, (n, 3))
    targets[::2, 0] = -100
    return targets


def perceptron():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2))


def normalised():
    # No bias before the norm: its gradient is 0 but for rounding, which AdamW would divide by 1e-8.
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))


def partly_frozen():
    model = perceptron()
    model[0].requires_grad_(False)
    return model


#: model, its inputs, its targets, layers (as asked; and the entries they name).
MODELS = {
    "perceptron": (
        perceptron, numbers(4), classes,
        {"neuron": {"0.weight": (1, slice(None)), "0.bias": 1, "2.weight": (slice(None), 1)}, "bias": "2.bias"},
        {"neuron": {"0.weight": 1, "0.bias": 1, "2.weight": (slice(None), 1)}, "bias": {"2.bias": ...}},
    ),
    "convolution": (
        convolutional, numbers(1, 3, 3), classes,
        {"channel": {"0.weight": 1, "0.bias": 1}, "corner": {"0.weight": (0, 0, 0, 0)}},
        {"channel": {"0.weight": 1, "0.bias": 1}, "corner": {"0.weight": (0, 0, 0, 0)}},
    ),
    "transformer": (
        Transformer, tokens, classes,
        {"head": {"layer.self_attn.in_proj_weight": slice(2, 4), "layer.self_attn.in_proj_bias": slice(2, 4),
                  "layer.self_attn.out_proj.weight": (slice(None), slice(2, 4))},
         "token": {"embedding.weight": 3}},
        {"head": {"layer.self_attn.in_proj_weight": slice(2, 4), "layer.self_attn.in_proj_bias": slice(2, 4),
                  "layer.self_attn.out_proj.weight": (slice(None), slice(2, 4))},
         "token": {"embedding.weight": 3}},
    ),
    "tied LSTM": (
        TiedLSTM, tokens, next_tokens,
        {"forget gate": {"lstm.weight_?h_l0": slice(2, 4)}, "token": {"embedding.weight": 1}},
        {"forget gate": {"lstm.weight_ih_l0": slice(2, 4), "lstm.weight_hh_l0": slice(2, 4)},
         "token": {"embedding.weight": 1}},
    ),
    "keywords": (
        Two, lambda n: {"a": numbers(3)(n), "b": numbers(2)(n)}, classes, {"left": ["left"]},
        {"left": {"left.weight": ..., "left.bias": ...}},
    ),
    "frozen layer": (
        partly_frozen, numbers(4), classes, {"first": "0.*"}, {"first": {"0.weight": ..., "0.bias": ...}},
    ),
    "batch norm": (
        normalised, numbers(3), classes, {"norm": "1"}, {"norm": {"1.weight": ..., "1.bias": ...}},
    ),
}  # fmt: skip
OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.03, betas=(0.8, 0.9), weight_decay=0.3),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.7, weight_decay=0.1),
}


@lru_cache
def trained(name, optimizer="adamw", micro=False):
    """A run and test samples."""
    make, make_inputs, make_targets = MODELS[name][:3]
    torch.manual_seed(3)
    model, inputs, targets = make().double(), make_inputs(6), make_targets(6)
    # Batch norm wants more than one sample at a time.
    batches = [[0, 1, 2], [4, 4, 3], [5, 0, 1]] if name == "batch norm" else MICRO if micro else BATCHES
    return record_batches(model, OPTIMIZERS[optimizer], inputs, targets, batches), make_inputs(2)


@lru_cache
def oracle(name, optimizer="adamw", micro=False, nodes=1):
    return influences(*trained(name, optimizer, micro), nodes)


def compare(name, keep, *, optimizer="adamw", micro=False, nodes=1, parts=False, **question):
    run, inputs = trained(name, optimizer, micro)
    truth = oracle(name, optimizer, micro, nodes)
    asked, entries = MODELS[name][3:]
    masks = {layer: sum(truth.mask(n, entries=e) for n, e in found.items()) for layer, found in entries.items()}
    strategy = question.pop("strategy", None)
    result = explaind.attribute(
        run, inputs, keep=keep, nodes=nodes, progress=False, strategy=strategy,
        layers=asked if parts else None, buffers="final", **question,
    )  # fmt: skip
    assert_answers(result, truth, keep, layers=masks if parts else modules(truth), **question)
    return result


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_answered_on_all_axes(name, optimizer):
    results = [compare(name, keep, optimizer=optimizer) for keep in KEPT]
    assert float(abs(results[0].kernel).max()) > 1e-3  # not trivially


@pytest.mark.parametrize("name", ["perceptron", "convolution", "transformer", "tied LSTM"])
def test_parts_of_parameters_are_told_apart(name):
    for keep in KEPT:
        compare(name, keep, micro=True, parts=True, train=[4, 0], test=[1])


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(["perceptron", "convolution", "transformer", "tied LSTM"]),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    keep=st.sampled_from(SUBSETS),
    parts=st.booleans(),
    micro=st.booleans(),
    steps=st.sampled_from([None, [1, 3], {"first": [1], "others": slice(2, 4)}]),
    gradient_steps=st.sampled_from([None, [1, 3], slice(1, 3)]),
    train=st.sampled_from([None, [2, 0], {"some": [0, 1], "other": [2]}]),
    nodes=st.sampled_from([1, 2, "left"]),
)
def test_any_question_about_any_model_is_answered(
    name, optimizer, keep, parts, micro, steps, gradient_steps, train, nodes
):
    restricted = {"steps": steps, "gradient_steps": gradient_steps, "train": train}
    compare(name, keep, optimizer=optimizer, micro=micro, nodes=nodes, parts=parts, **restricted)


@pytest.mark.parametrize("strategy", ["forward", "reverse", "features", "adjoint"])
@pytest.mark.parametrize("name", ["convolution", "transformer", "tied LSTM", "keywords"])
def test_every_strategy_agrees_on_every_model(name, strategy):
    answered = 0
    for keep in (("layer", "test", "output"), ("train", "test", "output"), ("train", "layer", "test"), ("parameter",)):
        keep = tuple(axis for axis in AXES if axis in keep)
        try:
            compare(name, keep, strategy=strategy)
        except QuestionError as error:
            if "strategy" not in str(error):
                raise
        else:
            answered += 1
    assert answered


# ------------------------------------------------------------------ losses
LOSSES = {
    "class weights": lambda: nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.7], dtype=torch.float64)),
    "a sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "one per sample": lambda: nn.CrossEntropyLoss(reduction="none"),
    "a function": lambda: nn.functional.cross_entropy,
    "a callable of the user": lambda: lambda output, target: (output[:, 0] - target).square().mean() / 2,
    "all outputs at once": lambda: nn.MSELoss(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_samples_share_is_that_of_the_loss_that_was_trained_on(name):
    torch.manual_seed(3)
    model, inputs = perceptron().double(), numbers(4)(6)
    targets = numbers(2)(6) if name == "all outputs at once" else classes(6)
    loss = LOSSES[name]()
    run = record_batches(model, OPTIMIZERS["momentum"], inputs, targets, MICRO, loss=loss)
    truth = influences(run, numbers(4)(2), 1, loss=loss)
    torch.manual_seed(3)
    perceptron(), numbers(4)(6)
    for keep in (AXES, ("train", "test", "output"), ("step", "train"), ()):
        test = numbers(4)(2)
        truth = influences(run, test, 1, loss=loss)
        assert_answers(explaind.attribute(run, test, keep=keep, nodes=1, progress=False), truth, keep)


# ------------------------------------------------------------------ what cannot be split
def test_dropout_in_training_is_no_share_where_its_random_numbers_are_not_known():
    """The samples' own gradients are drawn anew: they do not add up to what the optimizer was fed."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    inputs, targets = numbers(4)(6), classes(6)
    run = record_batches(model, OPTIMIZERS["adamw"], inputs, targets, BATCHES)
    with mock.patch(
        "explaind_core.training_step.forward_state.ForwardState.stored", return_value=None
    ):  # as an older release recorded it
        with pytest.raises(explaind.errors.RecordingError, match="depend on chance"):
            explaind.attribute(run, inputs[:2], keep=("train", "test"), nodes=1, progress=False)
        summed = explaind.attribute(run, inputs[:2], keep=("step", "test"), nodes=1, progress=False)
        assert explaind.closure_error(summed) < 1e-12  # needs no shares


def test_a_factor_that_was_not_declared_is_told():
    """A sum where the run took the mean: the split is the same, and the result tells the factor."""
    torch.manual_seed(3)
    run = record_batches(perceptron().double(), OPTIMIZERS["adamw"], numbers(4)(6), classes(6), BATCHES)
    wrong = explaind.open_run(run.path, model=perceptron().double(), loss=nn.CrossEntropyLoss(reduction="sum"))
    inputs = numbers(4)(2)
    right = explaind.attribute(
        explaind.open_run(run.path, model=perceptron().double()), inputs, keep=("train",), nodes=1, progress=False
    )
    result = explaind.attribute(wrong, inputs, keep=("train",), nodes=1, progress=False)
    np.testing.assert_allclose(result.kernel, right.kernel, rtol=0, atol=1e-13)
    np.testing.assert_allclose(right.attrs["gradient_factor"], [1, 1], rtol=1e-12)
    sizes = [len(run.sample_ids(s)) for s in run.steps]
    np.testing.assert_allclose(result.attrs["gradient_factor"], [1 / max(sizes), 1 / min(sizes)], rtol=1e-12)


def test_the_oracle_knows_that_a_batch_is_normalised_together():
    """Batch norm in training: each row's share reaches all others through the batch's statistics."""
    run, _ = trained("batch norm")
    _, shares = sample_gradients(run, 1)
    for name, fed in run.gradients(1).items():
        torch.testing.assert_close(sum(row[name] for row in shares), fed, rtol=1e-10, atol=1e-12)
