r"""Similarity of predictions: the cosine of their influence tensors (paper, Definition 4.4).

Over steps, parameters, training samples and outputs the inner product of two tensors is a weighted Gram matrix,

    sum_s sum_j  phi_s(x)_j  diag( sum_k h_{s,k}^2 )  phi_s(x')_j^T,      h_{s,k} = sum_i alpha_{s,i} P_s E_i g_{i,k},

in which the train axis is one vector of second moments a step: neither M x D nor n x M numbers are ever held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self, TypedDict, Unpack, cast

import numpy as np
import xarray as xr

from explaind_core.attribution import answer
from explaind_core.errors import QuestionError
from explaind_core.questions import (
    AXES,
    Argument,
    CommonArguments,
    Findings,
    Question,
    Window,
    check_fits,
    segments_of,
    spelled_out,
)
from explaind_core.run import Run
from explaind_core.scores.grams import InnerProducts, gram
from explaind_core.strategies import Matrices, cosines

__all__ = ["Asked", "SimilarityArguments", "similarity"]

_OVER = ("step", "parameter", "train", "output")


class PairArguments(TypedDict, total=False):
    """What pairs of predictions are compared in."""

    over: Annotated[Sequence[str], Argument(_OVER, (
        "the axes that the tensors are flattened over; all others are summed first, which is another question."
    ))]  # fmt: skip
    per: Annotated[Sequence[str], Argument((), (
        'axes with a matrix for each entry: ``"layer"``, or ``"step"`` (each window of steps, where they are named). '
        'Steps of a window are summed first, unless ``over`` has ``"step"``, too.'
    ))]  # fmt: skip


class SimilarityArguments(PairArguments, CommonArguments, total=False):
    """What similarities are asked with."""


@spelled_out
def similarity(
    run: Run, inputs: Any, *, progress: bool = True, **arguments: Unpack[SimilarityArguments]
) -> xr.DataArray:
    """``cos(T(x), T(x'))`` of the kernel's influence tensors of all pairs of test samples (paper, Definition 4.4).

    Over steps and parameters (whatever else ``over`` has, but gradient_step) nothing is held but feature maps of some
    test samples and features of some training samples; on disk, in a temporary folder, a number for every step
    explained and parameter entry. Otherwise ``attribute`` is asked for the tensors, which must fit into ``memory``.

    Args:
        run: a run opened with its model.
        inputs: the n test samples, as for :func:`explaind_core.attribute`.
        progress: show a bar with the remaining time.
        memory: the most that feature maps and per-sample features may take; more of it means fewer passes.
        **arguments: see :class:`SimilarityArguments`; adaptive orders are those of f's change along the step.

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
    asked = Asked.ask(run, inputs, **arguments)
    question, rows = asked.question, asked.question.function.rows.numpy()
    if asked.by_gram:
        found = gram(question, asked.windows, asked.per, progress)
    else:
        found = _asked(question, asked.windows, asked.over, asked.per, progress)
    attributes: dict[str, Any] = {
        "score": "cosine similarity (Definition 4.4)",
        "over": list(asked.over),
        "summed_first": [a for a in AXES if a not in (*asked.over, *asked.per, "test")],
        "nodes_used": found.nodes_used,
        "steps_not_converged": found.missed,
    }
    if question.notes:
        attributes["sampled"] = "; ".join(question.notes)
    return xr.DataArray(
        cosines(found.products),
        dims=(*asked.per, "test", "other"),
        coords={**asked.labels, "test": rows, "other": rows},
        name="similarity",
        attrs=attributes | found.findings.attributes(),
    )


# ---------------------------------------------------------------------- the question
@dataclass(frozen=True)
class Asked:
    """A question for similarities, checked.

    Attributes:
        question: for the tensors.
        windows: as named; those of the question are single steps where steps are flattened.
        over: see :func:`similarity`.
        per: see :func:`similarity`.
    """

    question: Question
    windows: tuple[Window, ...]
    over: tuple[str, ...]
    per: tuple[str, ...]

    @classmethod
    @spelled_out
    def ask(cls, run: Run, inputs: Any, **arguments: Unpack[SimilarityArguments]) -> Self:
        """Check the axes, and that what is held whatever happens fits into the memory.

        Args:
            run: a run opened with its model.
            inputs: the test samples.
            **arguments: see :class:`SimilarityArguments`.
        """
        over, per = _axes(arguments["over"]), _axes(arguments["per"])
        flattened = tuple(axis for axis in AXES if axis != "test")
        repeated = len({*over}) < len(over) or len({*per}) < len(per)
        if not over or repeated or not {*over} <= {*flattened} or not {*per} <= {"layer", "step"}:
            raise QuestionError(
                "similarity cannot be taken like that",
                where="over, per",
                expected=f"over some of {flattened}, per some of ('layer', 'step')",
                got=(over, per),
            )
        rest = {name: value for name, value in arguments.items() if name in CommonArguments.__annotations__}
        kept = tuple({"test", *over, *per})
        question = Question.ask(run, inputs, keep=kept, **cast("CommonArguments", rest))
        windows = question.windows
        if "step" in over:  # windows say which steps share a matrix: the tensors have an entry for every step
            each = tuple(Window(s, (s,)) for s in question.steps)
            question = replace(question, windows=each, segments=segments_of(each, 1))
        asked = cls(question, windows, over, per)
        n = question.function.samples
        check_fits(
            question.memory, asked.held, f"similarity, the matrices of {n} test samples",
            "restrict layers= or test=, or raise memory=",
        )  # fmt: skip
        return asked

    @property
    def labels(self) -> dict[str, list[Any]]:
        """Of the axes with a matrix for each entry."""
        labels: dict[str, list[Any]] = {
            "layer": [layer.name for layer in self.question.layers],
            "step": [window.name for window in self.windows],
        }
        return {axis: labels[axis] for axis in self.per}

    @property
    def held(self) -> int:
        """Bytes of products, norms and cosines."""
        matrices = math.prod(len(labels) for labels in self.labels.values())
        return 3 * 8 * matrices * self.question.function.samples**2

    @property
    def by_gram(self) -> bool:
        """Whether weighted Gram matrices answer it: over single steps and parameters."""
        question = self.question
        told_apart = all(len(window.steps) == 1 for window in question.windows) and "step" in question.keep
        return told_apart and "parameter" in self.over and "gradient_step" not in self.over


def _axes(axes: Sequence[str]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


# ---------------------------------------------------------------------- from the tensors themselves
def _asked(
    question: Question, windows: Sequence[Window], over: Sequence[str], per: tuple[str, ...], progress: bool
) -> InnerProducts:
    """The inner products of tensors that ``attribute`` tells."""
    result = answer(question, progress=progress)
    findings = Findings.of(result.attrs)
    if "nodes" in result:
        effort = int(result.nodes.sum()), int((~result.converged).sum())
    else:
        effort = result.attrs["nodes_used"], result.attrs["steps_not_converged"]
    if not {"step"} <= {*over} & {*per}:
        return InnerProducts(_flat_products(result.kernel, per), *effort, findings)
    inner = tuple(axis for axis in per if axis != "step")
    parts = [_flat_products(result.kernel.sel(step=list(window.steps)), inner) for window in windows]
    return InnerProducts(np.stack(parts, per.index("step")), *effort, findings)


def _flat_products(tensors: xr.DataArray, per: tuple[str, ...]) -> Matrices:
    values = tensors.transpose(*per, "test", ...).values.astype(np.float64)
    flat = values.reshape(*values.shape[: len(per) + 1], -1)
    products: Matrices = flat @ np.swapaxes(flat, -1, -2)
    return products
