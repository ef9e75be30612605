"""What an attribution would do: strategy, passes, memory and time, without doing it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Unpack

from explaind_core.attribution.attribute import check_engine
from explaind_core.attribution.frame import Frame
from explaind_core.questions import AttributionArguments, Question, question_of, spelled_out
from explaind_core.run import Run
from explaind_core.store import readable_size
from explaind_core.strategies import Probe, choose, insisted_on, peak_memory

__all__ = ["Plan", "plan", "plan_of"]

#: Nodes a step that are guessed where their number is chosen step by step.
GUESSED_NODES = 2.0


@dataclass(frozen=True)
class Plan:
    """What an attribution would do.

    Attributes:
        strategy: see :mod:`explaind_core.strategies.choose`.
        steps: how many are explained, or chords of them.
        tangents: derivatives per node (backward: rows per test sample).
        nodes: per step (adaptive: a guess of 2).
        chunks: into how many pieces the test samples are cut.
        passes: walks over the run.
        gradient_steps: steps whose samples' gradients are needed, 0 where the recorded update is enough.
        seconds: estimated time, from timing pieces of the work on this machine now; NaN where the result does not fit
            into the memory budget, so that nothing is timed.
        result_bytes: what the result takes.
        peak_bytes: what is held at most, the result included.
        fits: whether the result is within the memory budget (what is held besides is cut to fit).
        derivatives_are: what ``tangents`` counts.
    """

    strategy: str
    steps: int
    tangents: int
    nodes: float
    chunks: int
    passes: int
    gradient_steps: int
    seconds: float
    result_bytes: int
    peak_bytes: int
    fits: bool
    derivatives_are: str = "rows per test sample"

    def __str__(self) -> str:
        gradients = f"; gradients of samples at {self.gradient_steps} steps" if self.gradient_steps else ""
        return (
            f"{self.strategy} mode: {self.steps} steps x {self.nodes:g} nodes x "
            f"{self.tangents} {self.derivatives_are}, {self.chunks} chunk(s) of test samples, "
            f"{self.passes} pass(es) over the run{gradients}; {self._time()}, "
            f"{readable_size(self.peak_bytes)} at most, of which {readable_size(self.result_bytes)} for the result"
            + ("" if self.fits else ", MORE than the memory budget")
        )

    def _time(self) -> str:
        return "not timed" if math.isnan(self.seconds) else f"about {self.seconds:.0f} s"


@spelled_out
def plan(run: Run, inputs: Any, **arguments: Unpack[AttributionArguments]) -> Plan:
    """What :func:`explaind_core.attribute` would do with the same arguments, without doing it.

    The first two steps of the run are replayed, and one piece of each kind of work is timed on them; an adaptive
    question is guessed at 2 nodes a step. Nothing is written to ``out``, and no bar is shown.

    Args:
        run: a run opened with its model.
        inputs: the n test samples, as for ``attribute``.
        **arguments: see :class:`explaind_core.questions.AttributionArguments`.

    Raises:
        QuestionError, LayerError: as ``attribute`` would.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> plan(record_example(steps=3), torch.zeros(2, 4, dtype=torch.float64), nodes=1).steps
        3
    """
    check_engine(arguments["engine"])
    return plan_of(Question.ask(run, inputs, **question_of(arguments)))


def plan_of(asked: Question) -> Plan:
    """The plan for a question that was checked."""
    insisted_on(asked)  # before any work
    frame = Frame(asked)
    held, result = peak_memory(), asked.result_bytes(frame.outputs)
    fits = result <= asked.memory
    choice = choose(asked, frame.outputs)
    choice = choose(asked, frame.examined()) if fits else choice
    strategy = choice.strategy
    nodes = GUESSED_NODES if asked.quadrature.adaptive else float(asked.quadrature.ladder[0])
    seconds, gradient_steps = math.nan, 0
    if fits:  # otherwise the pieces of work are too large as well
        seconds, gradient_steps = strategy.probe(Probe.of(asked, frame.outputs, nodes), choice)
    grown = max(0, peak_memory() - held)
    return Plan(
        strategy=strategy.name,
        steps=len(asked.segments),
        tangents=strategy.derivatives(asked, frame.outputs),
        nodes=nodes,
        chunks=len(asked.function.chunks),
        passes=choice.passes,
        gradient_steps=gradient_steps,
        seconds=seconds,
        result_bytes=result,
        # A probe that grew the process holds one step's share of the work, and what the model itself needs.
        peak_bytes=result + choice.base_bytes + max(choice.working_bytes, grown),
        fits=fits,
        derivatives_are=strategy.derivatives_are,
    )
