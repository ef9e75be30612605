"""Losses with weights of their own: refused at once, with a remedy that works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from support.one_batch_loops import A, Y, made_by, network, one_step


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
