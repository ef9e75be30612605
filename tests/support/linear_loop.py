"""An ordinary training loop of a linear model."""

from __future__ import annotations

import torch
from torch import nn

import explaind_core as explaind


class Loop:
    """An ordinary training loop of a small model, one step at a time."""

    def __init__(self, path, make=lambda p: torch.optim.SGD(p, lr=0.1), **options):
        torch.manual_seed(0)
        self.model, self.loss = nn.Linear(3, 2), nn.MSELoss()
        self.inputs, self.targets = torch.randn(6, 3), torch.randn(6, 2)
        self.optimizer = make(self.model.parameters())
        self.path = path
        self.recorder = explaind.Recorder(path, self.model, self.optimizer, self.loss, **options)

    def backward(self, factor=1.0):
        self.optimizer.zero_grad()
        (factor * self.loss(self.model(self.inputs), self.targets)).backward()

    def step(self, ids=range(6), factor=1.0):
        self.backward(factor)
        self.recorder.batch(self.inputs, self.targets, ids=ids)
        self.optimizer.step()

    def readable(self):
        return len(explaind.open_run(self.path, model=self.model).steps)
