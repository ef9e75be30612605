"""Compiled models are recorded, opened and explained as the plain ones that they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind

N = 8
BACKENDS = ["eager", "aot_eager"]
PLAIN_NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def compiled_parts(model, backend):
    model[0] = torch.compile(model[0], backend=backend)
    return model


def in_place(model, backend):
    model.compile(backend=backend)
    return model


COMPILED = {
    "whole": lambda model, backend: torch.compile(model, backend=backend),
    "part": compiled_parts,
    "in place": in_place,
}


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 3, generator=generator, dtype=torch.float64), torch.randint(2, (N,), generator=generator)


def train(recorder, model, optimizers, steps=4, first=0):
    inputs, targets = data()
    for s in range(first, first + steps):
        ids = torch.arange(s, s + 5) % N
        for optimizer in optimizers:
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
        recorder.batch(inputs[ids], targets[ids], ids=ids)
        for optimizer in optimizers:
            optimizer.step()


def record(path, called, recorded, *, several=False):
    parameters = list(recorded.parameters())
    optimizers = [torch.optim.AdamW(parameters, lr=0.05)]
    if several:
        optimizers = [
            torch.optim.SGD([p for p in parameters if p.ndim == 2], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=0.05),
        ]
    with explaind.Recorder(path, recorded, optimizers, nn.CrossEntropyLoss()) as recorder:
        train(recorder, called, optimizers)
    return optimizers


@pytest.mark.parametrize(("how", "several"), [("whole", False), ("whole", True), ("part", False), ("in place", False)])
@pytest.mark.parametrize("recorded_as", ["plain", "compiled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_names_are_those_of_the_plain_model(tmp_path, backend, how, recorded_as, several):
    plain = plain_model()
    called = COMPILED[how](plain, backend)
    record(tmp_path / "run", called, called if recorded_as == "compiled" else plain, several=several)
    reference = plain_model()
    record(tmp_path / "reference", reference, reference, several=several)
    expected = explaind.open_run(tmp_path / "reference", model=plain_model())
    for model in (plain, called, plain_model(), torch.compile(plain_model(), backend=backend)):
        run = explaind.open_run(tmp_path / "run", model=model)
        assert run.manifest["model"] == "torch.nn.modules.container.Sequential"
        assert list(run.parameters) == list(expected.parameters) == PLAIN_NAMES
        assert sorted(run.buffers()) == sorted(expected.buffers())
        assert [n for n, _ in run.model.named_modules()] == [n for n, _ in reference.named_modules()]
    for split, other in zip(explaind.decompose(run), explaind.decompose(expected), strict=True):
        assert split.drift == 0
        assert split.error <= 1e-12 + split.rounding
        for name, value in split.theta.items():
            torch.testing.assert_close(value, other.theta[name], rtol=1e-12, atol=1e-12)
    result = explaind.attribute(run, data()[0], nodes=2, progress=False)
    assert result.layer.values.tolist() == ["0", "2", "3"]
    assert explaind.closure_error(result) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_shares_of_samples_of_a_compiled_model(tmp_path, backend):
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    called = torch.compile(plain, backend=backend)
    record(tmp_path / "run", called, called)
    run = explaind.open_run(tmp_path / "run", model=called)
    whole = explaind.attribute(run, data()[0], keep=("step",), progress=False)
    split = explaind.attribute(run, data()[0], keep=("step", "train"), progress=False)
    assert float(abs(split.kernel.sum("train") - whole.kernel).max()) < 1e-10
    activation = explaind.attribute(run, data()[0], output=explaind.Activation("1"), progress=False)
    assert explaind.closure_error(activation) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("several", [False, True])
def test_a_compiled_model_is_restored_and_resumed(tmp_path, backend, several):
    called = torch.compile(plain_model(), backend=backend)
    record(tmp_path / "run", called, called, several=several)
    again = torch.compile(plain_model(), backend=backend)
    optimizers = [torch.optim.AdamW(again.parameters(), lr=0.05)]
    if several:
        optimizers = [
            torch.optim.SGD([p for p in again.parameters() if p.ndim == 2], lr=0.1, momentum=0.9),
            torch.optim.AdamW([p for p in again.parameters() if p.ndim < 2], lr=0.05),
        ]
    run = explaind.open_run(tmp_path / "run", model=again)
    run.restore(again, optimizers if several else optimizers[0])
    for one, other in zip(again.parameters(), called.parameters(), strict=True):
        assert torch.equal(one, other)
    loss = nn.CrossEntropyLoss()
    with explaind.Recorder(tmp_path / "run", again, optimizers, loss, resume=True) as recorder:
        train(recorder, again, optimizers, steps=2, first=4)
    resumed = explaind.open_run(tmp_path / "run", model=plain_model())
    assert len(resumed.steps) == 6
    assert max(split.drift for split in explaind.decompose(resumed)) == 0


@pytest.mark.parametrize("mode", ["parameters", "snapshots"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_is_computed_again(tmp_path, backend, mode):
    called = torch.compile(plain_model(), backend=backend)
    optimizer = torch.optim.AdamW(called.parameters(), lr=0.05)
    loss = nn.CrossEntropyLoss()
    with explaind.Recorder(tmp_path / "run", called, optimizer, loss, mode=mode, snapshot_every=2) as recorder:
        train(recorder, called, [optimizer])
    run = explaind.open_run(tmp_path / "run", model=called)
    for split in explaind.decompose(run):
        assert split.drift == 0
        assert split.error <= 1e-12 + split.rounding
