"""A loop whose steps are written behind its back."""

from __future__ import annotations

import torch
from torch import nn

import explaind_core as explaind

WAITING = 2


X, Y = torch.randn(4, 3), torch.randn(4, 2)


class Loop:
    def __init__(self, path):
        self.path, self.model = path, nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.recorder = explaind.Recorder(
            path, self.model, self.optimizer, nn.MSELoss(), snapshot_every=2, write_behind=WAITING
        )

    def step(self):
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(X), Y).backward()
        self.recorder.batch(X, Y, ids=range(4))
        self.optimizer.step()
