"""Trainings that are recorded in every mode: models, optimizers, schedules, clipping, accumulation, autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import explaind_core as explaind

N = 12


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 4, (1, 3), padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(20, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.embedding, self.head = nn.Linear(1, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x.unsqueeze(-1))).mean(1))


@dataclass
class Training:
    """One training loop with its options."""

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=0.01)
    loss: Any = field(default_factory=nn.CrossEntropyLoss)
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    pieces: tuple[int, ...] = (4,)
    divide: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    scheduler: Callable[[Any], Any] | None = None
    closure: bool = False
    zero_to_none: bool = True
    joins: int | None = None
    scaled: bool = False
    seed: int = 0

    @property
    def x(self):
        return torch.randn(N, 5, generator=torch.Generator().manual_seed(1), dtype=self.dtype)

    @property
    def y(self):
        return torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))

    def make(self):
        torch.manual_seed(self.seed)
        return self.model().to(self.dtype)


def steps(training, recorder, model, optimizer, numbers):
    """The steps of these numbers."""
    x, y, loss = training.x, training.y, training.loss
    schedule = training.scheduler(optimizer) if training.scheduler else None
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=training.scaled)
    for s in numbers:
        torch.manual_seed(100 + s)
        if s == training.joins:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
        ids = torch.randint(N, (sum(training.pieces),))

        def backward(ids=ids):
            optimizer.zero_grad(set_to_none=training.zero_to_none)
            for part in ids.split(training.pieces):
                weight = 1 / len(training.pieces)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=training.autocast):
                    value = loss(model(x[part]), y[part])
                    value = value.mean() if value.ndim else value
                    if len(training.pieces) > 1:
                        value = value / len(training.pieces) if training.divide else value * weight
                scaler.scale(value).backward()
                scale = scaler.get_scale()
                recorder.batch(x[part], y[part], ids=part, weight=weight, scale=scale)
            return value

        if training.closure:
            optimizer.step(backward)
        else:
            backward()
            scaler.unscale_(optimizer) if training.scaled else None
            if training.clip_norm is not None:
                recorder.clip_grad_norm_(training.clip_norm)
            if training.clip_value is not None:
                recorder.clip_grad_value_(training.clip_value)
            scaler.step(optimizer)
            scaler.update()
        if schedule is not None:
            schedule.step()


def record(training, path, count, *, start=None, **options):
    """Record ``count`` steps and open the run."""
    model = training.make()
    if training.joins is not None:
        model[0].requires_grad_(False)
    optimizer = training.optimizer([p for p in model.parameters() if p.requires_grad])
    with explaind.Recorder(path, model, optimizer, training.loss, **options) as recorder:
        steps(training, recorder, model, optimizer, range(1, count + 1))
    return explaind.open_run(path, model=training.make(), loss=training.loss)


def _muon(parameters):
    parameters = list(parameters)
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=0.01)


def _one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)


def _halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


SGD = Training(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))
TRAININGS = {
    "mlp AdamW one-cycle": Training(scheduler=_one_cycle),
    "mlp float64 RMSprop": Training(
        dtype=torch.float64, optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True)
    ),
    "mlp Muon": Training(optimizer=_muon),
    "cnn SGD ragged": replace(SGD, model=cnn, pieces=(4, 3, 2), scheduler=_halved),
    "cnn divided": replace(SGD, model=cnn, pieces=(3, 3, 2), divide=True, zero_to_none=False),
    "transformer dropout clipped": Training(model=Transformer, clip_norm=0.2, pieces=(4, 4)),
    "transformer autocast": Training(model=Transformer, autocast=True, clip_value=0.01),
    "per-sample loss": Training(loss=nn.CrossEntropyLoss(reduction="none"), clip_norm=0.5, clip_value=0.1),
    "closure": replace(SGD, closure=True, model=Transformer),
    "joining group": replace(SGD, joins=5),
    "scaled": Training(autocast=True, scaled=True, clip_norm=0.3),
    "fused scaled": Training(scaled=True, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, fused=True)),
}
