"""Timing for the benchmarks: medians of interleaved repetitions, so that a noisy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def interleaved(functions: Mapping[str, Callable[[], object]], *, repeat: int = 15) -> dict[str, float]:
    """Median seconds of each function, called in turn ``repeat`` times after one warm-up each."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}
