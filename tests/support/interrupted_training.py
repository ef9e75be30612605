"""A training with everything that a run stores, which begins, stops and goes on the same."""

from __future__ import annotations

import torch
from torch import nn

import explaind_core as explaind

STEPS = 5


class Interrupted(Exception):  # noqa: N818 (no error of anybody's)
    """The training does not get to its end."""


class Training:
    """A small training with momentum, running statistics, snapshots and a log; the same whenever it is begun."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.inputs, self.targets = torch.randn(STEPS, 6, 3).double(), torch.randn(STEPS, 6, 2).double()
        self.loss = nn.MSELoss()

    def record(self, path, *, until=STEPS, interrupted=False, **options):
        recorder = explaind.Recorder(path, self.model, self.optimizer, self.loss, snapshot_every=2, **options)
        with recorder:
            for s in range(recorder.steps, until):
                self.optimizer.zero_grad()
                self.loss(self.model(self.inputs[s]), self.targets[s]).backward()
                recorder.batch(self.inputs[s], self.targets[s], ids=range(6))
                self.optimizer.step()
                recorder.log(step_number=s + 1)
            if interrupted:
                raise Interrupted

    def go_on(self, path):
        run = explaind.open_run(path, model=self.model)
        if run.steps:
            run.restore(self.model, self.optimizer)
        self.record(path, resume=True)


def held(path):
    run = explaind.open_run(path)
    theta = [{n: t.tolist() for n, t in run.theta(s).items()} for s in (0, *run.steps)]
    buffers = {n: b.tolist() for n, b in run.buffers().items()}
    logged = run.metrics.get("step_number")
    numbers = [] if logged is None else logged.values.tolist()
    return theta, buffers, [run.batch(s).inputs.tolist() for s in run.steps], numbers
