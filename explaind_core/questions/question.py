"""An attribution question, checked and resolved before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch

from explaind_core.decomposition import StepDecomposition, check_update, term_names
from explaind_core.derivatives import ExplainedFunction, Quadrature, as_output
from explaind_core.errors import QuestionError
from explaind_core.questions.arguments import AXES, QuestionArguments, spelled_out
from explaind_core.questions.layers import Layer, resolve_layers
from explaind_core.questions.memory import parse_memory
from explaind_core.questions.model_check import check_model
from explaind_core.questions.restrictions import (
    Segment,
    TrainEntries,
    Window,
    drawn,
    resolve_gradient_steps,
    resolve_steps,
    resolve_test,
    resolve_train,
    segments_of,
)
from explaind_core.run import Run
from explaind_core.training_step import InputRows

__all__ = ["AXES", "GRADIENT_AXES", "Question"]

#: The axes that only the kernel has: regularization and prehistory are not due to a sample's gradient.
GRADIENT_AXES = ("gradient_step", "train")
#: What a sample's share of a gradient may be.
SHARES = ("outputs", "loss_terms")


@dataclass(frozen=True)
class Question:
    """An attribution, checked and resolved: everything that follows knows only this.

    Attributes:
        run: the run.
        windows: the entries of the step axis.
        segments: the straight lines of the path, in order.
        gradient_steps: whose gradients count; those up to the last step, all of them unless restricted.
        train: the entries of the train axis, None where samples need not be told apart.
        layers: what is kept apart.
        rest: what the layers leave out, None for nothing.
        keep: the kept axes in order.
        quadrature: the nodes.
        function: what is explained.
        memory: bytes.
        strategy: the name of the one that the caller insists on, None for the cheapest.
        chords: steps that share a straight line.
        carries: whether what no sample explains of a gradient is a term: wherever samples are told apart.
        forgives: whether that may be more than rounding.
        shares: what a sample's share of a gradient is, ``"outputs"`` or ``"loss_terms"``.
        gram: whether the inner products of the kernel's tensors are wanted, too (features only).
        notes: what a result must say about how it was asked for.
        max_update_error: the largest error of a declared update that is accepted, None for rounding.
    """

    run: Run
    windows: tuple[Window, ...]
    segments: tuple[Segment, ...]
    gradient_steps: tuple[int, ...]
    train: TrainEntries | None
    layers: tuple[Layer, ...]
    rest: Layer | None
    keep: tuple[str, ...]
    quadrature: Quadrature
    function: ExplainedFunction
    memory: int
    strategy: str | None = None
    chords: int = 1
    carries: bool = False
    forgives: bool = False
    shares: str = "outputs"
    gram: bool = False
    notes: tuple[str, ...] = ()
    max_update_error: float | None = None

    @classmethod
    @spelled_out
    def ask(cls, run: Run, inputs: Any, **arguments: Unpack[QuestionArguments]) -> Question:
        """Check every argument before any work is done.

        Args:
            run: a run opened with its model.
            inputs: the test samples.
            **arguments: see :class:`QuestionArguments`.

        Raises:
            QuestionError, LayerError: an argument makes no sense.
        """
        if run.model is None:
            raise QuestionError(
                "the run was opened without its model", where=run.path, remedy="open_run(path, model=model)"
            )
        check_model(run)
        given = arguments
        kept, chords = _check_keep(given["keep"]), given["chords"]
        _check_choices(given)
        resolved, rest = resolve_layers(given["layers"], run.parameters, run.model)
        if "layer" not in kept:
            resolved = (Layer("all", {n: m for layer in resolved for n, m in _merged(resolved, layer).items()}),)
        windows = resolve_steps(run, given["steps"])
        segments = segments_of(windows, chords)
        if chords > 1 and all(len(w.steps) == 1 for w in windows):
            windows, segments = _joined(windows, chords)
        if "step" not in kept:  # one window, and so one adjoint state, for all of them
            windows = (Window("all", tuple(s for window in windows for s in window.steps)),)
            segments = tuple(Segment(segment.steps, 0) for segment in segments)
        last = windows[-1].steps[-1]
        asked = resolve_gradient_steps(run, given["gradient_steps"], last)
        split, samples = "train" in kept or given["train"] is not None, _samples(inputs)
        function = ExplainedFunction(
            run.model, run.buffers(), inputs, as_output(given["output"], run.loss), chunk=given["chunk"],
            random_state=given["random_state"], rows=resolve_test(given["test"], samples),
            buffers_at=run.buffers if given["buffers"] == "recorded" and run.moving_buffers else None,
        )  # fmt: skip
        entries = _train_entries(run, given["train"], asked) if split else None
        notes = [
            *drawn("step", given["steps"], len(run.steps)),
            *drawn("gradient_step", given["gradient_steps"], last),
            *drawn("train", given["train"], 0 if entries is None else entries.scope),
            *drawn("test", given["test"], samples),
        ]
        return cls(
            run=run,
            windows=windows,
            segments=segments,
            gradient_steps=asked,
            train=entries,
            layers=resolved,
            rest=rest,
            keep=kept,
            quadrature=Quadrature(given["nodes"], given["tolerance"], given["max_nodes"]),
            function=function,
            memory=parse_memory(given["memory"]),
            strategy=given["strategy"],
            chords=chords,
            carries=split,
            shares=given["shares"],
            forgives=split and (given["unattributed"] == "carry" or run.coarse),
            notes=tuple(notes),
            max_update_error=given["max_update_error"],
        )

    def check_update(self, split: StepDecomposition) -> None:
        """Refuse a step that the rule does not explain (CoefficientError)."""
        check_update(split, self.max_update_error, f"rule {self.run.rule or self.run.rule_name}")

    # ------------------------------------------------------------------ what it asks for
    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of a result: those of the updates, and what no sample explains of gradients, if it is carried."""
        return (*term_names(self.run), *(("unattributed",) if self.carries else ()))

    @property
    def steps(self) -> tuple[int, ...]:
        """All steps explained, rising."""
        return tuple(s for window in self.windows for s in window.steps)

    @property
    def restricts_gradients(self) -> bool:
        """Whether some gradient steps or training samples are left out of the kernel."""
        fewer = len(self.gradient_steps) < self.windows[-1].steps[-1]
        return fewer or (self.train is not None and self.train.restricted)

    @property
    def splits_gradients(self) -> bool:
        """Whether the recorded update is not enough: gradients must be told apart by step or sample."""
        return self.restricts_gradients or any(axis in self.keep for axis in GRADIENT_AXES)

    def keeps(self, axis: str) -> bool:
        """Whether an axis is kept."""
        return axis in self.keep

    # ------------------------------------------------------------------ sizes
    def sizes(self, outputs: int) -> dict[str, int]:
        """The sizes of all axes, kept or not, for J = ``outputs``."""
        entries = 1 if self.train is None else len(self.train.labels)
        sizes = (
            len(self.windows), len(self.gradient_steps), len(self.layers), self.parameters, entries,
            self.function.samples, outputs,
        )  # fmt: skip
        return dict(zip(AXES, sizes, strict=True))

    def shape(self, outputs: int) -> dict[str, int]:
        """The sizes of the kept axes."""
        return {axis: n for axis, n in self.sizes(outputs).items() if axis in self.keep}

    @property
    def parameters(self) -> int:
        """How many parameter entries the layers cover."""
        total = 0
        for name, info in self.run.parameters.items():
            masks = [layer.masks[name] for layer in self.layers if name in layer.masks]
            total += sum(info.shape.numel() if m is None else int(m.sum()) for m in masks)
        return total

    def result_bytes(self, outputs: int) -> int:
        """What the finished result takes in memory."""
        shape = self.shape(outputs)
        cells = math.prod(shape.values())
        plain = math.prod(n for axis, n in shape.items() if axis not in GRADIENT_AXES)
        edges = math.prod(n for axis, n in shape.items() if axis in ("step", "test", "output"))
        others = len(self.terms) - 1 - (self.carries and not self.forgives)  # which is rounding, as a rule
        return (cells + others * plain) * self.value_bytes + 2 * 8 * edges

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored influence: the run's own precision where a step is kept, float64 for sums over steps."""
        return self.function.dtype.itemsize if "step" in self.keep and self.function.dtype == torch.float32 else 8


def _check_choices(given: QuestionArguments) -> None:
    """Arguments of which there are but a few, and numbers of something (QuestionError)."""
    unattributed, buffers = given["unattributed"], given["buffers"]
    if unattributed not in ("refuse", "carry"):
        raise QuestionError(
            "there is no such way with unattributed gradients",
            where="unattributed",
            expected=("refuse", "carry"),
            got=unattributed,
        )
    if buffers not in ("recorded", "final"):
        raise QuestionError("there are no such buffers", where="buffers", expected=("recorded", "final"), got=buffers)
    if given["shares"] not in SHARES:
        raise QuestionError("there are no such shares", where="shares", expected=SHARES, got=given["shares"])
    limit = given["max_update_error"]
    if limit is not None and not limit >= 0:
        raise QuestionError("there is no such error", where="max_update_error", expected="a number >= 0", got=limit)
    seed = given["random_state"]
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise QuestionError(
            "random_state is no seed",
            where="random_state",
            expected="a whole number from 0 to 2**63 - 1, or None",
            got=seed,
            remedy="say random_state=0",
        )
    for name, what in (("chords", "chords is no number of steps"), ("chunk", "chunk is no number of samples")):
        value = cast("dict[str, Any]", given)[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise QuestionError(what, where=name, expected="an integer >= 1", got=value)


def _train_entries(run: Run, train: Any, gradient_steps: Sequence[int]) -> TrainEntries:
    if run.loss is None:
        raise QuestionError(
            "the run's loss is not known, so gradients cannot be split by training sample",
            where="train",
            expected="a loss of torch.nn, or one that is given",
            remedy="say open_run(..., loss=...)",
        )
    return resolve_train(run, train, gradient_steps)


def _merged(layers: Sequence[Layer], layer: Layer) -> dict[str, Any]:
    """``layer``'s masks, joined with those of other layers on the same parameter."""
    joined = {}
    for name, mask in layer.masks.items():
        masks = [other.masks[name] for other in layers if name in other.masks]
        joined[name] = None if mask is None else sum(m for m in masks if m is not None)
    return joined


def _joined(windows: Sequence[Window], chords: int) -> tuple[tuple[Window, ...], tuple[Segment, ...]]:
    """One window per chord, labelled by its last step: what happens inside is not told apart."""
    joined = segments_of([Window("all", tuple(s for w in windows for s in w.steps))], chords)
    found = tuple(Window(segment.steps[-1], segment.steps) for segment in joined)
    return found, tuple(Segment(w.steps, position) for position, w in enumerate(found))


def _samples(inputs: Any) -> int:
    """The number of test samples."""
    plain, rows = InputRows.split(inputs)
    return rows.samples(plain)


def _check_keep(keep: Sequence[str]) -> tuple[str, ...]:
    axes = (keep,) if isinstance(keep, str) else tuple(keep)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise QuestionError(f"there is no axis {unknown[0]!r}", where="keep", expected=f"a subset of {AXES}", got=axes)
    if len(set(axes)) < len(axes):
        raise QuestionError("an axis is named twice", where="keep", got=axes)
    return tuple(axis for axis in AXES if axis in axes)
