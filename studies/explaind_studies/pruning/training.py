"""The networks that are pruned: trained as the paper's (appendix C.1), and recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import explaind_core as explaind
from explaind_core.progress import track
from explaind_studies.digits import batches
from explaind_studies.pruning.setting import Setting, Task
from explaind_studies.resnet import ResNet9

__all__ = ["accuracy", "network", "outputs", "rate", "record", "sgd"]


def network(setting: Setting, task: Task, seed: int) -> ResNet9:
    """The untrained network of the run with that seed."""
    assert setting.width is not None
    torch.manual_seed(seed)
    return ResNet9(setting.width, task.classes, channels=task.channels)


def rate(step: int, setting: Setting, per_epoch: int) -> float:
    """The learning rate of a step (0, 1, ...) as a fraction of the peak.

    Example:
        >>> setting = Setting(epochs=12, peak_epoch=5)
        >>> [rate(epoch * 40, setting, 40) for epoch in (0, 1, 5, 12)]
        [0.0, 0.2, 1.0, 0.0]
    """
    peak = min(setting.peak_epoch, setting.epochs)
    return float(np.interp(step / per_epoch, [0, peak, setting.epochs], [0, 1, 0]))


def sgd(model: nn.Module, setting: Setting, rate: float) -> torch.optim.SGD:
    """The optimizer of training and of retraining."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=setting.momentum, weight_decay=setting.weight_decay)


def outputs(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Log-probabilities, ``[n, classes]``."""
    with torch.no_grad():
        return torch.cat([model(piece) for piece in torch.split(images, 250)])


def accuracy(values: Tensor, targets: Tensor) -> float:
    """Fraction of samples whose argmax is right."""
    return float((values.argmax(1) == targets).double().mean())


def record(task: Task, setting: Setting, path: Path, seed: int, *, progress: bool = True) -> explaind.Run:
    """Train the network of that seed and record it at ``path``; a recording that is finished is taken as it is.

    Metrics: ``loss`` of every batch before its step.
    """
    assert setting.batch is not None
    model = network(setting, task, seed)
    if not (path / "closed.json").exists():
        per_epoch = -(-len(task.train_images) // setting.batch)
        optimizer, loss = sgd(model, setting, setting.peak), nn.NLLLoss()
        scheduler = LambdaLR(optimizer, lambda step: rate(step, setting, per_epoch))
        order = batches(len(task.train_images), setting.batch, setting.epochs, torch.Generator().manual_seed(seed))
        with explaind.Recorder(
            path, model, optimizer, loss, train_size=len(task.train_images), overwrite=True
        ) as recorder:
            for ids in track(order, setting.epochs * per_epoch, f"training, seed {seed}", enabled=progress):
                optimizer.zero_grad()
                value = loss(model(task.train_images[ids]), task.train_targets[ids])
                value.backward()
                recorder.batch(task.train_images[ids], task.train_targets[ids], ids=ids)
                optimizer.step()
                scheduler.step()
                recorder.log(loss=value.item())
    return explaind.open_run(path, model=model)
