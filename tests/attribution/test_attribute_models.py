"""attribute() on every kind of model: attention, convolutions, buffers, frozen and sparse parameters, odd inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core.questions.question import Question
from explaind_core.testing import record_example
from support.attribution_oracles import assert_equal, dense, modules, record

EVERYTHING = ("step", "layer", "test", "output")


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.3)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention: a fused kernel and a fast path of its own in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, -1])


class ScaledDotProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(query, key, value, is_causal=True).mean(1))


class TransformerLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, batch_first=True, activation="gelu")
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Tokens(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 4, sparse=sparse), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.embedding(tokens)).sum(1)))


class Named(nn.Module):
    """Inputs by keyword, one of them integers."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = Tokens(), nn.Linear(6, 2)

    def forward(self, *, numbers, tokens):
        return self.head(torch.cat([numbers, self.tokens(tokens)], -1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, a, b):
        return torch.tanh(self.left(a)) * self.right(b)


class Tied(nn.Module):
    """One parameter used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, tokens):
        return torch.tanh(self.embedding(tokens).mean(1)) @ self.embedding.weight.T


class Branching(nn.Module):
    """Control flow that depends on data, through a Python number."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(torch.tanh(hidden) if hidden.sum().item() > 0 else hidden.sin())


class Sine(torch.autograd.Function):
    """An operator with a derivative rule of its own, which looks at its tangent's numbers: vmap has none to show."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004 (torch's signature)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        if tangent.abs().max().item() == 0:
            return torch.zeros_like(tangent)
        return ctx.saved_tensors[0].cos() * tangent


class Extension(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.second(Sine.apply(self.first(x)))


def numbers(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


def tokens(n):
    return torch.randint(7, (n, 3))


def convolutional():
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 2))


def normalised():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))


def partly_frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    return model


MODELS = {
    "attention": (SelfAttention, numbers(3, 4)),
    "scaled dot product": (ScaledDotProduct, numbers(3, 4)),
    "transformer layer": (TransformerLayer, numbers(3, 4)),
    "convolution": (convolutional, numbers(1, 4, 4)),
    "embedding and layer norm": (Tokens, tokens),
    "tied weights": (Tied, tokens),
    "batch norm and dropout": (normalised, numbers(4)),
    "keywords": (Named, lambda n: {"numbers": numbers(4)(n), "tokens": tokens(n)}),
    "two arguments": (Pair, lambda n: (numbers(4)(n), numbers(3)(n))),
    "data-dependent branch": (Branching, numbers(4)),
    "extension": (Extension, numbers(4)),
    "frozen layer": (partly_frozen, numbers(4)),
}


def trained(path, make_model, make_inputs, make_optimizer=adamw, **options):
    torch.manual_seed(3)
    run = record(
        path, make_model().double(), make_optimizer, make_inputs(16), torch.randint(2, (16,)), steps=3, **options
    )
    return run, make_inputs(3)


@pytest.mark.parametrize("name", MODELS)
def test_every_influence_equals_the_oracle(tmp_path, name):
    run, inputs = trained(tmp_path / "run", *MODELS[name])
    result = explaind.attribute(run, inputs, nodes=2, buffers="final", progress=False)
    truth = dense(run, inputs, 2)
    assert_equal(result, truth.expected(EVERYTHING, modules(truth), run.steps))
    assert float(abs(result.kernel).max()) > 1e-3  # not trivially


def test_a_sparse_gradient_equals_the_oracle(tmp_path):
    run, inputs = trained(tmp_path / "run", lambda: Tokens(sparse=True), tokens, plain_sgd)
    assert run.gradients(1)["embedding.weight"].is_sparse
    result = explaind.attribute(run, inputs, nodes=2, progress=False)
    truth = dense(run, inputs, 2)
    assert_equal(result, truth.expected(EVERYTHING, modules(truth), run.steps))


def test_what_cannot_be_vectorised_is_differentiated_one_by_one(tmp_path):
    run, inputs = trained(tmp_path / "run", Extension, numbers(4))
    function = Question.ask(run, inputs).function
    tangents = [{n: torch.ones_like(t) * k for n, t in run.theta(1).items()} for k in (1, 2)]
    once, twice = function.at(1).derivatives(run.theta(1), tangents)
    assert function.differentiator.way == "torch.func, one by one"
    torch.testing.assert_close(twice, 2 * once)


def test_a_frozen_layer_contributes_nothing(tmp_path):
    run, inputs = trained(tmp_path / "run", partly_frozen, numbers(4))
    result = explaind.attribute(run, inputs, nodes=1, progress=False)
    assert result.layer.values.tolist() == ["0", "2"]
    assert not result.kernel.sel(layer="0").any()
    assert not result.regularization.sel(layer="0").any()


def test_buffers_are_held_at_their_last_values_and_dropout_is_off(tmp_path):
    run, inputs = trained(tmp_path / "run", normalised, numbers(4))
    assert not torch.equal(run.buffers(0)["1.running_mean"], run.buffers(3)["1.running_mean"])
    model = normalised().double().eval()
    fresh = explaind.open_run(run.path, model=model)  # whose own buffers are those of an untrained model
    result = explaind.attribute(fresh, inputs, nodes=1, buffers="final", progress=False)
    for step, kept in ((0, result.initial), (3, result.final)):
        model.load_state_dict({**run.theta(step), **run.buffers(3)})
        np.testing.assert_allclose(kept, model(inputs).detach(), rtol=0, atol=1e-14)


def test_a_layer_without_gradient_moves_by_nothing(tmp_path):
    """A branch the loss never reaches: the optimizer skips it, and so does the decomposition."""

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    run, inputs = trained(tmp_path / "run", Unused, numbers(4))
    result = explaind.attribute(run, inputs, nodes=1, progress=False)
    assert not result.kernel.sel(layer="spare").any()
    assert explaind.closure_error(result) <= 1e-12


def test_more_samples_than_fit_a_chunk_of_default_size():
    run = record_example(steps=2)
    inputs = torch.randn(501, 4, dtype=torch.float64)
    assert len(Question.ask(run, inputs).function.chunks) == 2
    together = explaind.attribute(run, inputs, nodes=1, progress=False)
    last = explaind.attribute(run, inputs[500:], nodes=1, progress=False)
    for name in ("kernel", "regularization", "residual"):
        # Other sizes of matrix products round differently: a few eps of numbers below 1.
        np.testing.assert_allclose(together[name][..., 500:, :], last[name], rtol=0, atol=1e-14)


def test_the_fused_attention_path_is_switched_back_on(tmp_path):
    run, inputs = trained(tmp_path / "run", TransformerLayer, numbers(3, 4))
    for enabled in (True, False):
        torch.backends.mha.set_fastpath_enabled(enabled)
        try:
            explaind.attribute(run, inputs, nodes=1, progress=False)
            assert torch.backends.mha.get_fastpath_enabled() is enabled
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


def test_an_output_that_turns_infinite_is_named(tmp_path):
    run, inputs = trained(tmp_path / "run", partly_frozen, numbers(4))
    start = Question.ask(run, inputs).function.at(0).values(run.theta(0))

    def diverging(call, inputs):
        values = call(inputs)
        return values if torch.equal(values, start) else values / 0

    with pytest.raises(explaind.errors.NonFiniteError, match=r"NaN or infinite\n  where:    theta after step 1"):
        explaind.attribute(run, inputs, output=diverging, nodes=1, progress=False)
