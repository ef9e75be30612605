"""Loops whose gradient is of several calls of the model, and losses with weights: refused at once; the remedy works."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors

_GENERATOR = torch.Generator().manual_seed(0)
A, P, N = torch.randn(3, 8, 4, generator=_GENERATOR)
Y = torch.randint(3, (8,), generator=_GENERATOR)
IDS = torch.arange(8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def one_step(path: Any, model: nn.Module, loss: Any, backward: Any, inputs: Any, targets: Any = None, **options: Any):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(path, model, optimizer, loss, **options) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            recorder.batch(inputs, targets, ids=IDS)
            optimizer.step()
    return explaind.open_run(path, model=model, loss=loss)


def made_by(message: str, name: str) -> Any:
    """The class that a remedy spells out."""
    code = textwrap.dedent(re.search(rf"( *)class {name}\(.*?\n\n(?=\1\S)", message, re.DOTALL).group(0))
    space = {"torch": torch}
    exec(code, space)
    return space[name]


TRIPLET, COSINE = nn.TripletMarginLoss(), nn.CosineEmbeddingLoss()
#: loss, how the loop calls the model, what it declares.
LOOPS = {
    "triplet": (TRIPLET, lambda model: TRIPLET(model(A), model(P), model(N)), (A, P, N)),
    "siamese": (COSINE, lambda model: COSINE(model(A), model(P), torch.ones(8)), (A, P)),
    "twice the same": (nn.MSELoss(), lambda model: (model(A) - 2 * model(A + 0.1)).square().mean(), A),
    "real and fake": (nn.MSELoss(), lambda model: model(A).mean() - model(P).mean(), A),
    "step by step": (nn.MSELoss(), lambda model: sum(model(x).mean() for x in (A, P, N, A)), A),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_several_calls_for_one_batch_are_refused_at_the_first_step(tmp_path, name, wrapped):
    loss, value, inputs = LOOPS[name]
    model = nn.DataParallel(network()) if wrapped else network()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(errors.RecordingError, match="several calls of the model for one declared batch") as refused:
        one_step(tmp_path / "run", model, loss, lambda model: value(model).backward(), inputs)
    assert "step 1" in str(refused.value)
    assert "ModuleList" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["triplet", "siamese"])
def test_what_the_refusal_says_works(tmp_path, name):
    loss, value, inputs = LOOPS[name]
    with pytest.raises(errors.RecordingError) as refused:
        one_step(tmp_path / "refused", network(), loss, lambda model: value(model).backward(), inputs)
    together = made_by(refused.value.remedy, "Together")(network())
    rest = () if name == "triplet" else (torch.ones(8),)

    def loss_of(outputs: Any, _targets: Any) -> torch.Tensor:
        return loss(*outputs, *(r[: len(outputs[0])] for r in rest))

    run = one_step(tmp_path / "run", together, loss_of, lambda model: loss_of(model(*inputs), None).backward(), inputs)
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        value(plain).backward()
        optimizer.step()
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(run.theta(2)[f"model.{key}"], parameter.detach())
    test = tuple(x[:2] for x in inputs)
    output = lambda call, x: call(x)[0]  # noqa: E731
    assert explaind.verify(run, test, output=output, progress=False).agreement > 0.999
    result = explaind.attribute(run, test, output=output, keep=("step", "train", "test"), nodes=2, progress=False)
    assert result.sizes["train"] == 8
    assert explaind.closure_error(result) < 1e-4
    losses = explaind.attribute(
        run, test, output=explaind.Loss(None, loss_of), keep=("train", "test"), nodes=2, progress=False
    )
    assert explaind.closure_error(losses) < 1e-4


class Counted(nn.Module):
    """A loop's model that is part of what it is called by."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + self.model(2 * x)


def in_parts(model: nn.Module) -> None:
    nn.functional.cross_entropy(torch.cat([model(x) for x in A.split(3)]), Y).backward()


def with_evaluations(model: nn.Module) -> None:
    with torch.no_grad():
        model(P)
    model(P)  # nobody asks for its gradient
    nn.functional.cross_entropy(model(A), Y).backward()
    loss = nn.functional.cross_entropy(model(P), Y)
    torch.autograd.grad(loss, list(model.parameters()))  # to be printed


def after_a_trial(model: nn.Module) -> None:
    nn.functional.cross_entropy(model(P), Y).backward()
    model.zero_grad()
    nn.functional.cross_entropy(model(A), Y).backward()


def checkpointed(model: nn.Module) -> None:
    outputs = torch.utils.checkpoint.checkpoint(model, A, use_reentrant=False)
    nn.functional.cross_entropy(outputs, Y).backward()


def accumulated(model: nn.Module) -> None:
    for x, y in zip(A.split(2), Y.split(2), strict=True):
        (nn.functional.cross_entropy(model(x), y) / 4).backward()


@pytest.mark.parametrize("backward", [in_parts, with_evaluations, after_a_trial, checkpointed, accumulated])
@pytest.mark.parametrize("make", [network, Counted])
def test_other_calls_are_no_matter(tmp_path, backward, make):
    run = one_step(tmp_path / "run", make(), nn.CrossEntropyLoss(), backward, A, Y)
    result = explaind.attribute(run, A[:2], keep=("train", "test"), nodes=2, progress=False)
    assert explaind.closure_error(result) < 1e-4


def test_a_closure_that_is_evaluated_again_calls_again(tmp_path):
    model, loss = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(model(A), Y)
            value.backward()
            return value

        for _ in range(2):
            recorder.batch(A, Y, ids=IDS)
            optimizer.step(closure)
    assert len(explaind.open_run(tmp_path / "run", model=model).steps) > 2


# ------------------------------------------------------------------ losses with weights
class Uncertainty(nn.Module):
    """Two losses, weighted by what is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(2))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = [nn.functional.cross_entropy(outputs, targets), outputs.square().mean()]
        return (torch.stack(losses) * (-self.log_variances).exp() + self.log_variances).sum()


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs / self.temperature, targets)


class Centers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Embedding(3, 3)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets) + (outputs - self.centers(targets)).square().mean()


@pytest.mark.parametrize("kind", [Uncertainty, Temperature, Centers])
def test_a_loss_with_weights_of_its_own_is_refused_and_the_remedy_works(tmp_path, kind):
    torch.manual_seed(0)
    model, loss = network(), kind()
    everything = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(everything, lr=0.1)
    with pytest.raises(errors.RecordingError, match="trains weights of the loss") as refused:
        explaind.Recorder(tmp_path / "refused", model, optimizer, loss)
    with pytest.raises(errors.RecordingError, match=r"no parameter of the model[\s\S]*WithLoss") as unnamed:
        explaind.Recorder(tmp_path / "refused", model, optimizer, lambda o, y: loss(o, y))
    assert "ModuleList" not in str(refused.value) + str(unnamed.value)
    explaind.Recorder(tmp_path / "frozen", model, torch.optim.SGD(model.parameters(), lr=0.1), loss).stop()
    start = [p.detach().clone() for p in everything]
    for _ in range(2):  # the loop as it was
        optimizer.zero_grad()
        loss(model(A), Y).backward()
        optimizer.step()
    expected = [p.detach().clone() for p in everything]
    with torch.no_grad():
        for parameter, value in zip(everything, start, strict=True):
            parameter.copy_(value)

    def mean(losses: torch.Tensor, _targets: Any) -> torch.Tensor:
        return losses.mean()

    trained = made_by(refused.value.remedy, "WithLoss")(model, loss)
    run = one_step(tmp_path / "run", trained, mean, lambda m: mean(m(A, Y), None).backward(), (A, Y))
    for parameter, value in zip(everything, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
    test = (A[:2], Y[:2])
    for output in (None, explaind.Activation("model")):
        result = explaind.attribute(run, test, output=output, keep=("step", "train", "test"), nodes=2, progress=False)
        assert result.sizes["train"] == 8
        assert explaind.closure_error(result) < 1e-3
    assert explaind.verify(run, test, progress=False).agreement > 0.999
