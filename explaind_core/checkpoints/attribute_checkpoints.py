r"""A run of which only sparse checkpoints exist: no data, no optimizer, the parameters every now and then.

Between consecutive checkpoints theta_a and theta_b the path is taken to be straight, so what they differ by is one
segment (a chord), split by layer. For each segment::

    f(theta_b; x) - f(theta_a; x) = sum over layers of change_layer(x) + residual(x)
    change_layer(x) = integral_0^1 df/dtheta(theta_a + t (theta_b - theta_a); x) dt  (theta_b - theta_a)_layer

This closes exactly for any two points; how training really went between them is not known, so there is neither a train
axis nor a split into kernel and regularization.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from explaind_core.checkpoints.state_dicts import Checkpoints, StateDict
from explaind_core.copies import plain_copy, without_backward_hooks
from explaind_core.decomposition import StepDecomposition, UpdateSplit
from explaind_core.derivatives import ExplainedFunction, FunctionAtStep, Quadrature, as_output, examine
from explaind_core.errors import NonFiniteError, QuestionError
from explaind_core.naming import plain_name
from explaind_core.progress import track
from explaind_core.questions import Layer, LayerSpec, resolve_layers
from explaind_core.results import COUNTS, totals
from explaind_core.strategies import StepContribution, refine
from explaind_core.training_step import LossFunction, ParameterInfo

__all__ = ["AXES", "attribute_checkpoints"]

#: The axes that checkpoints alone can tell apart, in the order of a result's dimensions.
AXES = ("step", "layer", "test", "output")


def attribute_checkpoints(
    checkpoints: str | os.PathLike[str] | Sequence[StateDict | str | os.PathLike[str]],
    model: nn.Module,
    inputs: Any,
    *,
    keep: Sequence[str] = AXES,
    output: Any = None,
    layers: LayerSpec | None = None,
    labels: Sequence[int | str] | None = None,
    nodes: int | str = "adaptive",
    tolerance: float = 1e-3,
    max_nodes: int = 32,
    buffers: StateDict | None = None,
    loss: LossFunction | None = None,
    random_state: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Split the change of predictions between checkpoints into what each segment and layer added.

    ``f(theta_last; x) = f(theta_first; x) + sum over segments of (sum over layers of change(x) + residual(x))``, a
    segment being the straight line from one checkpoint to the next.

    Args:
        checkpoints: state dicts in order, or paths of safetensors files in order; or a folder of safetensors files,
            whose names differ in one number that tells the order; or a store that
            :func:`explaind_core.import_checkpoints` made. All are read and checked before any work is done,
            then read again where they are needed: at most two are held at a time.
        model: the architecture. It is copied: its weights are never read nor changed.
        inputs: the n test samples: a tensor, or a tuple (positional arguments) or dict (keywords) of tensors.
        keep: the axes to keep, any subset of step, layer, test, output; all others are summed.
        output: what is explained (see :func:`explaind_core.attribute`).
        layers: as in :func:`explaind_core.attribute`.
        labels: of the checkpoints, one each; by default the number in the file's name, or the position in the list.
        nodes: quadrature nodes per segment, ``"adaptive"``, ``"left"`` or ``"midpoint:q"``.
        tolerance: adaptive only: the largest residual of a segment, as a fraction of the largest change of an output
            from the first checkpoint to the last.
        max_nodes: adaptive only: the most nodes a segment may get; one that misses the tolerance is marked.
        buffers: buffers to hold the model at (running statistics); those of the last checkpoint by default.
        loss: the loss function that ``Loss(targets)`` is taken of.
        random_state: as in :func:`explaind_core.attribute`: a seed that every evaluation begins with, of a model that
            draws random numbers in evaluation mode, too.
        progress: show a bar with the remaining time.

    Returns:
        A Dataset over the kept axes: ``change``, the one term; ``residual`` and ``omitted`` (what layers not asked for
        added) over (step, test, output) as far as kept; ``initial`` and ``final`` over (test, output) as far as kept;
        ``nodes``, ``evaluations`` and ``converged`` over step. A segment is labelled ``step`` by the checkpoint that
        it leads to, and ``from`` by the one that it comes from.

    Raises:
        StoreError: a file is missing, damaged or not a safetensors file; a checkpoint does not fit the model.
        NonFiniteError: a checkpoint, or the explained function at one, is not finite.
        QuestionError, LayerError: an argument makes no sense; fewer than two checkpoints.

    Example:
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=6)
        >>> thetas, inputs = [run.theta(s) for s in (0, 2, 6)], torch.ones(2, 4, dtype=torch.float64)
        >>> result = attribute_checkpoints(thetas, run.model, inputs, labels=[0, 2, 6], progress=False)
        >>> dict(result.change.sizes), result["from"].values.tolist(), result.step.values.tolist()
        ({'step': 2, 'layer': 2, 'test': 2, 'output': 3}, [0, 2], [2, 6])
        >>> explained = result.initial + result.change.sum(("step", "layer")) + result.residual.sum("step")
        >>> bool(abs(explained - result.final).max() < 1e-12)
        True
    """
    kept, quadrature = _check_keep(keep), Quadrature(nodes, tolerance, max_nodes)
    named, model = partial(plain_name, model=model), without_backward_hooks(plain_copy(model)).eval()
    points = Checkpoints.of(checkpoints, labels, model, buffers, named)
    resolved, rest = resolve_layers(layers, points.parameters, model)
    if "layer" not in kept:
        resolved = (_complement(rest, points.parameters),)
    explained = ExplainedFunction(
        model.requires_grad_(False), points.buffers, inputs, as_output(output, loss), random_state=random_state
    )
    function = explained.at()
    examine(function, points.theta(0), function, points.theta(-1))
    edges = [_values(function, points.theta(index), points.labels[index]) for index in (0, -1)]
    frame = _Frame(kept, [layer.name for layer in resolved], edges[0], edges[1])
    bound = quadrature.tolerance * float((frame.final - frame.initial).abs().max())
    segments = _segments(points, function, resolved, rest, quadrature, bound)
    for part in track(segments, len(points.labels) - 1, "attributing", enabled=progress):
        frame.add(part)
    attributes = {
        "sign": "a contribution is what is added to the output (the negative of the paper's psi)",
        "closes": "initial + sum(change) + sum(residual) + sum(omitted) == final",
        "terms": "layer x segment of the straight path from checkpoint to checkpoint: no train axis, no optimizer",
        "dtype": str(function.dtype),
        "output": type(explained.output).__name__,
        "first_step": points.labels[0],
        "last_step": points.labels[-1],
        "layers_restricted": int(rest is not None),
        "nodes_asked": str(quadrature.nodes),
        "tolerance": quadrature.tolerance if quadrature.adaptive else float("nan"),
    }
    if random_state is not None:
        attributes["random_state"] = random_state
    if explained.together:
        attributes["test_samples_together"] = "test samples are coupled: all that were given pass the model together"
    attributes["derivatives"] = explained.differentiator.way
    return frame.collect(points.labels, attributes)


# ---------------------------------------------------------------------- computing
def _values(function: FunctionAtStep, theta: StateDict, label: int | str) -> Tensor:
    values = function.values(theta)
    if not torch.isfinite(values).all():
        raise NonFiniteError("the explained function is NaN or infinite", where=f"checkpoint {label}")
    return values


def _segments(
    points: Checkpoints,
    function: FunctionAtStep,
    layers: Sequence[Layer],
    rest: Layer | None,
    quadrature: Quadrature,
    bound: float,
) -> Iterator[StepContribution]:
    theta = points.theta(0)
    before, rung = _values(function, theta, points.labels[0]), 0
    for index in range(1, len(points.labels)):
        following = points.theta(index)
        after = _values(function, following, points.labels[index])
        moved = {n: following[n].double() - theta[n].double() for n in points.parameters}
        split = StepDecomposition(
            step=index,
            updates={n: UpdateSplit(d, d.new_zeros(()).expand_as(d), None, d) for n, d in moved.items()},
            theta_before=theta,
            theta=following,
            error=0.0,
            rounding=0.0,
            drift=0.0,
        )
        part, rung = refine(
            function, split, ("change",), layers, rest, (before, after), quadrature, bound, rung, {"change": moved}
        )
        yield part
        theta, before = following, after


def _complement(rest: Layer | None, parameters: Mapping[str, ParameterInfo]) -> Layer:
    """All layers asked for, as one: what ``rest`` leaves."""
    left: Mapping[str, Tensor | None] = {} if rest is None else rest.masks
    masks: dict[str, Tensor | None] = {n: None for n in parameters if n not in left}
    return Layer("all", masks | {n: 1 - mask for n, mask in left.items() if mask is not None})


@dataclass
class _Frame:
    """Adds segments up to a result; sums over axes that are not kept are taken at once, in float64."""

    kept: tuple[str, ...]
    layers: Sequence[str]
    initial: Tensor
    final: Tensor

    def __post_init__(self) -> None:
        self.rows: dict[str, list[np.ndarray[Any, Any]]] = {"change": [], "residual": [], "omitted": []}
        self.counts: dict[str, list[Any]] = {name: [] for name in ("nodes", "evaluations", "converged", "missed")}

    def add(self, part: StepContribution) -> None:
        """One segment."""
        omitted = torch.zeros_like(part.residual) if part.rest is None else part.rest
        for name, value in (("change", part.terms["change"]), ("residual", part.residual), ("omitted", omitted)):
            reduced, rows = self._reduced(value), self.rows[name]
            if "step" in self.kept or not rows:
                rows.append(reduced)
            else:
                rows[0] = rows[0] + reduced
        found = (part.nodes, part.evaluations, part.converged, not part.converged)
        for numbers, number in zip(self.counts.values(), found, strict=True):
            numbers.append(number)

    def _reduced(self, values: Tensor) -> np.ndarray[Any, Any]:
        """Sum over the axes that are not kept; ``values`` has the last two or three of them."""
        axes = AXES[-values.ndim :]
        gone = tuple(index for index, axis in enumerate(axes) if axis not in self.kept)
        result: np.ndarray[Any, Any] = (values.sum(gone) if gone else values).numpy()
        return result

    def collect(self, labels: Sequence[int | str], attributes: dict[str, Any]) -> xr.Dataset:
        """The result of all segments."""
        plain = tuple(axis for axis in self.kept if axis != "layer")
        edges = tuple(axis for axis in plain if axis != "step")
        variables: dict[str, Any] = {
            name: (self.kept if name == "change" else plain, np.stack(rows) if "step" in self.kept else rows[0])
            for name, rows in self.rows.items()
        }
        variables |= {"initial": (edges, self._reduced(self.initial)), "final": (edges, self._reduced(self.final))}
        names = {
            "step": list(labels[1:]), "layer": list(self.layers), "test": np.arange(len(self.initial)),
            "output": np.arange(self.initial.shape[1]),
        }  # fmt: skip
        coordinates: dict[str, Any] = {axis: names[axis] for axis in self.kept}
        if "step" in self.kept:
            coordinates["from"] = ("step", list(labels[:-1]))
            kept = {name: COUNTS[name].array(values) for name, values in self.counts.items() if COUNTS[name].along_step}
            variables |= {name: ("step", values) for name, values in kept.items()}
        else:
            attributes |= totals(self.counts)
        return xr.Dataset(variables, coords=coordinates, attrs=attributes)


def _check_keep(keep: Sequence[str]) -> tuple[str, ...]:
    axes = (keep,) if isinstance(keep, str) else tuple(keep)
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise QuestionError(
            f"checkpoints alone have no axis {unknown[0]!r}",
            where="keep",
            expected=f"a subset of {AXES}",
            got=axes,
            remedy="record the training (explaind.Recorder) to tell samples and gradients apart",
        )
    if len(set(axes)) < len(axes):
        raise QuestionError("an axis is named twice", where="keep", got=axes)
    return tuple(axis for axis in AXES if axis in axes)
