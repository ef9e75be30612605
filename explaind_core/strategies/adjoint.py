"""The strategy that walks back in time: rows of states, whatever the training set and its steps are.

See :mod:`explaind_core.strategies.adjoint_walk` for the recursion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from explaind_core.decomposition import StepDecomposition, Tape
from explaind_core.progress import counted
from explaind_core.questions import GRADIENT_AXES, Contribution, Ends, Question
from explaind_core.strategies.adjoint_walk import AdjointWalk, State
from explaind_core.strategies.entry_features import STATES
from explaind_core.strategies.probe import PROBED, Estimate, Probe, first_needed, timed
from explaind_core.strategies.reverse import feature_map
from explaind_core.strategies.shares import GradientSplitter
from explaind_core.strategies.stepwise import covered, gradient_work
from explaind_core.strategies.strategy import Choice, Strategy, run_bytes

__all__ = ["Adjoint"]

#: Rows up to which a forward-mode derivative per row is cheaper than the gradients of all samples.
DIRECTIONAL = 2
#: What one step of a row's state costs per parameter, in multiplications of a matrix product: it is limited by memory.
#: Measured on the demo's decoder (4,000 entries, 200 rows) on two cores.
_ROW = 500.0


class Adjoint(Strategy):
    """As reverse, walking back in time: cheapest where training samples or gradient steps are kept."""

    name = "adjoint"
    along = "test"

    def holds(self, question: Question, outputs: int) -> Choice:
        """phi, psi and a of one window; z and a of all of them. phi twice, while its order is searched for."""
        n = question.function.samples
        segment = max(1, min(math.isqrt(question.steps[-1]), question.memory // 8 // run_bytes(question)))
        base = (segment + 1) * run_bytes(question)
        per_row = (outputs if question.keeps("output") else 1) * covered(question) * question.function.dtype.itemsize
        held = per_row * (4 + len(question.windows) * (STATES + 1))
        if not question.keeps("test"):
            return Choice(self, n, 1, segment, _method(question, outputs, 1), held, base)
        rows = max(1, min(n, (question.memory // 2) // held))
        return Choice(self, rows, -(-n // rows), segment, _method(question, outputs, rows), rows * held, base)

    def work(self, question: Question, outputs: int) -> float | None:
        """Multiplications of states with coefficients, and of gradients with what they are worth."""
        if not any(question.keeps(axis) for axis in GRADIENT_AXES):
            return None
        if question.keeps("parameter"):  # which it can do for elementwise optimizers only
            return math.inf
        sizes = question.sizes(outputs)
        rows = (sizes["test"] if question.keeps("test") else 1) * (outputs if question.keeps("output") else 1)
        last, alive = question.steps[-1], len(question.windows)
        batch = 1 if question.train is None else len(question.run.sample_ids(last))
        passes = self.holds(question, outputs).passes
        return last * (passes * gradient_work(question) + rows * alive * covered(question) * (_ROW + batch))

    def probe(self, probe: Probe, choice: Choice) -> Estimate:
        """A feature map, a step back with its products, and how many steps back states matter."""
        question, rows, split = probe.question, choice.rows, probe.split
        block = slice(0, rows)
        size = min(rows, PROBED) if question.keeps("test") else rows
        points = question.quadrature.points(1)

        def phi(stop: int) -> dict[str, Tensor]:
            found = feature_map(
                question, probe.function, split.theta_before, split.theta, probe.places.names, slice(0, stop), points
            )
            return {n: g.flatten(0, 1) for n, g in found.items()}

        per_map = timed(lambda: phi(size)) * rows / size
        walk = AdjointWalk(question, None, block, probe.outputs, 1.0, method=choice.method)
        typical = phi(size)
        filled = {n: g.repeat_interleave(-(-rows // size), 0)[: len(g) * rows // size] for n, g in typical.items()}

        def one_step() -> None:
            walk.alive = {0: State()}
            walk.add_kernel(split, walk.advance(split, 0, filled))

        per_step = timed(one_step)
        needed, steps = set[int](), 0
        for window in question.windows:
            first, last = first_needed(split, window.steps[0], question.function.dtype), window.steps[-1]
            needed |= set(range(first, last + 1))
            steps += last - first + 1
        # Several windows at a step share the samples' gradients, of which most of the time is made.
        shared = len(needed) + 0.25 * (steps - len(needed))
        values = timed(lambda: probe.function.values(split.theta, block))
        maps = (probe.nodes * per_map + 2 * values) * len(question.segments)
        back = probe.replay * (question.steps[-1] - min(needed) + 1)  # the tape is replayed as far as it is needed
        seconds = probe.replay * question.steps[-1] + choice.passes * (maps + per_step * shared + back)
        return Estimate(seconds, len(needed) if question.train is not None else 0)

    def contributions(
        self, question: Question, ends: Ends, choice: Choice, *, done: int = 0, block: int, progress: bool = True
    ) -> Iterator[Contribution]:
        """All windows of one block of test samples after the other, behind the first ``done``."""
        del block  # windows are not what is written one after the other
        samples, last, scale = question.function.samples, question.steps[-1], self.scale(question, ends)
        size = choice.rows if question.keeps("test") else samples
        blocks = [slice(a, min(a + size, samples)) for a in range(done, samples, size)]
        with counted(last * (1 + len(blocks)), "attributing", enabled=progress) as advance:

            def seen(split: StepDecomposition) -> None:
                question.check_update(split)
                advance(1)

            with Tape(question.run, last, segment=choice.segment, seen=seen) as tape:
                splitter = GradientSplitter(question)
                for rows in blocks:
                    walk = AdjointWalk(
                        question, tape, rows, ends.outputs, scale, method=choice.method, splitter=splitter
                    )
                    yield from walk.run(advance)


def _method(question: Question, outputs: int, rows: int) -> str:
    derivatives = rows * (outputs if question.keeps("output") else 1) * len(question.windows) * len(question.layers)
    return "directional" if derivatives <= DIRECTIONAL else "materialised"
