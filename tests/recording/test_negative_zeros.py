"""Gradients that were set to zero, and not to None, have no negative zeros; computed again from nothing they may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from support.mode_loops import MODES


class Scale(nn.Module):
    """Elementwise: the gradient of an entry is a product, and no sum that begins at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))

    def forward(self, x):
        return self.weight * x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("none", [True, False])
def test_a_zero_of_either_sign_is_the_same_gradient(tmp_path, mode, none):
    inputs, targets, loss = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 4.0]]), nn.MSELoss()
    model, fed = Scale(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, mode=mode, snapshot_every=2) as recorder:
        for _ in range(4):
            optimizer.zero_grad(set_to_none=none)
            loss(model(inputs), targets).backward()
            recorder.batch(inputs, targets, ids=[0])
            fed.append(model.weight.grad.clone())
            optimizer.step()
    assert [bool(torch.signbit(g[0, 0])) for g in fed] == [True, *[none] * 3]
    run = explaind.open_run(tmp_path / "run", model=Scale(), loss=loss)
    for s, gradient in enumerate(fed, 1):
        assert torch.equal(run.gradients(s)["weight"], gradient)
