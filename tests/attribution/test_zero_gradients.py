"""Gradients that are zero but for rounding, divided by their size: kernel and `unattributed` together are whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0.5).long()


class KeyBias(nn.Module):
    """Attention whose keys have a bias, which softmax cancels."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(2, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x.reshape(-1, 3, 2)
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.out((weights @ self.q(x)).mean(1))


class Shifted(nn.Module):
    """A common bias of all logits, which the loss cancels."""

    def __init__(self):
        super().__init__()
        self.a, self.shift = nn.Linear(6, 3), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.a(x) + self.shift


#: name -> (the model, the prefix of the layer whose gradient is zero)
MODELS = {
    "bias before BatchNorm": (
        lambda: nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), "0"
    ),
    "bias before InstanceNorm": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        ), "1",
    ),
    "key bias": (KeyBias, "k"),
    "a shift of all logits": (Shifted, "shift"),
}  # fmt: skip
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}
#: Kept axes, and by which strategy.
QUESTIONS = [
    (("layer", "train", "test"), "adjoint"), (("layer", "train", "test"), "features"),
    (("step", "layer", "train", "test"), "features"), (("layer", "gradient_step", "train", "test"), "adjoint"),
    (("parameter", "train", "test"), "adjoint"), (("layer", "train", "test", "output"), "forward"),
]  # fmt: skip


def trained(path, name, optimizer, dtype):
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype)
    made, loss, x = OPTIMIZERS[optimizer](model.parameters()), nn.CrossEntropyLoss(), X.to(dtype)
    with explaind.Recorder(path, model, made, loss) as recorder:
        for s in range(12):
            ids = (torch.arange(12) * 5 + s * 7) % 48
            made.zero_grad()
            loss(model(x[ids]), Y[ids]).backward()
            recorder.batch(x[ids], Y[ids], ids=ids)
            made.step()
    return explaind.open_run(path, model=model), x[:3]


def whole(result):
    """Kernel and what no sample explains, if that is more than rounding, over layer and test."""
    kept = ("layer", "test")
    return sum(
        result[n].sum([d for d in result[n].dims if d not in kept]) for n in ("kernel", "unattributed") if n in result
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_kernel_and_unattributed_are_the_kernel_with_train_summed(tmp_path, name, optimizer, dtype):
    run, tests = trained(tmp_path / "run", name, optimizer, dtype)
    ask = {"nodes": 2, "progress": False}
    summed = explaind.attribute(run, tests, keep=("layer", "test"), **ask)
    split = explaind.attribute(run, tests, keep=("layer", "train", "test"), **ask)
    scale, bound = float(abs(summed.kernel).max()), 1e-10 if dtype == torch.float64 else 1e-5
    assert float(abs(whole(split) - summed.kernel).max()) <= bound * scale
    assert float(abs(split.residual - summed.residual).max()) <= bound * scale
    assert ("unattributed" in split) == ("unattributed_largest" in split.attrs)
    if "unattributed" in split:
        assert split.attrs["unattributed_largest"] == float(abs(split.unattributed).max())


@pytest.mark.parametrize(("keep", "strategy"), QUESTIONS)
def test_every_strategy_carries_it(tmp_path, keep, strategy):
    run, tests = trained(tmp_path / "run", "bias before BatchNorm", "Adam", torch.float32)
    ask = {"nodes": 2, "progress": False, "layers": ["0"] if "parameter" in keep else None}
    summed = explaind.attribute(run, tests, keep=("layer", "test"), **ask)
    split = explaind.attribute(run, tests, keep=keep, strategy=strategy, **ask)
    found, expected = whole(split), summed.kernel if "parameter" not in keep else summed.kernel.sum("layer")
    scale = float(abs(summed.kernel).max())
    assert float(abs(found - expected).max()) <= 2e-6 * scale
    assert explaind.closure_error(split) <= 1e-6 * scale
    # Without the term, the layer would be off.
    layer = split.unattributed if "layer" not in split.dims else split.unattributed.sel(layer="0")
    assert float(abs(layer).max()) > 1e-3 * scale
    assert split.attrs["unattributed_largest"] > 1e-3 * scale


def test_restricted_and_written_it_is_the_same(tmp_path):
    run, tests = trained(tmp_path / "run", "bias before BatchNorm", "Adam", torch.float32)
    ask = {"nodes": 2, "progress": False, "keep": ("layer", "train", "test")}
    every = explaind.attribute(run, tests, **ask)
    some = explaind.attribute(run, tests, train=[0, 5, 7], **ask)
    scale = float(abs(every.kernel).max())
    assert float(abs(some.unattributed - every.unattributed).max()) <= 2e-6 * scale
    stored = explaind.attribute(run, tests, out=tmp_path / "result.zarr", **ask)
    assert stored.attrs["unattributed_largest"] == every.attrs["unattributed_largest"]
    assert float(abs(stored.unattributed - every.unattributed).max()) == 0


@pytest.mark.parametrize("out", [False, True])
def test_rounding_is_no_term(tmp_path, out):
    from explaind_core.testing import record_example

    run = record_example(steps=4)
    ask = {"keep": ("step", "layer", "train", "test"), "progress": False, "nodes": 2}
    result = explaind.attribute(run, torch.ones(2, 4).double(), out=tmp_path / "r.zarr" if out else None, **ask)
    assert "unattributed" not in result
    assert "unattributed_largest" not in result.attrs
    assert explaind.closure_error(result) < 1e-12


@pytest.mark.parametrize(("size", "told"), [(0.9e-11, False), (1.1e-11, True)])
def test_just_inside_and_just_outside(size, told):
    from explaind_core.questions import Question, WindowSum
    from explaind_core.testing import record_example

    run = record_example(steps=2)
    question = Question.ask(run, torch.ones(2, 4).double(), keep=("layer", "train", "test"))
    total = WindowSum(question, 0, 3, question.terms)
    total.terms["kernel"][0, 0, 0, 0] = 1.0
    total.terms["unattributed"][0, 0, 0, 0, 0, 0] = size
    found = total.finish()
    assert (found.findings.unattributed_largest is not None) == told
    assert bool(found.terms["unattributed"].any()) == told


@pytest.mark.parametrize(("size", "told"), [(0.9, False), (1.1, True)])
def test_a_layer_that_cancels_is_measured_by_the_others(size, told):
    from explaind_core.questions import Question, WindowSum
    from explaind_core.testing import record_example

    question = Question.ask(record_example(steps=2), torch.ones(2, 4).double(), keep=("layer", "train", "test"))
    total = WindowSum(question, 0, 3, question.terms)
    total.terms["kernel"][0, 0, 0, 0] = 1.0
    total.terms["kernel"][0, 1, 0, 0] = 1e-18
    total.terms["unattributed"][0, 1, 0, 0, 0, 0] = (
        size * 64 * 2.0**-52 * float(total.terms["kernel"].sum((0, 3), keepdim=True).max())
    )
    assert (total.finish().findings.unattributed_largest is not None) == told
