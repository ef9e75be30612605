"""Samples that are not independent, though their outputs do not show it: every share against its own loss term.

At the start of training many branches are multiplied by zero: their random numbers, or what couples the batch, leave no
trace in what the model returns, but decide its gradients.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import errors

N, LR = 40, 0.5


class LoRA(nn.Module):
    """loralib's start: B = 0, dropout before A."""

    def __init__(self):
        super().__init__()
        self.base, self.drop = nn.Linear(6, 3).requires_grad_(False), nn.Dropout(0.3)
        self.A, self.B = nn.Linear(6, 2, bias=False), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return self.base(x) + self.A(self.drop(x)) @ self.B.T


class ReZero(nn.Module):
    """A residual branch behind a gate that begins at zero."""

    def __init__(self, branch):
        super().__init__()
        self.branch, self.gate, self.head = branch, nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x + self.gate * self.branch(x))


class Centred(nn.Module):
    """Takes the batch's mean away, which no module that torch knows does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        h = self.layer(x)
        return torch.tanh(h - h.mean(0)) if self.training else torch.tanh(h)


class Noise(nn.Module):
    """Random numbers without a module of torch's that draws them."""

    def forward(self, x):
        return x * torch.rand_like(x) if self.training else x


class AdaLNZero(nn.Module):
    """Modulation, scale and gate from a layer that begins at zero."""

    def __init__(self):
        super().__init__()
        self.norm, self.modulate, self.drop = nn.LayerNorm(6), nn.Linear(6, 18), nn.Dropout(0.3)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x):
        shift, scale, gate = self.modulate(x).chunk(3, -1)
        return self.head(x + gate * self.drop(self.layer(self.norm(x) * (1 + scale) + shift)))


class ZeroConvolution(nn.Module):
    """A control branch behind a convolution of zeros."""

    def __init__(self):
        super().__init__()
        self.first, self.drop = nn.Conv1d(1, 2, 3, padding=1), nn.Dropout1d(0.5)
        self.zero, self.head = nn.Conv1d(2, 1, 1), nn.Linear(6, 3)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x):
        return self.head(x + self.zero(self.drop(self.first(x[:, None])))[:, 0])


class Capacity(nn.Module):
    """An expert that takes so many samples of a batch, in their order, and no more."""

    def __init__(self):
        super().__init__()
        self.expert, self.rest = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        taken = torch.arange(len(x)) < 36
        return self.rest(x) + torch.where(taken[:, None], self.expert(x), 0)


class Frequencies(nn.Module):
    """An embedding whose gradient is divided by how often an index stands in the batch."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(4, 5, scale_grad_by_freq=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.table((x[:, :2] > 0).long().sum(1)).tanh())


def last_scale_zero():
    norm = nn.BatchNorm1d(6)
    nn.init.zeros_(norm.weight)
    return ReZero(nn.Sequential(nn.Linear(6, 6), norm))


MODELS = {
    "LoRA": LoRA,
    "ReZero, dropout": lambda: ReZero(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))),
    "ReZero, batch normalisation": lambda: ReZero(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))),
    "ReZero, centred by hand": lambda: ReZero(Centred()),
    "ReZero, noise": lambda: ReZero(nn.Sequential(nn.Linear(6, 6), Noise())),
    "last scale zero": last_scale_zero,
    "adaLN-zero": AdaLNZero,
    "zero convolution": ZeroConvolution,
    "expert capacity": Capacity,
    "scaled by frequency": Frequencies,
}


def trained(tmp_path, make, dtype):
    """One step of SGD; and the kernel at its left end, written out: own loss terms, the whole batch in the pass."""
    torch.manual_seed(3)
    model, x = make().to(dtype), torch.randn(N, 6, dtype=dtype)
    y, tests = torch.randint(3, (N,)), torch.randn(3, 6, dtype=dtype)
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    state = torch.get_rng_state()
    terms = F.cross_entropy(model(x), y, reduction="none") / N
    own = [torch.autograd.grad(t, parameters, retain_graph=True, allow_unused=True) for t in terms]
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.scale_grad_by_freq = False  # a derivative of f is none of the batch's
    features = [torch.autograd.grad(out[0], parameters, retain_graph=True, allow_unused=True) for out in model(tests)]
    expected = np.zeros((len(names), N, len(tests)))
    for p in range(len(names)):
        for k, g in enumerate(own):
            for t, phi in enumerate(features):
                if g[p] is not None and phi[p] is not None:
                    expected[p, k, t] = -LR * float((g[p].double() * phi[p].double()).sum())
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.scale_grad_by_freq = True
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
    torch.set_rng_state(state)
    optimizer, loss = torch.optim.SGD(parameters, lr=LR), nn.CrossEntropyLoss()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(x), y).backward()
        recorder.batch(x, y, ids=torch.arange(N))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    return SimpleNamespace(run=run, tests=tests, expected=expected, names=names)


def asked(case, **question):
    layers = {n: n for n in case.names}
    return explaind.attribute(
        case.run, case.tests, keep=("layer", "train", "test"), layers=layers, nodes="left", buffers="final",
        output=explaind.Outputs(columns=[0]), progress=False, **question,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["adjoint", "features"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_every_share_is_that_of_its_own_loss_term(tmp_path, name, dtype, strategy):
    case = trained(tmp_path, MODELS[name], dtype)
    result = asked(case, strategy=strategy)
    scale = abs(case.expected).max()
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(result.kernel.values, case.expected, rtol=0, atol=tolerance * scale)
    assert "samples_together" in result.attrs


@pytest.mark.parametrize("name", ["LoRA", "expert capacity", "ReZero, centred by hand", "scaled by frequency"])
def test_single_parameters_and_some_samples_are_right_too(tmp_path, name):
    """Where no sum over the whole batch is at hand, to be compared."""
    case = trained(tmp_path, MODELS[name], torch.float64)
    some = [1, 2, 38, 39]
    for keep in (("parameter", "train", "test"), ("train", "test")):
        for strategy in ("adjoint", "features"):
            result = explaind.attribute(
                case.run, case.tests, keep=keep, train=some, nodes="left", buffers="final", strategy=strategy,
                output=explaind.Outputs(columns=[0]), progress=False,
            )  # fmt: skip
            found = result.kernel.sum("parameter") if "parameter" in keep else result.kernel
            np.testing.assert_allclose(found.values, case.expected.sum(0)[some], rtol=0, atol=1e-13)


def test_independent_samples_stay_apart(tmp_path):
    case = trained(tmp_path, lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.float32)
    result = asked(case)
    assert "samples_together" not in result.attrs
    np.testing.assert_allclose(result.kernel.values, case.expected, rtol=0, atol=2e-6 * abs(case.expected).max())


def test_a_gradient_that_the_batch_changes_by_no_linear_map_is_refused(tmp_path):
    """Even with the whole batch in the pass, the shares of the samples do not add up."""

    class Bent(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            if out.requires_grad:
                out.register_hook(lambda g: g / g.norm())
            return out

    torch.manual_seed(0)
    model, x, y = Bent(6, 3).double(), torch.randn(N, 6).double(), torch.randint(3, (N,))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=LR), nn.CrossEntropyLoss()
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(x), y).backward()
        recorder.batch(x, y, ids=torch.arange(N))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    with pytest.raises(errors.RecordingError, match="is not the sum of the gradients of its samples"):
        explaind.attribute(run, x[:2], keep=("train", "test"), strategy="features", nodes=1, progress=False)
