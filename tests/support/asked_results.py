"""A few questions about one small run, whose results are written in every way that there is."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import xarray as xr

import explaind_core as explaind
from explaind_core.run.run import Run
from explaind_core.testing import record_example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
#: keep, strategy: along steps, along test samples, in one go; labels that are text, numbers, and no axis's own.
QUESTIONS = {
    "steps": {"keep": ("step", "layer", "test"), "strategy": "forward"},
    "windows": {"keep": ("step", "parameter"), "strategy": "reverse", "steps": {"a": [1, 2], "b": [3], "c": [5]}},
    "samples": {"keep": ("train", "test"), "strategy": "adjoint", "train": {"x": [0, 1], "y": [2]}},
    "whole": {"keep": ("layer",)},
}


@lru_cache
def run() -> Run:
    return record_example(5)


def ask(out=None, name="steps", **question) -> xr.Dataset:
    return explaind.attribute(run(), INPUTS, out=out, **{"nodes": 2, "progress": False, **QUESTIONS[name], **question})


@lru_cache
def finished(name: str) -> Path:
    path = Path(_FOLDER.name) / f"{name}.zarr"
    ask(path, name)
    return path


_FOLDER = tempfile.TemporaryDirectory(prefix="explaind-results-")


def files(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
