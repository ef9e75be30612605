"""What decides about the last bits of a computation, as it stood when a run was recorded and as it stands now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["differences", "environment", "threads"]


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, threads, instruction set and settings, as JSON.

    Example:
        >>> environment(torch.device("cpu"))["torch"] == torch.__version__
        True
    """
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words.

    Example:
        >>> differences({"torch": "2.6", "threads": 2}, {"torch": "2.13", "threads": 2})
        'torch 2.6 then and 2.13 now'
    """
    found = [f"{k} {then.get(k)} then and {now.get(k)} now" for k in now if then.get(k) != now[k]]
    return ", ".join(found) or "none in versions, threads, processor and settings"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads: sums in another order have other last bits.

    Example:
        >>> with threads(1):
        ...     torch.get_num_threads()
        1
    """
    present = torch.get_num_threads()
    if count == present:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(present)
