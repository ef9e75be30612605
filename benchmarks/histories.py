"""Histories drawn by hypothesis, each under faults of files and of storage elsewhere, and what they cost."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.history_machine import Histories

KINDS = {"lost": "lost beyond the promise", "wrong": "wrong", "raw": "raw errors", "hang": "hangs"}


def histories(count: int, first: int = 0, steps: int = 20) -> bool:
    """Drive that many; whether nothing was lost, wrong, unclear or late. The counts are printed."""

    class Counted(Histories):
        found, driven, injected, calls = [], 0, Counter(), Counter()

    started = time.perf_counter()
    given = settings(
        deadline=None, max_examples=count, stateful_step_count=steps, phases=[Phase.generate], database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(seed(first)(Counted), settings=given)
    print(f"histories of up to {steps} calls under faults, seed {first}")
    print(f"  {'histories driven':<40} {Counted.driven:>6}")
    for name, number in sorted(Counted.injected.items()):
        print(f"  {'fault, ' + name:<40} {number:>6}")
    found = Counter(violation.kind for violation in Counted.found)
    for kind, words in KINDS.items():
        print(f"  {words:<40} {found[kind]:>6}")
    print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    for violation in Counted.found[:20]:
        print(violation)
    return not Counted.found
