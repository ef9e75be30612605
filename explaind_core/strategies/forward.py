"""Forward mode: a segment's update, layer by layer and term by term, pushed through the model.

For each step, ``phi_s(x) v`` for every tangent v = a layer's share of the kernel or regularization update,
and the residual against ``f(theta_s) - f(theta_{s-1})``, which two forward passes know exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition, Updates, term_names, updates_of
from explaind_core.derivatives import FunctionAtStep, Quadrature, climb
from explaind_core.errors import QuestionError
from explaind_core.questions import GRADIENT_AXES, Ends, Layer, Places, Question, WindowSum, reduced
from explaind_core.strategies.entry_features import EntryFeatures
from explaind_core.strategies.probe import Probe, timed
from explaind_core.strategies.stepwise import Stepwise, WalkedSegment, few_outputs
from explaind_core.strategies.strategy import Choice, run_bytes

__all__ = ["Forward", "StepContribution", "refine"]


#: Layers differentiated together: they share one forward pass, but drag each other's zeros along. Measured best at 3.
_TOGETHER = 3
#: ... unless their tangents, filled up with zeros, would take more than this many elements.
_TOGETHER_ELEMENTS = 2**24


@dataclass(frozen=True)
class StepContribution:
    """What one step added to the explained function. Arrays are float64.

    Attributes:
        step: s.
        terms: term -> ``[layers, n, J]``.
        rest: what the layers leave out, ``[n, J]``, None if nothing.
        residual: ``change - sum of all terms``, ``[n, J]``, where change is ``f(theta_s) - f(theta_{s-1})``.
        before: ``f(theta_{s-1})``.
        after: ``f(theta_s)``.
        nodes: the order used.
        evaluations: nodes evaluated, refinements included.
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


class Forward(Stepwise):
    """f along every (layer, term, entry): cheapest where all outputs are kept and training samples are summed."""

    name = "forward"
    derivatives_are = "tangents"

    def refuses(self, question: Question) -> QuestionError | None:
        """A tangent for every single parameter is no way."""
        if not question.keeps("parameter"):
            return None
        return self.cannot("keep single parameters", "keep layers, or say strategy='reverse'")

    def holds(self, question: Question, outputs: int) -> Choice:  # noqa: ARG002
        """One tangent at a time."""
        return Choice(self, question.function.samples, 1, 1, "", 0, 2 * run_bytes(question))

    def work(self, question: Question, outputs: int) -> float | None:
        """Two forward passes and more for every layer and term; entries of gradients would make too many."""
        if any(question.keeps(axis) for axis in GRADIENT_AXES):
            return None
        if not question.splits_gradients and few_outputs(question, outputs):
            return None
        return 2 * 2 * len(question.layers)

    def derivatives(self, question: Question, outputs: int) -> int:  # noqa: ARG002
        """The tangents: all terms of all layers, the kernel's entries each counted as one, and what is left out."""
        return len(question.layers) * _terms(question) + (question.rest is not None)

    def scale(self, question: Question, ends: Ends) -> float:  # noqa: ARG002
        """All test samples and outputs are told apart on the way, whether they are kept or not."""
        return float(ends.change.abs().max())

    def node_seconds(self, probe: Probe) -> float:
        """For all layers, terms and entries."""
        function, theta = probe.function, probe.split.theta
        count = _terms(probe.question)

        def node() -> None:
            for layer in probe.question.layers:
                share = layer.share({n: t.double() for n, t in theta.items()})
                function.derivatives(theta, [share] * count)

        return timed(node)

    def add(self, question: Question, places: Places, total: WindowSum, walked: WalkedSegment, rung: int) -> int:
        """Push every layer's share of every term, or entry, through the model."""
        del places
        updates = updates_of(walked.split, walked.names)
        keys: list[str] = list(walked.names)
        if walked.features is not None:
            del updates["kernel"]
            count = len(next(iter(walked.features.values()), ()))
            updates |= {f"kernel/{e}": {n: h[e] for n, h in walked.features.items()} for e in range(count)}
            keys = list(updates)
        found, rung = refine(
            walked.function, walked.split, keys, question.layers, question.rest, (walked.before, walked.after),
            question.quadrature, walked.bound, rung, updates=updates,
        )  # fmt: skip
        for key, term in found.terms.items():
            _add_term(question, total, key, term)
        if found.rest is not None:
            total.omitted += reduced(found.rest, question)
        total.count(nodes=found.nodes, evaluations=found.evaluations, converged=found.converged)
        return rung


def _terms(question: Question) -> int:
    """The terms that are derived along, the kernel's entries each counted as one."""
    names = term_names(question.run)
    return len(names) + (EntryFeatures(question, Places(question).names).count - 1 if question.splits_gradients else 0)


def _add_term(question: Question, total: WindowSum, key: str, term: Tensor) -> None:
    """Put ``[layers, n, J]`` of a term, or of the kernel's entry ``"kernel/e"``, in its place."""
    steps, entries = total.terms["kernel"].shape[0], total.terms["kernel"].shape[3]
    name, _, entry = key.partition("/")
    for axis, kept in ((1, "test"), (2, "output")):
        if not question.keeps(kept):
            term = term.sum(axis, keepdim=True)
    i, t = divmod(int(entry or 0), entries)
    behind = int(entry or 0) - steps * entries
    if behind == 0 and question.restricts_gradients:  # what is not asked for
        total.omitted += term.sum(0)
    elif behind >= 0:
        total.terms["unattributed"][0, :, 0, 0] += term
    else:
        total.terms[name][i, :, 0, t] += term


@dataclass(frozen=True)
class _Tangents:
    """Groups of tangents; the members of a group are differentiated together."""

    groups: list[list[tuple[int, str]]]
    vectors: list[list[dict[str, Tensor]]]


def refine(
    function: FunctionAtStep,
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
        function: f where the segment begins.
        split: its update.
        names: the terms.
        layers: what is told apart.
        rest: what the layers leave out, None for nothing.
        values: f at both ends.
        quadrature: the nodes.
        bound: what the residual may be at most.
        rung: where the search for the order starts.
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
    function: FunctionAtStep,
    split: StepDecomposition,
    tangents: _Tangents,
    points: Sequence[tuple[float, float]],
    shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """``sum_j w_j Df(theta_{s-1} + t_j Delta_s)[v]`` for all tangents: term -> ``[layers, n, J]``."""
    parts: dict[str, Tensor] = {}
    for t, weight in points:
        point = function.on_device({n: torch.lerp(split.theta_before[n], split.theta[n], t) for n in split.theta})
        for keys, vectors in zip(tangents.groups, tangents.vectors, strict=True):
            for (index, name), derivative in zip(keys, function.derivatives(point, vectors), strict=True):
                part = parts.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                part[index] += weight * derivative
    return parts
