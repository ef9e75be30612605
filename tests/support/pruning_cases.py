"""Small networks and images for the tests of the pruning study."""

from __future__ import annotations

import torch
from torch import nn

from explaind_studies.pruning import Setting
from explaind_studies.pruning.setting import Task
from explaind_studies.resnet import ResNet9

TINY = Setting(width=2, batch=8, epochs=3, peak_epoch=1, peak=0.05, levels=(0.5, 0.8, 0.9), retrain_epochs=1)


def small_task(train: int = 20, *, channels: int = 1, classes: int = 3) -> Task:
    """Random images in float64, with labels that follow no rule."""
    generator = torch.Generator().manual_seed(3)

    def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = torch.randn(n, channels, 12, 12, generator=generator, dtype=torch.float64)
        return pixels, torch.arange(n) % classes

    return Task(*drawn(train), *drawn(5), *drawn(30), classes)


def small_model(width: int = 3, **options) -> ResNet9:
    torch.manual_seed(5)
    model = ResNet9(width, **({"classes": 3, "channels": 1} | options)).double()
    for parameter in model.parameters():  # biases too, and logits that differ
        nn.init.normal_(parameter, std=0.3)
    return model


def without_head(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if n != "head.weight")
