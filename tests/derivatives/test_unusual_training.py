"""Samples' gradients of models that torch.func refuses, against backward passes of single loss terms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import explaind_core as explaind
from explaind_core.errors import RecordingError
from support.unusual_models import MODELS, N

LR = 0.2


def call(model, inputs):
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def of_terms(outputs):
    return outputs.flatten(1).square().mean(1) + outputs.flatten(1).sum(1)


def mean_of_terms(outputs, _targets):
    return of_terms(outputs).mean()


def rows(inputs, count):
    return tuple(t[:count] for t in inputs) if isinstance(inputs, tuple) else inputs[:count]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("strategy", ["adjoint", "features"])
@pytest.mark.parametrize("name", MODELS)
def test_shares_are_those_of_single_terms(tmp_path, name, strategy):
    make, inputs = MODELS[name]
    torch.manual_seed(3)
    model = make().double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=LR)
    shares = []
    for k in range(N):
        model.zero_grad()
        (of_terms(call(model, inputs))[k] / N).backward()
        shares.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
    model.zero_grad()
    with explaind.Recorder(tmp_path / "run", model, optimizer, mean_of_terms) as recorder:
        mean_of_terms(call(model, inputs), None).backward()
        recorder.batch(inputs, None, ids=range(N))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model, loss=mean_of_terms)
    result = explaind.attribute(
        run, rows(inputs, 2), keep=("train", "test"), nodes="left", strategy=strategy, progress=False,
        output=lambda f, x: f(x).flatten(1),
    )  # fmt: skip
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
    model.eval()
    expected = torch.zeros(N, 2, dtype=torch.float64)
    for x in range(2):
        model.zero_grad()
        call(model, inputs)[x].sum().backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for k, share in enumerate(shares):
            expected[k, x] = -LR * sum(float((a * b).sum()) for a, b in zip(gradients, share, strict=True))
    assert float(abs(torch.from_numpy(result.kernel.values) - expected).max()) <= 1e-10 * float(expected.abs().max())


class Dropping(nn.Module):
    """Dropout inside a part that is computed again."""

    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.drop, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 3), nn.Dropout(0.3), reentrant

    def forward(self, x):
        h = self.a(x)
        return self.b(checkpoint(lambda z: self.drop(z).tanh(), h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_that_is_drawn_again(tmp_path, reentrant, mode):
    torch.manual_seed(0)
    model = Dropping(reentrant).double()
    x, y, loss = torch.randn(6, 4).double(), torch.randint(3, (6,)), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, mode=mode) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            recorder.batch(x, y, ids=range(6))
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    ask = {"nodes": 6, "progress": False}
    split = explaind.attribute(run, x[:2], keep=("train", "test"), **ask)
    summed = explaind.attribute(run, x[:2], keep=("test",), **ask)
    assert float(abs(split.kernel.sum("train") - summed.kernel).max()) <= 1e-10 * float(abs(summed.kernel).max())
    assert ("sample_gradients" in split.attrs) == reentrant
    assert explaind.closure_error(split) < 1e-12


class Gone(nn.Module):
    """A model that cannot be gone back through any more when questions are asked."""

    broken = False

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        out = self.a(x)
        if Gone.broken and torch.is_grad_enabled() and out.requires_grad:
            raise TypeError("no way through here")
        return out


def test_what_no_way_can_do_is_named(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x, y = Gone(), torch.randn(6, 4), torch.randint(3, (6,))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(x), y).backward()
        recorder.batch(x, y, ids=range(6))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    monkeypatch.setattr(Gone, "broken", True)
    from explaind_core.derivatives import SampleGradients

    with pytest.raises(RecordingError, match="the gradients of samples cannot be taken") as refused:
        SampleGradients(
            run.model_in(True), loss, run.batch(1), run.theta(0), run.buffers(0), ["a.weight", "a.bias"]
        ).total()
    assert "no way through here" in str(refused.value)
    assert "Gone" in str(refused.value)
