"""Every share of a sample against one output entry and one sample at a time, in a plain copy of the module."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from explaind_core.derivatives.sample_gradients import SampleGradients
from explaind_core.run.run import Batch, MicroBatch


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n, length, vocabulary, seed=0):
    return torch.randint(vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ models
class Result(OrderedDict):
    """An output with attributes, as transformers have them."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Named(nn.Module):
    """Keyword inputs, one of them the same for all samples; outputs that the loss does not use, or twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.LayerNorm((2, 2)), nn.Linear(4, 3)

    def forward(self, x, scale):
        hidden = self.norm(self.first(x * scale).view(-1, 2, 2)).flatten(1)
        logits = self.second(torch.tanh(hidden))
        return Result(logits=logits, index=logits.argmax(1), pair=(x, [logits.softmax(1), logits.sum()]))


class Tied(nn.Module):
    """An embedding whose table is the read-out as well, and a recurrent layer that vmap cannot run."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(5, 3), nn.LSTM(3, 3, batch_first=True)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(self.lstm(self.embedding(x))[0]).transpose(1, 2)


class Elsewhere(nn.Module):
    """Tensors that are used outside of their layers, and one that is not used at all."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.unused = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 3), nn.Linear(2, 2)
        self.bias = nn.Parameter(seeded(6))

    def forward(self, x):
        hidden = self.layer(torch.relu_(self.layer(self.embedding(x)))).mean(1)
        return F.linear(hidden, self.embedding.weight, self.bias)


class TimeFirst(nn.Module):
    """Layers that see the axis of tokens first, as long as the batch is large; and rows of tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.flat, self.last = nn.Linear(2, 3), nn.Linear(3, 3), nn.RMSNorm(3, eps=1e-3)

    def forward(self, x):
        across = self.first(x.transpose(0, 1)).tanh().transpose(0, 1)
        return self.last(self.flat(across.reshape(-1, 3)).view(len(x), -1, 3) * 2)


class Branching(nn.Module):
    """Looks at its inputs to decide: vmap cannot."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(seeded(2))

    def forward(self, x):
        return torch.stack([row * self.weight if float(row.sum()) > 0 else row.exp() * self.weight for row in x])


def classes(n, count=3):
    return torch.arange(n) % count


def mlp(n):
    model = nn.Sequential(nn.Linear(2, 40), nn.LayerNorm(40, bias=False), nn.Tanh(), nn.Linear(40, 3))
    return model, nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5])), seeded(n, 2), classes(n)


def cnn(n):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
        nn.Flatten(2), nn.Conv1d(4, 2, 2, dilation=2), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    return model, nn.MSELoss(), seeded(n, 2, 4, 3), seeded(n, 2, seed=1)


def encoder(n):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    loss = nn.KLDivLoss(reduction="batchmean")
    return layer, lambda o, t: loss(o.log_softmax(-1), t), seeded(n, 3, 4), seeded(n, 3, 4, seed=1).softmax(-1)


def tied(n):
    targets = tokens(n, 4, 5, seed=1)
    targets[:, -1], targets[0, 0] = -100, -100  # padding: the mean is over the other tokens of the batch
    return Tied(), nn.CrossEntropyLoss(), tokens(n, 4, 5), targets


def elsewhere(n):
    return Elsewhere(), nn.CrossEntropyLoss(reduction="none"), tokens(n, 3, 6), classes(n)


def bag(n):
    model = nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 2))
    return model, nn.MSELoss(reduction="sum"), tokens(n, 3, 7), seeded(n, 2, seed=1)


def named(n):
    def loss(o, t):
        return F.cross_entropy(o.logits, t) + (o["pair"][1][0] ** 2).mean()

    return Named(), loss, {"x": seeded(n, 3), "scale": seeded(3, seed=2)[None]}, classes(n)


def time_first(n):
    return TimeFirst(), nn.MSELoss(), seeded(n, 8, 2), seeded(n, 8, 3, seed=1)


def branching(n):
    return Branching(), lambda o, _: o.square().sum(1), seeded(n, 2), None


MODELS = [mlp, cnn, encoder, tied, elsewhere, bag, named, time_first, branching]


# ------------------------------------------------------------------ the oracle
def batch_of(inputs, targets, sizes=None, weights=None, ids=None):
    n = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
    ids = torch.arange(n) if ids is None else ids
    edges = list(itertools.accumulate(sizes or [n], initial=0))

    def cut(tree, rows):
        if isinstance(tree, dict):
            return {k: cut(v, rows) for k, v in tree.items()}
        return tree[rows] if tree is not None and len(tree) == n and n > 1 else tree

    rows = [slice(a, b) for a, b in itertools.pairwise(edges)]
    weights = weights or [1.0] * len(rows)
    return Batch(
        tuple(MicroBatch(ids[r], cut(inputs, r), cut(targets, r), w) for r, w in zip(rows, weights, strict=True))
    )


def call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def leaves(output):
    return [output] if isinstance(output, torch.Tensor) else [output.logits, output["pair"][1][0]]


def micro_oracle(model, loss, micro):
    """``[n, *shape]`` by parameter, one sample and one output entry at a time."""
    model = model.eval().requires_grad_(True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    output = call(model, micro.inputs)
    value = loss(output, micro.targets)
    value = micro.weight * (value if value.ndim == 0 else value.mean())
    # Of the outputs that are passed on, the second is computed from the first: what it says is in the first's.
    cotangent = torch.autograd.grad(value, leaves(output)[0])[0]
    shares = []
    for k in range(len(micro.ids)):
        alone = micro.inputs
        alone = (
            {n: t[k : k + 1] if n == "x" else t for n, t in alone.items()}
            if isinstance(alone, dict)
            else alone[k : k + 1]
        )
        entries = leaves(call(model, alone))[0].flatten()
        share = [torch.zeros_like(p) for p in parameters]
        for entry, c in zip(entries, cotangent[k].flatten(), strict=True):
            if c != 0:
                found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
                share = [s + c * g if g is not None else s for s, g in zip(share, found, strict=True)]
        shares.append(share)
    return {n: torch.stack(values) for n, values in zip(names, zip(*shares, strict=True), strict=True)}


def oracle(model, loss, batch):
    found = [micro_oracle(model, loss, micro) for micro in batch.micro]
    return {n: torch.cat([f[n] for f in found]) for n in found[0]}


def build(case, n):
    torch.manual_seed(7)
    model, loss, inputs, targets = case(n)
    model = model.double()
    return model, loss.double() if isinstance(loss, nn.Module) else loss, inputs, targets


def samples(model, loss, batch, names=None, *, theta=None, **options):
    theta = theta or {n: p.detach().clone() for n, p in model.named_parameters()}
    model.requires_grad_(False)
    buffers = dict(model.named_buffers())
    return SampleGradients(model, loss, batch, theta, buffers, names or list(theta), **options)


def close(found, expected, size, where):
    error = (found - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= 1e-12 * size, f"{where}: {error:.3g} of {size:.3g}"


# ------------------------------------------------------------------ the shares
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.__name__)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_shares(case, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=2), label="micro-batches")
    if case is time_first:
        sizes = [8]
    weights = data.draw(st.lists(st.sampled_from([1.0, 0.25, -3.0]), min_size=len(sizes), max_size=len(sizes)))
    n, R = sum(sizes), data.draw(st.integers(1, 6), label="R")
    model, loss, inputs, targets = build(case, n)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    batch = batch_of(inputs, targets, sizes, weights, ids)
    expected = oracle(model, loss, batch)
    names = data.draw(st.lists(st.sampled_from(list(expected)), min_size=1, unique=True), label="names")
    size = sum(g.abs().sum().item() for g in expected.values())
    model.requires_grad_(False)
    options = {
        "chunk": data.draw(st.integers(1, n + 1), label="chunk"),
        "memory": data.draw(st.sampled_from([1, 1000, 10_000, 2**29]), label="memory"),
    }
    gradients = samples(model, loss, batch, names, **options)
    assert torch.equal(gradients.ids, ids)
    total = gradients.total()
    assert list(total) == names
    for name in names:
        close(total[name], expected[name].sum(0), size, f"total of {name}")

    seen = []
    for rows, found in gradients.chunks():
        seen += list(range(n))[rows]
        for name in names:
            close(found[name], expected[name][rows], size, f"{name} of {rows}")
    assert seen == list(range(n))

    G = seeded(data.draw(st.integers(0, 3), label="G"), n, seed=3)
    G[:1] = 0
    for name, found in gradients.weighted(G).items():
        close(found, torch.tensordot(G, expected[name], 1), 5 * size, f"weighted {name}")

    def part(label):
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True), label=label)
        return {name: seeded(R, *expected[name].shape[1:], seed=len(name)) for name in chosen}

    parts = [part("part 0"), part("part 1"), {names[0]: seeded(R, *expected[names[0]].shape[1:])}]
    products = torch.stack(
        [
            sum((d.flatten(1) @ expected[name].flatten(1).T for name, d in p.items()), torch.zeros(R, n).double())
            for p in parts
        ]
    )
    for method in ("materialised", "directional"):
        found = gradients.inner(parts, method=method)
        assert found.dtype == torch.float64
        assert found.shape == (3, R, n)
        close(found, products, 5 * size, method)


def test_normalisers_of_the_batch_are_in_every_share():
    """Written out: the weight of a sample's class, or its number of tokens, over that of the whole batch."""
    for case, counts in ((mlp, torch.tensor([1.0, 3.0, 0.5])[classes(4)]), (tied, torch.tensor([2.0, 3.0, 3.0, 3.0]))):
        model, loss, inputs, targets = build(case, 4)
        for k, (_, found) in enumerate(samples(model, loss, batch_of(inputs, targets), memory=1).chunks()):
            model.requires_grad_(True)
            alone = loss(model(inputs[k : k + 1]), targets[k : k + 1]) * counts[k] / counts.sum()
            expected = torch.autograd.grad(alone, list(model.parameters()))
            for name, value in zip(found, expected, strict=True):
                close(found[name], value, 1.0, name)
            model.requires_grad_(False)
