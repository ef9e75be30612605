"""One step of a run, on which a strategy times the pieces of its work."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from explaind_core.decomposition import Decomposer, StepDecomposition, term_names
from explaind_core.derivatives import FunctionAtStep
from explaind_core.questions import Places, Question
from explaind_core.run import Run

__all__ = ["PROBED", "Estimate", "Probe", "first_needed", "peak_memory", "replayed", "timed"]

#: Test samples that a backward pass is timed with.
PROBED = 64

#: A piece of work that takes longer than this is not timed again.
_PROBE_SECONDS = 1.0


class Estimate(NamedTuple):
    """What an answer would cost.

    Attributes:
        seconds: estimated time.
        gradient_steps: at how many steps gradients of samples are needed.
    """

    seconds: float
    gradient_steps: int


@dataclass(frozen=True)
class Probe:
    """One step of a run, to time pieces of work on.

    Attributes:
        question: what is asked.
        outputs: J.
        nodes: quadrature nodes a step, as far as is known.
        split: the step.
        replay: the seconds that replaying it took.
    """

    question: Question
    outputs: int
    nodes: float
    split: StepDecomposition
    replay: float

    @classmethod
    def of(cls, question: Question, outputs: int, nodes: float) -> Probe:
        """Replay the run's first two steps."""
        return cls(question, outputs, nodes, *replayed(question.run))

    @property
    def function(self) -> FunctionAtStep:
        """What is explained, where the path ends."""
        return self.question.function.at(self.question.steps[-1])

    @cached_property
    def places(self) -> Places:
        """Where the parameters stand."""
        return Places(self.question)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The terms of the run's updates."""
        return term_names(self.question.run)


def peak_memory() -> int:
    """The most memory that this process ever held; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def replayed(run: Run) -> tuple[StepDecomposition, float]:
    """The run's second step (or its only one), and the seconds that it took."""
    steps = Decomposer(run).steps(until=min(2, len(run.steps)))
    first = next(steps)
    start = time.perf_counter()
    second = next(steps, None)  # the typical one: the first pays for what is made once
    return (first, 0.0) if second is None else (second, time.perf_counter() - start)


def first_needed(split: StepDecomposition, first: int, dtype: torch.dtype) -> int:
    """From which step on gradients matter, to rounding, at step ``first``, if all steps shrink them alike."""
    factors = [0.0]
    for declared in split.coefficients.values():
        f = declared.filter
        if f.order and any(c != 0.0 for c in f.C):  # a state that is never read remembers nothing
            a = f.A[0][0]
            factors.append(abs(a) if f.order == 1 and isinstance(a, float) else 1.0)
    factor = max(factors)
    if factor >= 1:
        return 1
    if factor == 0:
        return first
    needed = math.log(torch.finfo(dtype).eps / first) / math.log(factor)
    return max(1, first - math.ceil(needed))


def timed(function: Callable[[], object]) -> float:
    """Seconds of the fastest call, the first left out: that one pays for tracing."""
    function()
    best, spent = math.inf, 0.0
    for _ in range(3):
        start = time.perf_counter()
        function()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if spent > _PROBE_SECONDS:
            break
    return best
