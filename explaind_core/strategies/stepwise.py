"""The strategies that go forwards in time, segment by segment: forward mode, reverse mode, forward-time features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition, UpdateSplit, decompose, term_names, updates_of
from explaind_core.derivatives import climb
from explaind_core.questions import Contribution, Places, Question, Segment, WindowSum, finite_values, reduced
from explaind_core.strategies.features import EntryFeatures, horizon
from explaind_core.strategies.forward import refine
from explaind_core.strategies.reverse import Products, products

__all__ = ["joined", "stepwise"]

Features = Mapping[str, Tensor]


def joined(splits: Sequence[StepDecomposition]) -> StepDecomposition:
    """The steps of one segment as one: updates are added up, and theta goes from the first to the last."""
    if len(splits) == 1:
        return splits[0]
    updates: dict[str, UpdateSplit] = {}
    for split in splits:
        for name, u in split.updates.items():
            known = updates.get(name)
            updates[name] = u if known is None else UpdateSplit(
                kernel=known.kernel + u.kernel,
                regularization=known.regularization + u.regularization,
                prehistory=_added(known.prehistory, u.prehistory),
                displacement=known.displacement + u.displacement,
                penalty=_added(known.penalty, u.penalty),
            )  # fmt: skip
    return replace(
        splits[-1],
        updates=updates,
        theta_before=splits[0].theta_before,
        error=max(s.error for s in splits),
        correction=max(s.correction for s in splits),
    )


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _segments(question: Question, first: int) -> Iterator[tuple[Segment, StepDecomposition, Features | None]]:
    """The segments from window ``first`` on, each with its update and, where gradients are split, its features."""
    wanted = {s: segment for segment in question.segments if segment.window >= first for s in segment.steps}
    entries = None
    if question.splits_gradients:
        names = [n for n in question.run.parameters if any(n in layer.masks for layer in question.layers)]
        entries = EntryFeatures(question, names)
    start = min(wanted) if entries is None else horizon(question)
    if entries is not None and start > 1:
        question.facts["tail_dropped"] = f"below rounding before step {start}"
    held: list[StepDecomposition] = []
    features: dict[str, Tensor] | None = None
    for split in decompose(question.run, first=start, last=question.steps[-1]):
        segment = wanted.get(split.step)
        if segment is None:
            if entries is not None:
                entries.feed(split)
            continue
        held.append(split)
        if entries is not None:
            found = entries.advance(split)
            if len(segment.steps) > 1:  # they are added up, while the next step's are written over them
                found = {n: h.clone() for n, h in found.items()}
            known = features or {}
            features = {**known, **{n: h + known[n] if n in known else h for n, h in found.items()}}
        if split.step == segment.steps[-1]:
            yield segment, joined(held), features
            held, features = [], None


def stepwise(
    question: Question,
    strategy: str,
    outputs: int,
    scale: float,
    *,
    first: int = 0,
    last_values: Tensor,
    block: int,
    advanced: Callable[[int], object] = id,
) -> Iterator[Contribution]:
    """What each window, from window ``first`` on, added to the explained function.

    Args:
        strategy: ``"forward"``, ``"reverse"`` or ``"features"``. outputs: J. scale: what the quadrature's tolerance
            is a fraction of. last_values: f where the window before ended. block: the search for the order begins
            afresh every so many windows, so that what is taken up there gets the same nodes as in one go.
        advanced: called with the number of steps of every finished segment.
    """
    names, places = term_names(question.run), Places(question)
    rung = 0
    total: WindowSum | None = None
    following: tuple[int, Tensor] | None = None
    for segment, split, features in _segments(question, first):
        if total is not None and total.window != segment.window:
            yield total.finish()
            total = None
        if total is None:
            total = WindowSum(question, segment.window, outputs, question.terms)
            rung = rung if (segment.window - first) % block else 0
        a, b = segment.steps[0] - 1, segment.steps[-1]
        known = following is not None and following[0] == a
        before = following[1] if known and following is not None else finite_values(question, split.theta_before, a)
        # f moves along the segment with the buffers that it began with. What these then add comes at its end.
        after = end = finite_values(question, split.theta, b, buffers=a)
        bound = question.quadrature.tolerance * scale
        if strategy == "forward":
            rung = _by_forward_mode(question, total, split, names, features, (before, after), bound, rung)
        else:
            rung = _by_reverse_mode(question, places, total, split, names, features, (before, after), bound, rung)
        if question.function.moves:
            end = finite_values(question, split.theta, b)
            total.statistics += reduced(end - after, question)
        total.change += reduced(end - before, question)
        total.gap += reduced(before - last_values, question)
        total.note(update_error=split.error, correction=split.correction)
        last_values, following = end, (b, end)
        advanced(len(segment.steps))
    if total is not None:
        yield total.finish()


def _by_forward_mode(
    question: Question,
    total: WindowSum,
    split: StepDecomposition,
    names: tuple[str, ...],
    features: Features | None,
    values: tuple[Tensor, Tensor],
    bound: float,
    rung: int,
) -> int:
    updates = updates_of(split, names)
    keys: list[str] = list(names)
    steps, entries = total.terms["kernel"].shape[0], total.terms["kernel"].shape[3]
    if features is not None:
        del updates["kernel"]
        count = len(next(iter(features.values()), ()))
        updates |= {f"kernel/{e}": {n: h[e] for n, h in features.items()} for e in range(count)}
        keys = list(updates)
    found, rung = refine(
        question.function, split, keys, question.layers, question.rest, values, question.quadrature, bound, rung,
        updates=updates,
    )  # fmt: skip
    for key, term in found.terms.items():
        name, _, entry = key.partition("/")
        summed = term
        for axis, kept in ((1, "test"), (2, "output")):
            if not question.keeps(kept):
                summed = summed.sum(axis, keepdim=True)
        i, t = divmod(int(entry or 0), entries)
        behind = int(entry or 0) - steps * entries
        if behind == 0 and question.restricts_gradients:  # what is not asked for
            total.omitted += summed.sum(0)
        elif behind >= 0:
            total.terms["unattributed"][0, :, 0, 0] += summed
        else:
            total.terms[name][i, :, 0, t] += summed
    if found.rest is not None:
        total.omitted += reduced(found.rest, question)
    total.count(nodes=found.nodes, evaluations=found.evaluations, converged=found.converged)
    return rung


def _by_reverse_mode(
    question: Question,
    places: Places,
    total: WindowSum,
    split: StepDecomposition,
    names: tuple[str, ...],
    features: Features | None,
    values: tuple[Tensor, Tensor],
    bound: float,
    rung: int,
) -> int:
    shapes = {name: term.shape for name, term in total.terms.items()}
    blocks = _blocks(question)
    # The order is told by the whole update: products with every entry's features are taken once it is known.
    tried = None if question.quadrature.adaptive else features
    summed = shapes if tried is features else {
        name: torch.Size((1, *shape[1:3], 1, *shape[4:])) for name, shape in shapes.items()
    }  # fmt: skip

    def evaluate(q: int) -> tuple[Tensor, Products]:
        points = question.quadrature.points(q)
        found = products(question, places, split, names, tried, blocks, points, summed)
        return found.total, found

    before, after = (reduced(v, question) for v in values)
    climbed = climb(question.quadrature, rung, bound, before, after, evaluate, question.function.dtype)
    best = climbed.best
    if tried is not features:
        points = question.quadrature.points(climbed.nodes)
        best = products(question, places, split, names, features, blocks, points, shapes)
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
