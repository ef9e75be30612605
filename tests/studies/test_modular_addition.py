"""The paper's task and Transformer, against a straightforward implementation of both."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.questions.layers import resolve_layers
from explaind_core.run.run import ParameterInfo
from explaind_studies.modular_addition import LAYERS, ModularTransformer, modular_addition
from support.attribution_oracles import dense


def reference(model: ModularTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Attention for all four positions, and every layer at every position; read off at the last."""
    w = dict(model.named_parameters())
    x = w["embedding.weight"][tokens] * 8  # sqrt(64)
    attended = torch.zeros_like(x)
    for head in range(4):
        encode, decode = w[f"attention.encoders.{head}.weight"], w[f"attention.decoders.{head}.weight"]
        projected = torch.einsum("hd,ntd->nth", encode, x)
        scores = torch.einsum("nqh,nkh->nqk", projected, projected) / math.sqrt(16)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        attended = attended + torch.einsum("dh,nqk,nkh->nqd", decode, weights, projected)
    hidden = (torch.einsum("fd,ntd->ntf", w["linear1.weight"], attended) + w["linear1.bias"]).clamp(min=0)
    hidden = (torch.einsum("df,ntf->ntd", w["linear2.weight"], hidden) + w["linear2.bias"]).clamp(min=0)
    logits = torch.einsum("vd,ntd->ntv", w["decoder.weight"], attended + hidden)[:, -1]
    return logits - logits.exp().sum(-1, keepdim=True).log()


def test_the_model_has_the_papers_number_of_parameters():
    assert sum(p.numel() for p in ModularTransformer(115).parameters()) == 89_024


@pytest.mark.parametrize("seed", range(3))
def test_the_model_is_the_papers_transformer(seed):
    torch.manual_seed(seed)
    model = ModularTransformer(115).double()
    tokens = modular_addition(113, 10, 10, seed=seed).test_inputs
    # Two orders of summation of at most 512 products of numbers below 100, in float64.
    torch.testing.assert_close(model(tokens), reference(model, tokens), rtol=0, atol=1e-12)


def test_the_outputs_are_log_probabilities():
    torch.manual_seed(0)
    values = ModularTransformer(115).double()(modular_addition(113, 5, 5).train_inputs)
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(5, dtype=torch.float64))


def test_two_numbers_may_change_places():
    """No positional encoding: the model is symmetric in a and b."""
    torch.manual_seed(0)
    model, tokens = ModularTransformer(115).double(), modular_addition(113, 5, 5).train_inputs
    torch.testing.assert_close(model(tokens), model(tokens[:, [2, 1, 0, 3]]), rtol=0, atol=1e-12)


def test_the_papers_data_set():
    task = modular_addition()
    assert (task.p, task.vocabulary) == (113, 115)
    assert task.train_inputs.shape == (4000, 4)
    assert task.test_inputs.shape == (2000, 4)
    assert task.train_targets.shape == (4000,)
    assert task.test_targets.shape == (2000,)


@settings(deadline=None, max_examples=25)
@given(p=st.integers(2, 20), seed=st.integers(0, 1000), data=st.data())
def test_samples_are_distinct_ordered_pairs_with_their_sum(p, seed, data):
    pairs = p * (p + 1) // 2
    train = data.draw(st.integers(1, pairs - 1))
    test = data.draw(st.integers(1, pairs - train))
    task = modular_addition(p, train, test, seed=seed)
    tokens, targets = (
        torch.cat([task.train_inputs, task.test_inputs]), torch.cat([task.train_targets, task.test_targets]),
    )  # fmt: skip
    assert len(task.train_inputs) == train
    assert len(task.test_inputs) == test
    drawn = {(a, b) for a, plus, b, equals in tokens.tolist() if p > a >= b >= 0 and (plus, equals) == (p, p + 1)}
    assert len(drawn) == train + test  # all valid, none twice: train and test are disjoint
    assert targets.tolist() == [(a + b) % p for a, _, b, _ in tokens.tolist()]


def test_the_split_depends_on_the_seed_alone():
    torch.manual_seed(0)
    first = modular_addition(11, 20, 10, seed=3)
    torch.manual_seed(1)
    assert torch.equal(first.train_inputs, modular_addition(11, 20, 10, seed=3).train_inputs)
    assert not torch.equal(first.train_inputs, modular_addition(11, 20, 10, seed=4).train_inputs)


def test_more_samples_than_pairs_are_refused():
    assert len(modular_addition(5, 10, 5).test_inputs) == 5
    with pytest.raises(ValueError, match=r"modulo 5 there are 15 pairs a >= b; 10 train \+ 6 test samples asked for"):
        modular_addition(5, 10, 6)


def test_the_six_layers_of_the_figure_cover_the_model_once():
    parameters = {n: ParameterInfo(p.shape, p.dtype, True) for n, p in ModularTransformer(115).named_parameters()}
    layers, rest = resolve_layers(LAYERS, parameters)
    assert rest is None
    sizes = [sum(parameters[n].shape.numel() for n in layer.masks) for layer in layers]
    assert sizes == [115 * 64, 4 * 16 * 64, 4 * 16 * 64, 64 * 512 + 512, 512 * 64 + 64, 64 * 115]


def test_its_influences_by_layer_equal_the_oracle(tmp_path):
    """A narrow one, in float64; ReLU kinks do not matter, for both use the same nodes."""
    torch.manual_seed(0)
    task = modular_addition(5, 12, 3)
    model, loss = ModularTransformer(task.vocabulary, width=4, heads=2, hidden=5).double(), torch.nn.NLLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=4.0, betas=(0.9, 0.98))
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(task.train_inputs), task.train_targets).backward()
            recorder.batch(task.train_inputs, task.train_targets, ids=torch.arange(12))
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    truth = dense(run, task.test_inputs, 2)
    result = explaind.attribute(run, task.test_inputs, layers=LAYERS, nodes=2, progress=False)
    groups = {
        name: truth.mask(*(n for n in truth.where if n.startswith(pattern[:-1]))) for name, pattern in LAYERS.items()
    }
    expected = truth.expected(("step", "layer", "test", "output"), groups, run.steps)
    for name, value in expected.items():
        assert abs(result[name].values - value).max() <= 1e-11 * max(1.0, abs(value).max()), name
    assert result.layer.values.tolist() == list(LAYERS)
