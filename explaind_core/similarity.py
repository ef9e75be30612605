r"""Similarity of predictions: the cosine of their influence tensors (paper, Definition 4.4).

Over steps, parameters, training samples and outputs the inner product of two tensors is a weighted Gram matrix,

    sum_s sum_j  phi_s(x)_j  diag( sum_k h_{s,k}^2 )  phi_s(x')_j^T,      h_{s,k} = sum_i alpha_{s,i} P_s E_i g_{i,k},

in which the train axis is one vector of second moments a step: neither M x D nor n x M numbers are ever held.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind_core.attribute import answer
from explaind_core.decompose import StepDecomposition, decompose
from explaind_core.entries import EntryFeatures, horizon
from explaind_core.errors import QuestionError
from explaind_core.progress import counted
from explaind_core.quadrature import climb
from explaind_core.question import AXES, Question
from explaind_core.results import Frame
from explaind_core.reverse import feature_map
from explaind_core.run import Run
from explaind_core.stepwise import finite_values
from explaind_core.strategy import STATES

__all__ = ["similarity"]

_OVER = ("step", "parameter", "train", "output")


def similarity(
    run: Run,
    inputs: Any,
    *,
    over: Sequence[str] = _OVER,
    per: Sequence[str] = (),
    output: Any = None,
    steps: Any = None,
    train: Any = None,
    layers: Any = None,
    test: Any = None,
    nodes: int | str = "adaptive",
    tolerance: float = 1e-3,
    max_nodes: int = 32,
    memory: str | int = "4GiB",
    progress: bool = True,
) -> xr.DataArray:
    """``cos(T(x), T(x'))`` of the kernel's influence tensors of all pairs of test samples (paper, Definition 4.4).

    Args:
        run, inputs, output, steps, train, layers, test: as for :func:`explaind_core.attribute`.
        over: the axes that the tensors are flattened over; all others are summed first, which is another question.
        per: axes with a matrix for each entry, ``"layer"`` or ``"step"`` (each window of steps, where they are named;
            its steps are summed first, unless ``over`` has ``"step"``, too).
        nodes, tolerance, max_nodes: as for ``attribute``; adaptive orders are those of f's change along the step.
        memory: the most that feature maps and per-sample features may take; more of it means fewer passes.

    Returns:
        ``[*per, test, other]``, float64; NaN for a sample that nothing influenced.

    Raises:
        QuestionError: an argument makes no sense; what is asked for does not fit into ``memory``.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> inputs = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0]], dtype=torch.float64)
        >>> similarity(record_example(steps=2), inputs, progress=False).values.round(3).diagonal()
        array([1., 1.])
    """
    over, per = tuple(over), tuple(per)
    unknown = [axis for axis in over if axis not in AXES or axis == "test"]
    if unknown or not over or not set(per) <= {"layer", "step"}:
        raise QuestionError(
            "similarity cannot be taken like that",
            where="over, per",
            expected=f"over some of {tuple(a for a in AXES if a != 'test')}, per some of ('layer', 'step')",
            got=(over, per),
        )
    kept = {"test", *per, *(a for a in over if a != "layer" or "layer" not in per)}
    windows = isinstance(steps, Mapping)
    gram = {"step", "parameter"} <= set(over) and "gradient_step" not in over and (windows or "step" not in per)
    question = Question.ask(
        run,
        inputs,
        keep=tuple(a for a in AXES if a in kept),
        output=output,
        steps=steps,
        train=train,
        layers=layers,
        test=test,
        nodes=nodes,
        tolerance=tolerance,
        max_nodes=max_nodes,
        memory=memory,
    )
    if gram:
        products = _gram(question, per, progress)
    else:
        if "step" in over and "step" in per:
            raise QuestionError(
                "steps cannot be flattened within windows there",
                where="over, per",
                expected="both 'step' and 'parameter' in over",
                got=(over, per),
            )
        result = answer(question, progress=progress)
        values = result.kernel.transpose(*per, "test", *(d for d in result.kernel.dims if d not in (*per, "test")))
        flat = values.values.astype(np.float64).reshape(*(values.sizes[d] for d in (*per, "test")), -1)
        products = flat @ np.swapaxes(flat, -1, -2)
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = products / (norms[..., :, None] * norms[..., None, :])
    rows = question.function.rows.numpy()
    labels = {"layer": [layer.name for layer in question.layers], "step": [w.name for w in question.windows]}
    return xr.DataArray(
        cosine,
        dims=(*per, "test", "other"),
        coords={**{axis: labels[axis] for axis in per}, "test": rows, "other": rows},
        name="similarity",
        attrs={
            "score": "cosine similarity (Definition 4.4)",
            "over": list(over),
            "summed_first": [a for a in AXES if a not in (*over, *per, "test")],
            **question.facts,
        },
    )


def _gram(question: Question, per: tuple[str, ...], progress: bool) -> np.ndarray[Any, Any]:
    """The inner products by weighted Gram matrices: ``[*per, n, n]``."""
    frame = Frame(question, "reverse")
    names = [n for n in question.run.parameters if any(n in layer.masks for layer in question.layers)]
    first, last = question.steps[0], question.steps[-1]
    n = question.function.samples
    layers, windows = len(question.layers), len(question.windows)
    shape = [size if axis in per else 1 for axis, size in (("layer", layers), ("step", windows))]
    total = np.zeros((*shape, n, n))
    window_of = {s: w for w, window in enumerate(question.windows) for s in window.steps}
    passes = _passes(question, names) if question.keeps("train") else 0
    work = passes * last + len(question.steps)
    with (
        counted(work, "similarity", enabled=progress) as advance,
        _Moments(question, names, passes, advance) as moments,
    ):
        rung = 0
        for split in decompose(question.run, first=first, last=last):
            if split.step not in window_of:
                continue
            weights = moments.of(split)
            order, rung = _order(question, split, frame.scale, rung)
            for layer, part in enumerate(_step_gram(question, split, names, weights, order)):
                total[layer if "layer" in per else 0, window_of[split.step] if "step" in per else 0] += part
            advance(1)
    axes = [axis for axis in ("layer", "step") if axis in per]
    found = total.reshape(*(size for size, axis in zip(shape, ("layer", "step"), strict=True) if axis in per), n, n)
    return found if tuple(axes) == per else found.swapaxes(0, 1)


def _order(question: Question, split: StepDecomposition, scale: float, rung: int) -> tuple[int, int]:
    """How many nodes the step needs, by forward mode along its displacement; and where to start the next search."""
    quadrature, function = question.quadrature, question.function
    if not quadrature.adaptive:
        return quadrature.ladder[0], 0
    before = finite_values(question, split.theta_before, split.step - 1)
    after = finite_values(question, split.theta, split.step)
    moved = {n: split.theta[n].double() - split.theta_before[n].double() for n in split.theta}

    def evaluate(q: int) -> tuple[Tensor, int]:
        total = torch.zeros_like(before)
        for t, weight in quadrature.points(q):
            point = {n: torch.lerp(split.theta_before[n], split.theta[n], t) for n in split.theta}
            total += weight * function.derivatives(point, [moved])[0]
        return total, q

    climbed = climb(quadrature, rung, quadrature.tolerance * scale, before, after, evaluate, function.dtype)
    return climbed.best, climbed.rung


def _step_gram(
    question: Question, split: StepDecomposition, names: list[str], weights: Mapping[str, Tensor], order: int
) -> list[np.ndarray[Any, Any]]:
    """One step's inner products, layer by layer: ``[n, n]`` each."""
    function, points = question.function, question.quadrature.points(order)
    n, outputs = function.samples, function.outputs
    item = function.dtype.itemsize
    size = sum(t.numel() for name, t in split.theta.items() if name in names)
    # Two blocks of feature maps at a time; all outputs of a block of samples, or as many as fit.
    fitting = max(1, question.memory // 4 // (size * item))
    if question.keeps("output"):
        together = min(outputs, max(1, fitting // n))
        pieces = [slice(a, min(a + together, outputs)) for a in range(0, outputs, together)]
    else:
        together, pieces = 1, [slice(None)]
    rows = max(1, fitting // together)
    blocks = [slice(a, min(a + rows, n)) for a in range(0, n, rows)]
    found = [np.zeros((n, n)) for _ in question.layers]
    for columns in pieces:
        for one, block in enumerate(blocks):
            left = feature_map(question, split.theta_before, split.theta, names, block, points, columns)
            for other in blocks[one:]:
                right = left if other == block else feature_map(
                    question, split.theta_before, split.theta, names, other, points, columns
                )  # fmt: skip
                for position, layer in enumerate(question.layers):
                    part = _products(left, right, weights, layer.masks)
                    found[position][block, other] += part
                    if other != block:
                        found[position][other, block] += part.T
    return found


def _products(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor | None],
) -> np.ndarray[Any, Any]:  # fmt: skip
    total: Any = 0.0
    for name, mask in masks.items():
        if name in weights:
            weight = weights[name] if mask is None else weights[name] * mask
            a, b = (phi[name].flatten(2) for phi in (left, right))  # [n', J', d]
            scaled = (a * weight.reshape(-1).to(a.dtype)).flatten(1)
            total = total + (scaled @ b.flatten(1).T).double().numpy()
    return np.asarray(total)


def _passes(question: Question, names: list[str]) -> int:
    """Walks over the run: the training samples whose features fit into half of the budget go together."""
    assert question.train is not None
    size = sum(question.run.parameters[n].shape.numel() for n in names)
    together = max(1, question.memory // 2 // (size * question.function.dtype.itemsize * (3 + 2 * STATES)))
    return math.ceil(len(question.train.labels) / together)


@dataclass
class _Moments:
    """``sum_k h_{s,k}^2`` of every step explained, on disk; or the squared kernel update, training samples summed."""

    question: Question
    names: list[str]
    passes: int
    advance: Callable[[int], object]

    def __enter__(self) -> _Moments:
        self._folder = tempfile.TemporaryDirectory(prefix="explaind-moments-")
        try:
            self._fill()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _fill(self) -> None:
        question = self.question
        if not self.passes:
            return
        assert question.train is not None
        shapes = {n: question.run.parameters[n].shape for n in self.names}
        ends = np.cumsum([0, *(s.numel() for s in shapes.values())])
        self._where = {n: slice(int(a), int(b)) for n, a, b in zip(shapes, ends, ends[1:], strict=False)}
        self._row = {s: row for row, s in enumerate(question.steps)}
        path = Path(self._folder.name) / "moments"
        self._stored = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(self._row), int(ends[-1])))
        start = horizon(question)
        if start > 1:
            question.facts["tail_dropped"] = f"below rounding before step {start}"
        labels = question.train.labels
        size = math.ceil(len(labels) / self.passes)
        for low in range(0, len(labels), size):
            of = {k: e - low for k, e in question.train.of.items() if low <= e < low + size}
            entries = replace(question.train, labels=labels[low : low + size], of=of, restricted=False)
            features = EntryFeatures(replace(question, train=entries), self.names, others=False)
            self.advance(start - 1)
            for split in decompose(question.run, first=start, last=question.steps[-1]):
                for name, h in features.advance(split).items():
                    if split.step in self._row:
                        self._stored[self._row[split.step], self._where[name]] += (
                            h.double().square().sum(0).reshape(-1).numpy()
                        )
                self.advance(1)

    def of(self, split: StepDecomposition) -> dict[str, Tensor]:
        """Parameter name -> weights of its shape."""
        if not self.passes:
            return {n: u.kernel.square() for n, u in split.updates.items() if n in self.names}
        row = torch.from_numpy(np.array(self._stored[self._row[split.step]]))
        return {n: row[where].reshape(split.theta[n].shape) for n, where in self._where.items()}
