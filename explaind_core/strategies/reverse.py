"""Reverse mode: a segment's feature maps phi by backward passes, and their products with updates, entry by entry.

One backward pass per (test sample, output) as far as these axes are kept gives a row of phi, which is contracted with
every term at once: over layers, over single parameters, over the entries of forward-time features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition, updates_of
from explaind_core.derivatives import FunctionAtStep, climb, slices
from explaind_core.errors import QuestionError
from explaind_core.questions import Places, Question, WindowSum, reduced
from explaind_core.strategies.entry_features import EntryFeatures
from explaind_core.strategies.gram_products import gram_products
from explaind_core.strategies.probe import PROBED, Probe, timed
from explaind_core.strategies.stepwise import Stepwise, WalkedSegment, few_outputs, passes_together
from explaind_core.strategies.strategy import Choice, run_bytes
from explaind_core.tensors import flattened

__all__ = ["Products", "Reverse", "feature_map", "products", "rest_change", "row_bytes", "second_moments"]

Points = tuple[tuple[float, float], ...]
#: Rows of features that are squared at a time.
_SQUARED = 16


def feature_map(
    question: Question,
    function: FunctionAtStep,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    names: list[str],
    block: slice,
    points: Points,
    columns: slice = slice(None),
) -> dict[str, Tensor]:
    """``phi(x) = sum_j w_j df/dtheta(before + t_j (after - before); x)``: name -> ``[n', J', *shape]``.

    Args:
        question: which axes are kept.
        function: f where the segment begins.
        before: theta there.
        after: theta where it ends.
        names: the parameters with respect to which.
        block: of the test samples.
        points: t_j and w_j.
        columns: of which outputs, all by default.
    """
    phi: dict[str, Tensor] = {}
    for t, weight in points:
        point = {n: torch.lerp(before[n], after[n], t) for n in before}
        gradients = function.jacobian(
            point,
            names,
            block,
            sum_test=not question.keeps("test"),
            sum_outputs=not question.keeps("output"),
            columns=columns,
        )
        for n, g in gradients.items():
            part = g.cpu() if weight == 1 else g.cpu() * weight
            phi[n] = part if n not in phi else phi[n] + part
    return phi


def rest_change(
    function: FunctionAtStep,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    share: Mapping[str, Tensor],
    points: Points,
    block: slice | None = None,
) -> Tensor:
    """What the parameters outside all layers added, by forward mode: ``[n, J]``, of all test samples or a block."""
    block = slice(0, function.samples) if block is None else block
    total = torch.zeros((block.stop - block.start, function.outputs), dtype=torch.float64)
    if not any(bool(t.any()) for t in share.values()):
        return total
    for t, weight in points:
        point = {n: torch.lerp(before[n], after[n], t) for n in before}
        total = total + weight * function.derivatives(point, [share], block)[0]
    return total


@dataclass
class Products:
    """What phi was multiplied with, over ``[I', L', P', T', n', J']`` (see :class:`WindowSum`).

    ``kernel`` is the sum over all gradients, whatever is asked for: ``[n', J']``. ``gram`` is ``[L', n, n]`` where the
    question wants it: inner products over parameters and entries.
    """

    terms: dict[str, Tensor]
    others: Tensor
    rest: Tensor
    kernel: Tensor = field(default_factory=lambda: torch.zeros(()))
    gram: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Everything that the segment's declared update adds: ``[n', J']``."""
        total = self.rest + self.kernel
        for name, term in self.terms.items():
            if name not in ("kernel", "unattributed"):  # of which ``kernel`` is the sum
                total = total + term.sum(tuple(range(term.ndim - 2)))
        return total


def products(
    question: Question,
    function: FunctionAtStep,
    places: Places,
    split: StepDecomposition,
    names: tuple[str, ...],
    features: Mapping[str, Tensor] | None,
    blocks: list[slice],
    points: Points,
    shapes: Mapping[str, torch.Size],
) -> Products:
    """All products of one segment, block by block of test samples.

    Args:
        question: the question.
        function: f where the segment begins.
        places: of its parameters.
        split: the segment's update.
        names: the terms.
        features: forward-time features ``[entries, *shape]`` in place of the kernel, the last entry being what is not
            asked for where gradients are restricted.
        blocks: of test samples.
        points: of the quadrature, with their weights.
        shapes: of the terms.
    """
    terms = {n: torch.zeros(shape, dtype=torch.float64) for n, shape in shapes.items()}
    edge = next(iter(shapes.values()))[-2:]
    others, kernel = torch.zeros(edge, dtype=torch.float64), torch.zeros(edge, dtype=torch.float64)
    updates = updates_of(split, names)
    gram: Tensor | None = None
    for block in blocks:
        rows = block if question.keeps("test") else slice(0, 1)
        phi = feature_map(question, function, split.theta_before, split.theta, places.names, block, points)
        for name, gradient in phi.items():
            flat = flattened(gradient, 2)  # [n', J', d]
            exact = flat.double()
            for term in names:
                if name not in updates[term]:
                    continue
                update = updates[term][name].reshape(-1)
                for position, _, mask in places.of(name):
                    share = update if mask is None else update * mask.reshape(-1)
                    if term == "kernel":
                        kernel[rows] += exact @ share.double()
                    if term == "kernel" and features is not None:
                        continue
                    _add(terms[term], 0, 0, position, exact * share if question.keeps("parameter") else exact @ share,
                         rows, question, places, name, mask)  # fmt: skip
            if features is not None and name in features:
                _add_features(question, places, terms, others, flat, features[name], name, rows)
        if question.gram and features is not None:  # all test samples are in one block then
            weights = second_moments(features, math.prod(shapes["kernel"][i] for i in (0, 3)))
            parts = [gram_products(phi, phi, weights, layer.masks) for layer in question.layers]
            gram = torch.stack([torch.from_numpy(part) for part in parts])
    rest = torch.zeros(edge, dtype=torch.float64)
    if question.rest is not None:
        outside = question.rest.share({n: u.declared for n, u in split.updates.items()})
        values = rest_change(function, split.theta_before, split.theta, outside, points)
        rest = rest + reduced(values, question)
    return Products(terms, others, rest, kernel, gram)


def second_moments(features: Mapping[str, Tensor], entries: int) -> dict[str, Tensor]:
    """``sum_e h_e^2`` over the first ``entries``: name -> float64 of the parameter's shape."""
    found = {}
    for name, h in features.items():
        flat = flattened(h[:entries], 1)
        total = torch.zeros(flat.shape[1], dtype=torch.float64)
        for rows in slices(len(flat), _SQUARED):  # a few rows at a time stay in the processor's cache
            total += flat[rows].double().square_().sum(0)
        found[name] = total.reshape(h.shape[1:])
    return found


class Reverse(Stepwise):
    """Every (test sample, output) backwards: cheapest where parameters are kept, or few outputs."""

    name = "reverse"

    def refuses(self, question: Question) -> QuestionError | None:
        """The update of a step says nothing of the gradients that it is made of."""
        if not question.splits_gradients:
            return None
        return self.cannot(
            "tell gradients apart by step or training sample", "say strategy='features' or 'adjoint'"
        )  # fmt: skip

    def holds(self, question: Question, outputs: int) -> Choice:  # noqa: ARG002
        """Feature maps of a block of test samples."""
        rows, one = question.function.samples, row_bytes(question)
        held = min(one * (rows if question.keeps("test") else 1), max(question.memory // 4, one))
        return Choice(self, rows, 1, 1, "", held, 2 * run_bytes(question))

    def work(self, question: Question, outputs: int) -> float | None:
        """Three forward passes for every output."""
        if not question.keeps("parameter") and not few_outputs(question, outputs):
            return None
        return 3 * (outputs if question.keeps("output") else 1) * passes_together(question)

    def node_seconds(self, probe: Probe) -> float:
        """The products of some test samples, and as many times that as there are more."""
        question, samples = probe.question, probe.question.function.samples
        features = None
        if question.splits_gradients:
            features = EntryFeatures(question, probe.places.names).advance(probe.split)
        size = min(samples, PROBED) if question.keeps("test") else samples
        shapes = {n: t.shape for n, t in WindowSum(question, 0, probe.outputs, question.terms, size).terms.items()}
        points = question.quadrature.points(1)
        small = replace(question, rest=None)
        one = timed(
            lambda: products(
                small,
                probe.function,
                probe.places,
                probe.split,
                probe.names,
                features,
                [slice(0, size)],
                points,
                shapes,
            )
        )
        return one * samples / size

    def add(self, question: Question, places: Places, total: WindowSum, walked: WalkedSegment, rung: int) -> int:
        """Multiply feature maps with every term, or entry."""
        shapes = {name: term.shape for name, term in total.terms.items()}
        blocks = _blocks(question)
        # The order is told by the whole update: products with every entry's features are taken once it is known.
        tried = None if question.quadrature.adaptive else walked.features
        summed = shapes if tried is walked.features else {
            name: torch.Size((1, *shape[1:3], 1, *shape[4:])) for name, shape in shapes.items()
        }  # fmt: skip

        def evaluate(q: int) -> tuple[Tensor, Products]:
            points = question.quadrature.points(q)
            found = products(
                question, walked.function, places, walked.split, walked.names, tried, blocks, points, summed
            )
            return found.total, found

        before, after = (reduced(v, question) for v in (walked.before, walked.after))
        climbed = climb(question.quadrature, rung, walked.bound, before, after, evaluate, question.function.dtype)
        best = climbed.best
        if tried is not walked.features:
            points = question.quadrature.points(climbed.nodes)
            best = products(
                question, walked.function, places, walked.split, walked.names, walked.features, blocks, points, shapes
            )
        for name, term in best.terms.items():
            total.terms[name] += term
        total.omitted += best.rest + best.others
        if best.gram is not None:
            total.gram = best.gram if total.gram is None else total.gram + best.gram
        total.count(nodes=climbed.nodes, evaluations=climbed.evaluations, converged=climbed.converged)
        return climbed.rung


def _blocks(question: Question) -> list[slice]:
    """The test samples in blocks whose feature maps take at most a quarter of the memory budget."""
    function = question.function
    if not question.keeps("test"):
        return [slice(0, function.samples)]
    size = max(1, question.memory // 4 // row_bytes(question))
    return [slice(a, min(a + size, function.samples)) for a in range(0, function.samples, size)]


def row_bytes(question: Question) -> int:
    """What phi of one test sample takes: in the model's dtype, and once more in float64 for one tensor at a time."""
    function = question.function
    outputs = function.outputs if question.keeps("output") else 1
    names = {n for layer in question.layers for n in layer.masks}
    sizes = [question.run.parameters[n].shape.numel() for n in names]
    return outputs * (2 * function.dtype.itemsize * sum(sizes) + 8 * max(sizes))


def _add(
    term: Tensor, i: int, t: int, layer: int, values: Tensor, rows: slice, question: Question, places: Places,
    name: str, mask: Tensor | None,
) -> None:  # fmt: skip
    """Add ``[n', J']``, or ``[n', J', d]`` where parameters are kept, in its place."""
    position = layer if question.keeps("layer") else 0
    if not question.keeps("parameter"):
        term[i, position, 0, t, rows] += values
        return
    inside, columns = places.columns(name, mask)
    term[i, position, columns, t, rows] += values[..., inside].permute(2, 0, 1).double()


def _add_features(
    question: Question, places: Places, terms: Mapping[str, Tensor], others: Tensor, phi: Tensor, features: Tensor,
    name: str, rows: slice,
) -> None:  # fmt: skip
    """Products with forward-time features ``[entries, *shape]``: ``phi`` is ``[n', J', d]``."""
    kernel, remainder = terms["kernel"], terms.get("unattributed", others)
    steps, entries = kernel.shape[0], kernel.shape[3]
    h = flattened(features, 1)
    asked = h[: steps * entries]
    for position, _, mask in places.of(name):
        share = asked if mask is None else asked * mask.reshape(-1).to(asked.dtype)
        if question.keeps("parameter"):
            for e, row in enumerate(share):
                i, t = divmod(e, entries)
                _add(kernel, i, t, position, (phi * row).double(), rows, question, places, name, mask)
        else:
            # This way round, the product is the faster one.
            found = (phi.flatten(0, 1) @ share.T).double().T.reshape(-1, *phi.shape[:2])
            kernel[:, position if question.keeps("layer") else 0, 0, :, rows] += found.reshape(
                steps, entries, *found.shape[1:]
            )
        for e, row in enumerate(h[len(asked) :]):
            left = row if mask is None else row * mask.reshape(-1).to(h.dtype)
            if e == 0 and question.restricts_gradients:
                others[rows] += (phi @ left).double()
            else:
                values = phi * left if question.keeps("parameter") else phi @ left
                _add(remainder, 0, 0, position, values.double(), rows, question, places, name, mask)
