"""A smooth network whose steps are so large that one node is not enough."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

import explaind_core as explaind
from explaind_core.run.run import Run
from explaind_core.testing import record_example

INPUTS = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def smooth() -> Run:
    """A tanh network, and steps so large that one node is not enough."""
    return record_example(4, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=1.0))


def residuals(run: Run, inputs: torch.Tensor = INPUTS, **question) -> np.ndarray:
    result = explaind.attribute(run, inputs, progress=False, **question)
    return abs(result.residual).max(["test", "output"]).values
