"""Pieces of the work that a question needs, timed on one step of its run."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from explaind_core.decomposition import Decomposer, StepDecomposition, term_names
from explaind_core.questions import Places, Question, WindowSum
from explaind_core.run import Run
from explaind_core.strategies import Adjoint, Choice, EntryFeatures, State, feature_map, products

__all__ = ["first_needed", "peak_memory", "replayed", "timed"]

#: Test samples that a backward pass is timed with.
_PROBED = 64

#: A piece of work that takes longer than this is not timed again.
_PROBE_SECONDS = 1.0


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


class _Probe:
    """Times one piece of each kind of work that a question needs."""

    def __init__(self, question: Question, choice: Choice, outputs: int, nodes: float) -> None:
        self.question, self.choice, self.outputs, self.nodes = question, choice, outputs, nodes
        self.places = Places(question)
        self.split, self.replay = replayed(question.run)
        self.names = term_names(question.run)

    def seconds(self) -> tuple[float, int]:
        """The estimate; and at how many steps gradients of samples are needed."""
        question = self.question
        if self.choice.strategy == "adjoint":
            return self._adjoint()
        last, segments = question.steps[-1], len(question.segments)
        values = timed(lambda: question.function.values(self.split.theta))
        total = self.replay * last + values * segments
        samples = 0
        if question.splits_gradients:  # forward-time features are fed from where gradients matter on
            first = first_needed(self.split, question.steps[0], question.function.dtype)
            walked = last - first + 1
            entries = EntryFeatures(question, self.places.names)
            fed = walked if entries.others else sum(first <= s <= last for s in entries.steps)
            entries.steps.setdefault(self.split.step, 0)
            total += fed * timed(lambda: entries.advance(self.split))
            if fed < walked:
                entries.steps.clear()
                total += (walked - fed) * timed(lambda: entries.advance(self.split))
            samples = sum(first <= s <= last for s in question.gradient_steps) if question.train is not None else 0
        if self.choice.strategy == "forward":
            return total + self.nodes * segments * self._tangents(), samples
        features = None
        if question.splits_gradients:
            features = EntryFeatures(question, self.places.names).advance(self.split)
        size = self._size()
        shapes = {n: t.shape for n, t in WindowSum(question, 0, self.outputs, self.names, size).terms.items()}
        points = question.quadrature.points(1)
        small = replace(question, rest=None)
        one = timed(
            lambda: products(small, self.places, self.split, self.names, features, [slice(0, size)], points, shapes)
        )
        return total + self.nodes * segments * one * self._blocks(size), samples

    def terms(self) -> int:
        """The terms that forward mode derives along, the kernel's entries each counted as one."""
        split = self.question.splits_gradients
        return len(self.names) + (EntryFeatures(self.question, self.places.names).count - 1 if split else 0)

    def _size(self) -> int:
        samples = self.question.function.samples
        return min(samples, _PROBED) if self.question.keeps("test") else samples

    def _blocks(self, size: int) -> float:
        return self.question.function.samples / size

    def _tangents(self) -> float:
        """One node of forward mode, for all layers, terms and entries."""
        function, theta = self.question.function, self.split.theta
        count = self.terms()

        def node() -> None:
            for layer in self.question.layers:
                share = layer.share({n: t.double() for n, t in theta.items()})
                function.derivatives(theta, [share] * count)

        return timed(node)

    def _adjoint(self) -> tuple[float, int]:
        question, rows = self.question, self.choice.rows
        block = slice(0, rows)
        size = min(rows, _PROBED) if question.keeps("test") else rows
        points = question.quadrature.points(1)

        def phi(stop: int) -> dict[str, torch.Tensor]:
            found = feature_map(
                question, self.split.theta_before, self.split.theta, self.places.names, slice(0, stop), points
            )
            return {n: g.flatten(0, 1) for n, g in found.items()}

        per_map = timed(lambda: phi(size)) * rows / size
        adjoint = Adjoint(question, None, block, self.outputs, 1.0, method=self.choice.method)
        typical = phi(size)
        filled = {n: g.repeat_interleave(-(-rows // size), 0)[: len(g) * rows // size] for n, g in typical.items()}

        def one_step() -> None:
            adjoint.alive = {0: State()}
            worth = adjoint.advance(self.split, 0, filled)
            adjoint.add_kernel(self.split, worth)

        per_step = timed(one_step)
        needed, work = set[int](), 0
        for window in question.windows:
            first, last = first_needed(self.split, window.steps[0], question.function.dtype), window.steps[-1]
            needed |= set(range(first, last + 1))
            work += last - first + 1
        # Several windows at a step share the samples' gradients, of which most of the time is made.
        shared = len(needed) + 0.25 * (work - len(needed))
        values = timed(lambda: question.function.values(self.split.theta, block))
        maps = (self.nodes * per_map + 2 * values) * len(question.segments)
        back = self.replay * (question.steps[-1] - min(needed) + 1)  # the tape is replayed as far as it is needed
        seconds = self.replay * question.steps[-1] + self.choice.passes * (maps + per_step * shared + back)
        return seconds, len(needed) if question.train is not None else 0


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
