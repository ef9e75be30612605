"""A training that is stepped, interrupted and continued."""

from __future__ import annotations

import torch
from torch import nn

N = 8


class Loop:
    """A training that can be stepped, interrupted and continued; the same data at every step number."""

    def __init__(self, make=lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1), dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
        self.optimizer = make(self.model.parameters())
        self.x, self.y = torch.randn(N, 3, dtype=dtype), torch.randn(N, 2, dtype=dtype)

    def backward(self, s=0):
        ids = torch.arange(s, s + 4) % N
        self.optimizer.zero_grad()
        value = nn.functional.mse_loss(self.model(self.x[ids]), self.y[ids])
        value.backward()
        return ids, value

    def steps(self, recorder, first, last):
        for s in range(first, last + 1):
            ids, _ = self.backward(s)
            recorder.batch(self.x[ids], self.y[ids], ids=ids)
            self.optimizer.step()

    def same_weights(self, other):
        return all(torch.equal(a, b) for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True))
