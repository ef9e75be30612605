r"""Similarity of predictions: the cosine of their influence tensors (paper, Definition 4.4).

Over steps, parameters, training samples and outputs the inner product of two tensors is a weighted Gram matrix,

    sum_s sum_j  phi_s(x)_j  diag( sum_k h_{s,k}^2 )  phi_s(x')_j^T,      h_{s,k} = sum_i alpha_{s,i} P_s E_i g_{i,k},

in which the train axis is one vector of second moments a step: neither M x D nor n x M numbers are ever held.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind_core.attribute import answer
from explaind_core.budget import readable_size
from explaind_core.decompose import StepDecomposition, decompose
from explaind_core.entries import HELD
from explaind_core.errors import QuestionError
from explaind_core.progress import counted
from explaind_core.quadrature import climb
from explaind_core.question import AXES, Question
from explaind_core.restrictions import Window, segments_of
from explaind_core.results import Frame
from explaind_core.reverse import feature_map, reduced
from explaind_core.run import Run
from explaind_core.second_moments import Moments
from explaind_core.stepwise import finite_values

__all__ = ["similarity"]

_OVER = ("step", "parameter", "train", "output")
Matrices = np.ndarray[Any, Any]


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

    Over steps and parameters (whatever else ``over`` has, but gradient_step) nothing is held but feature maps of some
    test samples and features of some training samples; on disk, in a temporary folder, a number for every step
    explained and parameter entry. Otherwise ``attribute`` is asked for the tensors, which must fit into ``memory``.

    Args:
        run, inputs, output, steps, train, layers, test: as for :func:`explaind_core.attribute`.
        over: the axes that the tensors are flattened over; all others are summed first, which is another question.
        per: axes with a matrix for each entry: ``"layer"``, or ``"step"`` (each window of steps, where they are named).
            Steps of a window are summed first, unless ``over`` has ``"step"``, too.
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
    over, per = _axes(over), _axes(per)
    flattened = tuple(axis for axis in AXES if axis != "test")
    repeated = len({*over}) < len(over) or len({*per}) < len(per)
    if not over or repeated or not {*over} <= {*flattened} or not {*per} <= {"layer", "step"}:
        raise QuestionError(
            "similarity cannot be taken like that",
            where="over, per",
            expected=f"over some of {flattened}, per some of ('layer', 'step')",
            got=(over, per),
        )
    question = Question.ask(
        run, inputs, keep=tuple({"test", *over, *per}), output=output, steps=steps, train=train, layers=layers,
        test=test, nodes=nodes, tolerance=tolerance, max_nodes=max_nodes, memory=memory,
    )  # fmt: skip
    windows = question.windows
    if "step" in over:  # windows say which steps share a matrix: the tensors have an entry for every step
        each = tuple(Window(s, (s,)) for s in question.steps)
        question = replace(question, windows=each, segments=segments_of(each, 1))
    rows = question.function.rows.numpy()
    labels: dict[str, list[Any]] = {
        "layer": [layer.name for layer in question.layers],
        "step": [window.name for window in windows],
    }
    matrices = math.prod(len(labels[axis]) for axis in per)
    # Products, norms and cosines.
    _check_fits(question, 3 * 8 * matrices * len(rows) ** 2, f"the matrices of {len(rows)} test samples")
    told_apart = all(len(window.steps) == 1 for window in question.windows) and "step" in question.keep
    if told_apart and "parameter" in over and "gradient_step" not in over:
        products, nodes_used, failed = _gram(question, windows, per, progress)
    else:
        products, nodes_used, failed = _asked(question, windows, over, per, progress)
    norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = products / (norms[..., :, None] * norms[..., None, :])
    attributes: dict[str, Any] = {
        "score": "cosine similarity (Definition 4.4)",
        "over": list(over),
        "summed_first": [a for a in AXES if a not in (*over, *per, "test")],
        "nodes_used": nodes_used,
        "steps_not_converged": failed,
    }
    if question.notes:
        attributes["sampled"] = "; ".join(question.notes)
    return xr.DataArray(
        cosine,
        dims=(*per, "test", "other"),
        coords={**{axis: labels[axis] for axis in per}, "test": rows, "other": rows},
        name="similarity",
        attrs=attributes | question.facts,
    )


def _axes(axes: Sequence[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _check_fits(question: Question, needed: int, what: str) -> None:
    if needed > question.memory:
        raise QuestionError(
            "the question does not fit into the memory budget",
            where=f"similarity, {what}",
            expected=f"at most {readable_size(question.memory)}",
            got=readable_size(needed),
            remedy="restrict layers= or test=, or raise memory=",
        )


# ---------------------------------------------------------------------- from the tensors themselves
def _asked(
    question: Question, windows: Sequence[Window], over: Sequence[str], per: tuple[str, ...], progress: bool
) -> tuple[Matrices, int, int]:
    """The inner products ``[*per, n, n]`` of tensors that ``attribute`` tells; the nodes used, the steps missed."""
    result = answer(question, progress=progress)
    if "nodes" in result:
        effort = int(result.nodes.sum()), int((~result.converged).sum())
    else:
        effort = result.attrs["nodes_used"], result.attrs["steps_not_converged"]
    if not {"step"} <= {*over} & {*per}:
        return (_flat_products(result.kernel, per), *effort)
    inner = tuple(axis for axis in per if axis != "step")
    parts = [_flat_products(result.kernel.sel(step=list(window.steps)), inner) for window in windows]
    return (np.stack(parts, per.index("step")), *effort)


def _flat_products(tensors: xr.DataArray, per: tuple[str, ...]) -> Matrices:
    values = tensors.transpose(*per, "test", ...).values.astype(np.float64)
    flat = values.reshape(*values.shape[: len(per) + 1], -1)
    products: Matrices = flat @ np.swapaxes(flat, -1, -2)
    return products


# ---------------------------------------------------------------------- by weighted Gram matrices
def _gram(
    question: Question, windows: Sequence[Window], per: tuple[str, ...], progress: bool
) -> tuple[Matrices, int, int]:
    """The inner products ``[*per, n, n]`` by weighted Gram matrices; the nodes used, the steps missed."""
    names = [n for n in question.run.parameters if any(n in layer.masks for layer in question.layers)]
    size = sum(question.run.parameters[n].shape.numel() for n in names) * question.function.dtype.itemsize
    passes = 0
    if question.splits_gradients:
        held = size * HELD
        _check_fits(question, 2 * held, "features of one training sample")
        assert question.train is not None
        entries = len(question.train.labels) if question.keeps("train") else 1
        passes = math.ceil(entries / (question.memory // 2 // held))
    _check_fits(question, 4 * size, "feature maps of one test sample")
    frame = Frame(question, "reverse")
    n = question.function.samples
    sizes = {"layer": len(question.layers), "step": len(windows)}
    total = np.zeros((*(size if axis in per else 1 for axis, size in sizes.items()), n, n))
    window_of = {s: w if "step" in per else 0 for w, window in enumerate(windows) for s in window.steps}
    work = passes * question.steps[-1] + len(question.steps)
    rung, nodes_used, failed = 0, 0, 0
    with (
        counted(work, "similarity", enabled=progress) as advance,
        Moments(question, names, passes, advance) as moments,
    ):
        for split in decompose(question.run, first=question.steps[0], last=question.steps[-1]):
            if split.step not in window_of:
                continue
            order, rung, converged = _order(question, split, frame.scale, rung)
            nodes_used, failed = nodes_used + order, failed + (not converged)
            parts = _step_gram(question, split, names, moments.of(split), order)
            for layer, part in enumerate(parts):
                total[layer if "layer" in per else 0, window_of[split.step]] += part
            advance(1)
    axes = [axis for axis in sizes if axis in per]
    found = total.reshape(*(sizes[axis] for axis in axes), n, n)
    return found if tuple(axes) == per else found.swapaxes(0, 1), nodes_used, failed


def _order(question: Question, split: StepDecomposition, scale: float, rung: int) -> tuple[int, int, bool]:
    """How many nodes a step needs, by forward mode along its displacement.

    Returns:
        Their number, where to start the next search, and whether the tolerance is met.
    """
    quadrature, function = question.quadrature, question.function
    if not quadrature.adaptive:
        return quadrature.ladder[0], 0, True
    before = finite_values(question, split.theta_before, split.step - 1)
    after = finite_values(question, split.theta, split.step)
    moved = {n: split.theta[n].double() - split.theta_before[n].double() for n in split.theta}

    def evaluate(q: int) -> tuple[Tensor, int]:
        total = torch.zeros_like(before)
        for t, weight in quadrature.points(q):
            point = {n: torch.lerp(split.theta_before[n], split.theta[n], t) for n in split.theta}
            total += weight * function.derivatives(point, [moved])[0]
        return reduced(total, question), q

    bound = quadrature.tolerance * scale
    climbed = climb(
        quadrature, rung, bound, reduced(before, question), reduced(after, question), evaluate, function.dtype
    )
    return climbed.best, climbed.rung, climbed.converged


def _step_gram(
    question: Question, split: StepDecomposition, names: list[str], weights: Mapping[str, Tensor], order: int
) -> list[Matrices]:
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
) -> Matrices:  # fmt: skip
    """``sum_j phi(x)_j diag(weights) phi(x')_j^T`` of two blocks of test samples within a layer: ``[n', n'']``."""
    total: Any = 0.0
    for name, mask in masks.items():
        if name in weights:
            root = weights[name].double().sqrt().reshape(-1)
            root = root if mask is None else root * mask.reshape(-1)
            size = float(root.max())
            if size > 0:
                a, one = _scaled(left[name], root / size)
                b, other = (a, one) if right is left else _scaled(right[name], root / size)
                total = total + ((a @ b.T).double() * (size * one * (size * other).T)).numpy()
    return np.asarray(total)


def _scaled(phi: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """``phi diag(root)`` by row, ``[n', J' d]``, divided by each row's largest entry, ``[n', 1]``.

    In single precision, the squares of small numbers are zero.
    """
    rows = (phi.flatten(2) * root.to(phi.dtype)).flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return rows.div_(largest), largest.double()
