"""The global random number generators that a model may draw from: where they stand, put back, and fixed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind_core.training_step import random_state

__all__ = ["GlobalRandomState", "undisturbed"]


@dataclass(frozen=True, eq=False)  # it holds tensors
class GlobalRandomState:
    """Where the generators of torch, numpy and python stand.

    Attributes:
        device: of the model.
        tensors: device -> state of torch's generator.
        numpy: of ``numpy.random``.
        python: of ``random``.

    Example:
        >>> before = GlobalRandomState.now(torch.device("cpu"))
        >>> _ = torch.rand(1), np.random.rand()
        >>> before.moved()
        ['torch (cpu)', 'numpy.random']
        >>> before.restore()
        >>> before.moved()
        []
    """

    device: torch.device
    tensors: dict[str, Tensor]
    numpy: tuple[Any, ...]
    python: tuple[Any, ...]

    @classmethod
    def now(cls, device: torch.device) -> GlobalRandomState:
        """Where they stand.

        Args:
            device: of the model.
        """
        devices = {"cpu", str(device)}
        found: Any = np.random.get_state()
        return cls(device, {name: random_state(name) for name in sorted(devices)}, found, random.getstate())

    def moved(self) -> list[str]:
        """Which of them stand elsewhere now, in words."""
        now = GlobalRandomState.now(self.device)
        found = [f"torch ({name})" for name, state in self.tensors.items() if not torch.equal(state, now.tensors[name])]
        if any(not np.array_equal(a, b) for a, b in zip(self.numpy, now.numpy, strict=True)):
            found.append("numpy.random")
        return [*found, *(["random"] if self.python != now.python else [])]

    def restore(self) -> None:
        """Put them back."""
        for name, state in self.tensors.items():
            device = torch.device(name)
            if device.type == "cpu":
                torch.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


@contextmanager
def undisturbed(device: torch.device, seed: int | None = None) -> Iterator[GlobalRandomState]:
    """Whatever is drawn inside, the generators stand afterwards where they stood.

    Args:
        device: of the model.
        seed: what they all are set to inside, nothing by default.

    Yields:
        Where they stood.

    Example:
        >>> with undisturbed(torch.device("cpu"), seed=3):
        ...     first = torch.rand(())
        >>> with undisturbed(torch.device("cpu"), seed=3):
        ...     torch.equal(first, torch.rand(()))
        True
    """
    before = GlobalRandomState.now(device)
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                with torch.device(device):
                    torch.get_device_module(device).manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
        yield before
    finally:
        before.restore()
