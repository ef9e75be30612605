"""Loops that are recorded step by step in modes that store less, with a place for what goes wrong; and their runs."""

from __future__ import annotations

import torch
from torch import nn

import explaind_core as explaind
from support.mode_trainings import Training, mlp, record

MODES = ["parameters", "snapshots"]
PLAIN = Training()


class Loop:
    """One step at a time, with a place for what a loop does beside what it declares."""

    def __init__(self, path, mode, model=None, loss=None, **options):
        self.training = Training(model=(lambda: model) if model else mlp)
        self.model = self.training.make()
        self.loss = loss or nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.recorder = explaind.Recorder(path, self.model, self.optimizer, self.loss, mode=mode, **options)
        self.x, self.y = self.training.x, self.training.y

    def step(self, *, more=lambda _: 0.0, x=None, after=lambda _: None, **declared):
        self.optimizer.zero_grad()
        (self.loss(self.model(self.x if x is None else x), self.y) + more(self.model)).backward()
        self.recorder.batch(self.x, self.y, ids=range(12), **declared)
        after(self.model)
        self.optimizer.step()


def noise(model):
    for p in model.parameters():
        p.grad.add_(0.01 * torch.randn_like(p))


def half(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


def recorded(path, mode, training=PLAIN, count=4, k=3):
    record(training, path, count, mode=mode, snapshot_every=k)
    return path


def reading(path, training=PLAIN, **options):
    return explaind.open_run(path, **{"model": training.make(), "loss": training.loss, **options})


def read_all(run):
    for s in run.steps:
        run.theta(s)
        run.gradients(s)
