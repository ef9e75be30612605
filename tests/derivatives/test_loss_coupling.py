"""Losses that couple samples: seen, said, and both readings of a share against autograd over the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core.derivatives.loss_coupling import couples
from explaind_core.errors import QuestionError

N, LR = 6, 0.4


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def in_batch_negatives(z, _y):
    return F.cross_entropy(z @ z.roll(1, 1).T, torch.arange(len(z)), reduction="none")


def centred_logits(z, y):
    return F.cross_entropy(z - 0.7 * z.mean(0), y, reduction="none")


def normalised_advantages(z, y):
    reward = z.gather(1, y[:, None])[:, 0]
    advantage = (reward - reward.mean()) / (reward.std() + 1e-3)
    return -advantage * z.log_softmax(-1).gather(1, y[:, None])[:, 0]


def hardest_negative(z, y):
    distance = (z[:, None] - z[None]).square().sum(-1)
    other = distance.masked_fill(y[:, None] == y[None], torch.inf).min(1).values
    return F.softplus(1 - other)


def ranking(z, y):
    score = z[:, 0]
    return F.softplus((score[None] - score[:, None]) * (y[:, None] > y[None])).mean(1)


def discrepancy(z, _y):
    kernel = torch.exp(-(z[:, None] - z[None]).square().sum(-1))
    return kernel.mean(1) - 2 * kernel[:, ::2].mean(1)


COUPLED = {f.__name__: f for f in (
    in_batch_negatives, centred_logits, normalised_advantages, hardest_negative, ranking, discrepancy
)}  # fmt: skip
UNCOUPLED = {
    "cross entropy": nn.CrossEntropyLoss(),
    "one number per sample": nn.CrossEntropyLoss(reduction="none"),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double(), label_smoothing=0.1),
    "ignored targets": lambda z, y: F.cross_entropy(z, torch.where(y == 2, -100, y)),
    "probabilities": lambda z, y: F.binary_cross_entropy(z.sigmoid()[:, 0], (y > 0).double()),
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()),
}


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", COUPLED)
def test_coupling_is_seen(name, reduced):
    z = seeded(N, 3)
    assert couples(lambda o: COUPLED[name](o[0], LABELS).mean() if reduced else COUPLED[name](o[0], LABELS), [z])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["cross entropy", "one number per sample", "ignored targets", "squares"])
def test_no_coupling_is_seen_where_there_is_none(name, dtype):
    z = seeded(N, 3).to(dtype)
    loss = UNCOUPLED[name] if name != "squares" else nn.MSELoss()
    targets = LABELS if name != "squares" else seeded(N, 3, seed=3).to(dtype)
    assert not couples(lambda o: loss(o[0], targets), [z])


@pytest.mark.parametrize("size", [1e-12, 1e-16])
def test_just_more_than_rounding_is_coupling(size):
    """1000 eps = 2e-13 of the largest derivative."""
    assert couples(lambda o: (o[0] + size * o[0].sum()).square(), [torch.ones(4).double()]) == (size > 2e-13)


def trained(path, loss, *, micro=1, model=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() if model is None else model
    x, optimizer, shares = seeded(N, 4, seed=2), torch.optim.SGD(model.parameters(), lr=LR), []
    before = [p.detach().clone() for p in model.parameters()]
    with explaind.Recorder(path, model, optimizer, loss) as recorder:
        for rows in torch.arange(N).chunk(micro):
            terms = loss(model(x[rows]), LABELS[rows])
            if terms.ndim:
                terms = terms / len(rows) / micro
                parameters = list(model.parameters())
                shares += [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms]
            (terms.sum() if terms.ndim else terms / micro).backward()
            recorder.batch(x[rows], LABELS[rows], ids=rows, weight=1 / micro)
        optimizer.step()
    return explaind.open_run(path, model=model, loss=loss), model, before, shares


def own_terms(model, before, shares, tests):
    """[train, test, output] of the step, at t = 0."""
    parameters = list(model.parameters())
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
    f = model(tests)
    kernel = torch.zeros(len(shares), *f.shape, dtype=torch.float64)
    for x in range(f.shape[0]):
        for j in range(f.shape[1]):
            rows = torch.autograd.grad(f[x, j], parameters, retain_graph=True)
            for k, share in enumerate(shares):
                kernel[k, x, j] = -LR * sum(float((a * b).sum()) for a, b in zip(rows, share, strict=True))
    return kernel


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("strategy", ["adjoint", "features"])
@pytest.mark.parametrize("name", COUPLED)
def test_both_readings(tmp_path, name, strategy, micro):
    run, model, before, shares = trained(tmp_path / "run", COUPLED[name], micro=micro)
    tests = seeded(2, 4, seed=9)
    ask = {"keep": ("train", "test", "output"), "nodes": "left", "strategy": strategy, "progress": False}
    outputs = explaind.attribute(run, tests, **ask)
    terms = explaind.attribute(run, tests, shares="loss_terms", **ask)
    expected = own_terms(model, before, shares, tests)
    scale = float(expected.abs().max())
    assert float(abs(torch.from_numpy(terms.kernel.values) - expected).max()) <= 1e-10 * scale
    assert float(abs(outputs.kernel - terms.kernel).max()) > 1e-3 * scale
    assert float(abs((outputs.kernel - terms.kernel).sum("train")).max()) <= 1e-10 * scale
    assert ("shares" in outputs.attrs, terms.attrs["shares"]) == (False, "loss_terms")
    assert "loss_terms" in outputs.attrs["loss_couples_samples"]
    assert "loss_couples_samples" not in terms.attrs


@pytest.mark.parametrize("name", UNCOUPLED)
def test_one_reading_where_nothing_is_coupled(tmp_path, name):
    run, _, _, shares = trained(tmp_path / "run", UNCOUPLED[name])
    tests = seeded(2, 4, seed=9)
    ask = {"keep": ("train", "test", "output"), "nodes": "left", "progress": False}
    outputs = explaind.attribute(run, tests, **ask)
    assert "loss_couples_samples" not in outputs.attrs
    if not shares:
        with pytest.raises(QuestionError, match="no sample has a loss term of its own"):
            explaind.attribute(run, tests, shares="loss_terms", **ask)
        return
    terms = explaind.attribute(run, tests, shares="loss_terms", **ask)
    assert float(abs(outputs.kernel - terms.kernel).max()) <= 1e-12 * float(abs(terms.kernel).max())


@pytest.mark.parametrize("question", [{"train": [1, 4]}, {"layers": ["0"]}, {"train": {"a": [0, 1], "b": [2, 3]}}])
def test_restricted_loss_terms_are_those_of_all(tmp_path, question):
    run, *_ = trained(tmp_path / "run", in_batch_negatives)
    tests, ask = seeded(2, 4, seed=9), {"nodes": 2, "progress": False, "shares": "loss_terms"}
    every = explaind.attribute(run, tests, keep=("layer", "train", "test"), **ask)
    some = explaind.attribute(run, tests, keep=("layer", "train", "test"), **ask, **question)
    found, expected = some.kernel, every.kernel.sel(layer=some.layer.values)
    if isinstance(question.get("train"), dict):
        groups = question["train"].values()
        pairs = [(found.isel(train=k), expected.sel(train=ids).sum("train")) for k, ids in enumerate(groups)]
    else:
        pairs = [(found, expected.sel(train=some.train.values))]
    for one, other in pairs:
        assert float(abs(one.values - other.values).max()) <= 1e-12 * float(abs(every.kernel).max())


def test_loss_terms_of_a_model_that_couples_samples_too(tmp_path):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    run, model, before, shares = trained(tmp_path / "run", in_batch_negatives, model=network)
    tests, ask = seeded(2, 4, seed=9), {"keep": ("train", "test", "output"), "nodes": "left", "progress": False}
    terms = explaind.attribute(run, tests, shares="loss_terms", **ask)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    expected = own_terms(model.eval(), before, shares, tests)
    assert float(abs(torch.from_numpy(terms.kernel.values) - expected).max()) <= 1e-10 * float(expected.abs().max())
    assert "samples_together" in terms.attrs


def test_no_such_shares(tmp_path):
    run, *_ = trained(tmp_path / "run", in_batch_negatives)
    with pytest.raises(QuestionError, match="there are no such shares"):
        explaind.attribute(run, seeded(2, 4), keep=("train",), shares="inputs")
