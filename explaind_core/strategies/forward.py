"""Forward mode: a segment's update, layer by layer and term by term, pushed through the model.

For each step, ``phi_s(x) v`` for every tangent v = a layer's share of the kernel or regularization update,
and the residual against ``f(theta_s) - f(theta_{s-1})``, which two forward passes know exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition, Updates, updates_of
from explaind_core.derivatives import ExplainedFunction, Quadrature, climb
from explaind_core.questions import Layer

__all__ = ["StepContribution", "refine"]


#: Layers differentiated together: they share one forward pass, but drag each other's zeros along. Measured best at 3.
_TOGETHER = 3
#: ... unless their tangents, filled up with zeros, would take more than this many elements.
_TOGETHER_ELEMENTS = 2**24


@dataclass(frozen=True)
class StepContribution:
    """What one step added to the explained function. Arrays are float64.

    Attributes:
        step: s. terms: term -> ``[layers, n, J]``. rest: what the layers leave out, ``[n, J]``, None if nothing.
        residual: ``change - sum of all terms``, ``[n, J]``. change: ``f(theta_s) - f(theta_{s-1})``.
        before: ``f(theta_{s-1})``. after: ``f(theta_s)``.
        nodes: the order used. evaluations: nodes evaluated, refinements included.
        converged: whether the residual met the tolerance (always True for a fixed number of nodes).
        update_error: the declared update's relative distance from the recorded one (see decompose).
        correction: the size of the rank-one secants relative to the update (see decompose).
    """

    step: int
    terms: Mapping[str, Tensor]
    rest: Tensor | None
    residual: Tensor
    before: Tensor
    after: Tensor
    nodes: int
    evaluations: int
    converged: bool
    update_error: float
    correction: float


@dataclass(frozen=True)
class _Tangents:
    """Groups of tangents; the members of a group are differentiated together."""

    groups: list[list[tuple[int, str]]]
    vectors: list[list[dict[str, Tensor]]]


def refine(
    function: ExplainedFunction,
    split: StepDecomposition,
    names: Sequence[str],
    layers: Sequence[Layer],
    rest: Layer | None,
    values: tuple[Tensor, Tensor],
    quadrature: Quadrature,
    bound: float,
    rung: int,
    updates: Mapping[str, Updates] | None = None,
) -> tuple[StepContribution, int]:
    """What one step added, with the order that meets ``bound`` (see :func:`explaind_core.derivatives.climb`).

    Args:
        names: the terms. values: f at both ends. rung: where the search for the order starts.
        updates: term -> parameter name -> its share of the update; those of ``split`` by default.
    """
    before, after = values
    change = after - before
    tangents = _tangents(updates_of(split, names) if updates is None else updates, split, layers, rest)

    def evaluate(q: int) -> tuple[Tensor, dict[str, Tensor]]:
        parts = _integrate(function, split, tangents, quadrature.points(q), (len(layers), *change.shape))
        return sum((part.sum(0) for part in parts.values()), torch.zeros_like(change)), parts

    climbed = climb(quadrature, rung, bound, before, after, evaluate, function.dtype)
    best = climbed.best
    rest_part = best.pop("(rest)", None)
    terms = {name: best.get(name, torch.zeros((len(layers), *change.shape), dtype=torch.float64)) for name in names}
    left = None if rest is None else (torch.zeros_like(change) if rest_part is None else rest_part.sum(0))
    total = sum((part.sum(0) for part in terms.values()), torch.zeros_like(change) if left is None else left)
    contribution = StepContribution(
        step=split.step,
        terms=terms,
        rest=left,
        residual=change - total,
        before=before,
        after=after,
        nodes=climbed.nodes,
        evaluations=climbed.evaluations,
        converged=climbed.converged,
        update_error=split.error,
        correction=split.correction,
    )
    return contribution, climbed.rung


def _tangents(
    updates: Mapping[str, Updates], split: StepDecomposition, layers: Sequence[Layer], rest: Layer | None
) -> _Tangents:
    """The tangents that are not zero, some neighbouring layers in a group."""
    groups: list[list[tuple[int, str]]] = []
    vectors: list[list[dict[str, Tensor]]] = []
    together = size = 0
    for index, layer in enumerate(layers):
        shares = {name: layer.share(update) for name, update in updates.items()}
        shares = {name: share for name, share in shares.items() if any(bool(t.any()) for t in share.values())}
        if not shares:
            continue
        size += sum(t.numel() for share in shares.values() for t in share.values())
        if not groups or together == _TOGETHER or size * len(groups[-1]) > _TOGETHER_ELEMENTS:
            groups.append([])
            vectors.append([])
            together = size = 0
        groups[-1] += [(index, name) for name in shares]
        vectors[-1] += shares.values()
        together += 1
    if rest is not None:
        share = rest.share({n: u.declared for n, u in split.updates.items()})
        if any(bool(t.any()) for t in share.values()):
            groups.append([(0, "(rest)")])
            vectors.append([share])
    return _Tangents(groups, vectors)


def _integrate(
    function: ExplainedFunction,
    split: StepDecomposition,
    tangents: _Tangents,
    points: Sequence[tuple[float, float]],
    shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """``sum_j w_j Df(theta_{s-1} + t_j Delta_s)[v]`` for all tangents: term -> ``[layers, n, J]``."""
    parts: dict[str, Tensor] = {}
    for t, weight in points:
        point = function.at({n: torch.lerp(split.theta_before[n], split.theta[n], t) for n in split.theta})
        for keys, vectors in zip(tangents.groups, tangents.vectors, strict=True):
            for (index, name), derivative in zip(keys, function.derivatives(point, vectors), strict=True):
                part = parts.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                part[index] += weight * derivative
    return parts
