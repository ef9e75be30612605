"""Checkpoints of a small network at no small distance, and what attribute_checkpoints makes of them."""

from __future__ import annotations

from functools import lru_cache

import safetensors.torch
import torch
import xarray as xr
from torch import Tensor, nn

from explaind_core.checkpoints.attribute_checkpoints import attribute_checkpoints
from explaind_core.results import summed

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def architecture() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@lru_cache
def states(count=4) -> list[dict[str, Tensor]]:
    """Some points of the space of parameters, at no small distance."""
    torch.manual_seed(0)
    return [{n: t.clone() for n, t in architecture().state_dict().items()} for _ in range(count)]


def closure_error(result: xr.Dataset) -> float:
    return float(abs(summed(result, ("change", "residual", "omitted")) - result.final).max())


def ask(points=None, *, model=None, inputs=INPUTS, **question) -> xr.Dataset:
    points = states() if points is None else points
    return attribute_checkpoints(points, model or architecture(), inputs, **({"progress": False} | question))


def save(folder, points=None, name="step-{}.safetensors", numbers=(2, 9, 10, 100)):
    for number, state in zip(numbers, points or states(), strict=True):
        safetensors.torch.save_file(state, folder / name.format(number))
    return folder
