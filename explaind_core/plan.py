"""What an attribution would do: strategy, chunks, memory and time, without doing it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch

from explaind_core.contract import Quadrature, term_names
from explaind_core.errors import QuestionError
from explaind_core.feature_maps import ExplainedFunction
from explaind_core.layers import Layer, LayerSpec, resolve_layers
from explaind_core.outputs import as_output
from explaind_core.run import Run

__all__ = ["AXES", "Plan", "Question", "parse_memory", "plan"]

#: The axes of the influence tensor that forward mode can keep, in the order of a result's dimensions.
AXES = ("step", "layer", "test", "output")
_LATER = {"gradient_step", "parameter", "train"}
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_memory(memory: str | int) -> int:
    """A memory budget in bytes.

    Raises:
        QuestionError: not a number of bytes with a unit.

    Example:
        >>> parse_memory("4GiB")
        4294967296
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(memory), re.ASCII)
    unit = _UNITS.get(match.group(2) or "B") if match else None
    if match is None or unit is None:
        raise QuestionError("memory is no amount of memory", expected='bytes, or a string such as "4GiB"', got=memory)
    return int(float(match.group(1)) * unit)


def readable_size(size: int) -> str:
    """Bytes with a unit that fits.

    Example:
        >>> readable_size(3 * 2**29), readable_size(100)
        ('1.5 GiB', '100 B')
    """
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f} {unit}"
    return f"{size} B"


@dataclass(frozen=True)
class Question:
    """An attribution, checked and resolved: everything that follows knows only this.

    Attributes:
        run: the run. steps: rising step numbers. layers, rest: what is kept apart, and what that leaves out.
        keep: the kept axes in order. quadrature: the nodes. function: what is explained. memory: bytes.
    """

    run: Run
    steps: tuple[int, ...]
    layers: tuple[Layer, ...]
    rest: Layer | None
    keep: tuple[str, ...]
    quadrature: Quadrature
    function: ExplainedFunction
    memory: int

    @classmethod
    def ask(
        cls,
        run: Run,
        inputs: Any,
        *,
        keep: Sequence[str] = AXES,
        output: Any = None,
        steps: Any = None,
        train: Any = None,
        layers: LayerSpec | None = None,
        nodes: int | str = "adaptive",
        tolerance: float = 1e-3,
        max_nodes: int = 32,
        memory: str | int = "4GiB",
        chunk: int = 500,
    ) -> Question:
        """Check every argument (see :func:`explaind_core.attribute`) before any work is done."""
        if run.model is None:
            raise QuestionError(
                "the run was opened without its model", where=run.path, remedy="open_run(path, model=model)"
            )
        kept = _check_keep(keep)
        if train is not None:
            raise QuestionError(
                "this version cannot restrict the training samples", where="train", expected="None", got=train
            )
        resolved, rest = resolve_layers(layers, run.parameters)
        if "layer" not in kept:
            resolved = (Layer("all", {n: m for layer in resolved for n, m in _merged(resolved, layer).items()}),)
        function = ExplainedFunction(run.model, run.buffers(), inputs, as_output(output, run.loss), chunk=chunk)
        quadrature = Quadrature(nodes, tolerance, max_nodes)
        return cls(run, _check_steps(run, steps), resolved, rest, kept, quadrature, function, parse_memory(memory))

    def shape(self, outputs: int) -> dict[str, int]:
        """The sizes of the kept axes, for J = ``outputs``."""
        sizes = (len(self.steps), len(self.layers), self.function.samples, outputs)
        return {axis: n for axis, n in zip(AXES, sizes, strict=True) if axis in self.keep}

    def result_bytes(self, outputs: int) -> int:
        """What the finished result takes in memory."""
        shape = self.shape(outputs)
        cells = 1
        for n in shape.values():
            cells *= n
        terms = len(term_names(self.run)) * self.value_bytes
        return cells * terms + 2 * 8 * cells // shape.get("layer", 1)

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored influence: the run's own precision where a step is kept, float64 for sums over steps."""
        return self.function.dtype.itemsize if "step" in self.keep and self.function.dtype == torch.float32 else 8


def _merged(layers: Sequence[Layer], layer: Layer) -> dict[str, Any]:
    """``layer``'s masks, joined with those of other layers on the same parameter."""
    joined = {}
    for name, mask in layer.masks.items():
        masks = [other.masks[name] for other in layers if name in other.masks]
        joined[name] = None if mask is None else sum(m for m in masks if m is not None)
    return joined


def _check_keep(keep: Sequence[str]) -> tuple[str, ...]:
    axes = (keep,) if isinstance(keep, str) else tuple(keep)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        later = [axis for axis in unknown if axis in _LATER]
        raise QuestionError(
            f"this version cannot keep the axis {later[0]!r}" if later else f"there is no axis {unknown[0]!r}",
            where="keep",
            expected=f"a subset of {AXES}",
            got=axes,
        )
    if len(set(axes)) < len(axes):
        raise QuestionError("an axis is named twice", where="keep", got=axes)
    return tuple(axis for axis in AXES if axis in axes)


def _check_steps(run: Run, steps: Any) -> tuple[int, ...]:
    total = len(run.steps)
    where, expected = "steps", f"steps within 1..{total}: a slice, a range, a list or a number"
    if isinstance(steps, slice):
        start, stop = steps.start if steps.start is not None else 1, steps.stop if steps.stop is not None else total + 1
        # Python's own slices clamp; a range that is not there must not go unnoticed here.
        if not 1 <= start <= total or not 1 < stop <= total + 1 or (steps.step or 1) < 1:
            raise QuestionError("the slice of steps reaches outside the run", where=where, expected=expected, got=steps)
        chosen = list(range(start, stop, steps.step or 1))
    elif steps is None:
        chosen = list(run.steps)
    else:
        try:
            chosen = [index(s) for s in (steps if np.ndim(steps) else [steps])]
        except TypeError as error:
            raise QuestionError("steps are not whole numbers", where=where, expected=expected, got=steps) from error
    if not chosen:
        raise QuestionError("no step is asked for", where=where, expected=expected, got=steps)
    for s in chosen:
        run.check_step(s)
    if sorted(set(chosen)) != chosen:
        raise QuestionError("steps must rise and not repeat", where=where, expected=expected, got=steps)
    return tuple(chosen)


@dataclass(frozen=True)
class Plan:
    """What an attribution would do.

    Attributes:
        strategy: ``"forward"``: one directional derivative per (layer, term), test chunk and node.
        steps, tangents, nodes: how many steps, derivatives per node, nodes per step (adaptive: a guess of 2).
        chunks: into how many pieces the test samples are cut.
        seconds: estimated time, from timing one node on this machine now.
        result_bytes: what the result takes. fits: whether that is within the memory budget.
    """

    strategy: str
    steps: int
    tangents: int
    nodes: float
    chunks: int
    seconds: float
    result_bytes: int
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
        >>> from explaind_core.testing import record_example
        >>> plan(record_example(steps=3), torch.zeros(2, 4, dtype=torch.float64), nodes=1).steps
        3
    """
    asked = Question.ask(run, inputs, **question)
    function, theta = asked.function, run.theta(asked.steps[-1])
    outputs = function.values(theta).shape[1]
    terms = term_names(run)

    def one_node() -> None:
        for layer in asked.layers:
            share = layer.share({n: t.double() for n, t in theta.items()})
            function.derivatives(theta, [share] * len(terms))

    one_node()  # the first call pays for tracing
    start = time.perf_counter()
    one_node()
    per_node = time.perf_counter() - start
    nodes = 2.0 if asked.quadrature.adaptive else float(asked.quadrature.nodes)
    result = asked.result_bytes(outputs)
    return Plan(
        strategy="forward",
        steps=len(asked.steps),
        tangents=len(asked.layers) * len(terms) + (asked.rest is not None),
        nodes=nodes,
        chunks=len(function.chunks),
        seconds=per_node * nodes * len(asked.steps),
        result_bytes=result,
        fits=result <= asked.memory,
    )
