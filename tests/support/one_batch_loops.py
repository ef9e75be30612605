"""Loops over one batch of eight samples, and the modules that a refusal's remedy spells out."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import torch
from torch import nn

import explaind_core as explaind

_GENERATOR = torch.Generator().manual_seed(0)
A, P, N = torch.randn(3, 8, 4, generator=_GENERATOR)
Y = torch.randint(3, (8,), generator=_GENERATOR)
IDS = torch.arange(8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def one_step(path: Any, model: nn.Module, loss: Any, backward: Any, inputs: Any, targets: Any = None, **options: Any):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(path, model, optimizer, loss, **options) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            recorder.batch(inputs, targets, ids=IDS)
            optimizer.step()
    return explaind.open_run(path, model=model, loss=loss)


def made_by(message: str, name: str) -> Any:
    """The class that a remedy spells out."""
    code = textwrap.dedent(re.search(rf"( *)class {name}\(.*?\n\n(?=\1\S)", message, re.DOTALL).group(0))
    space = {"torch": torch}
    exec(code, space)
    return space[name]
