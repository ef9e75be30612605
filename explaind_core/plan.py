"""What an attribution would do: strategy, passes, memory and time, without doing it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from explaind_core.budget import readable_size
from explaind_core.contract import term_names
from explaind_core.question import Question
from explaind_core.results import Frame
from explaind_core.run import Run
from explaind_core.strategy import choose

__all__ = ["Plan", "plan"]


@dataclass(frozen=True)
class Plan:
    """What an attribution would do.

    Attributes:
        strategy: see :mod:`explaind_core.strategy`.
        steps, tangents, nodes: how many steps, derivatives per node, nodes per step (adaptive: a guess of 2).
        chunks: into how many pieces the test samples are cut. passes: walks over the run.
        seconds: estimated time, from timing this machine now.
        result_bytes: what the result takes. peak_bytes: what is held at most, the result included.
        fits: whether that is within the memory budget.
    """

    strategy: str
    steps: int
    tangents: int
    nodes: float
    chunks: int
    passes: int
    seconds: float
    result_bytes: int
    peak_bytes: int
    fits: bool

    def __str__(self) -> str:
        return (
            f"{self.strategy} mode: {self.steps} steps x {self.nodes:g} nodes x {self.tangents} tangents, "
            f"{self.chunks} chunk(s) of test samples; about {self.seconds:.0f} s and "
            f"{readable_size(self.result_bytes)} for the result"
            + ("" if self.fits else ", MORE than the memory budget")
        )


def plan(run: Run, inputs: Any, **question: Any) -> Plan:
    """What :func:`explaind_core.attribute` would do with the same arguments, without doing it.

    One node of the last step is timed for the estimate; an adaptive question is guessed at 2 nodes a step.

    Raises:
        QuestionError, LayerError: as ``attribute`` would.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> plan(record_example(steps=3), torch.zeros(2, 4, dtype=torch.float64), nodes=1).steps
        3
    """
    asked = Question.ask(run, inputs, **question)
    frame = Frame(asked)
    choice = choose(asked, frame.outputs)
    function, theta = asked.function, run.theta(asked.steps[-1])
    terms = term_names(run)

    def one_node() -> None:
        for layer in asked.layers:
            share = layer.share({n: t.double() for n, t in theta.items()})
            function.derivatives(theta, [share] * len(terms))

    one_node()  # the first call pays for tracing
    start = time.perf_counter()
    one_node()
    per_node = time.perf_counter() - start
    nodes = 2.0 if asked.quadrature.adaptive else float(asked.quadrature.ladder[0])
    result = asked.result_bytes(frame.outputs)
    return Plan(
        strategy=choice.strategy,
        steps=len(asked.steps),
        tangents=len(asked.layers) * len(terms) + (asked.rest is not None),
        nodes=nodes,
        chunks=len(function.chunks),
        passes=choice.passes,
        seconds=per_node * nodes * len(asked.steps),
        result_bytes=result,
        peak_bytes=result + choice.working_bytes + choice.base_bytes,
        fits=result <= asked.memory,
    )
