"""What similarities would cost, without taking them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Unpack

from explaind_core.attribution import GUESSED_NODES, Plan, plan_of
from explaind_core.questions import Question, spelled_out
from explaind_core.run import Run
from explaind_core.scores.grams import Blocks, order_of, passes_of
from explaind_core.scores.second_moments import restricted_to
from explaind_core.scores.similarity import Asked, SimilarityArguments
from explaind_core.strategies import (
    HELD,
    EntryFeatures,
    feature_map,
    first_needed,
    gram_products,
    peak_memory,
    replayed,
    run_bytes,
    timed,
)

__all__ = ["plan_similarity"]

#: Training samples whose features are timed, and test samples whose feature maps are.
_FEW, _SOME, _TESTED = 16, 128, 64


@spelled_out
def plan_similarity(run: Run, inputs: Any, *, progress: bool = True, **arguments: Unpack[SimilarityArguments]) -> Plan:
    """What :func:`explaind_core.similarity` would do with the same arguments, without doing it.

    One piece of each kind of work is timed on the run's first two steps. Features of training samples are timed for
    two numbers of them, and extrapolated along a line.

    Args:
        run: a run opened with its model.
        inputs: the n test samples, as for ``similarity``.
        progress: no bar is shown: nothing takes so long.
        **arguments: see :class:`explaind_core.scores.similarity.SimilarityArguments`.

    Returns:
        A plan whose ``strategy`` is ``"gram"``, or the one of :func:`explaind_core.attribute` where tensors are asked
        for. ``peak_bytes`` is about main memory: a number for every step explained and parameter goes to disk.

    Raises:
        QuestionError: as ``similarity`` would.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> plan_similarity(record_example(steps=3), torch.zeros(2, 4, dtype=torch.float64), nodes=1).strategy
        'gram'
    """
    del progress
    asked = Asked.ask(run, inputs, **arguments)
    if not asked.by_gram:
        found = plan_of(asked.question)
        return replace(found, result_bytes=asked.held // 3, peak_bytes=found.peak_bytes + asked.held)
    return _plan_grams(asked)


def _plan_grams(asked: Asked) -> Plan:
    question = asked.question
    run, function, held = question.run, question.function.at(), peak_memory()
    names = [n for n in run.parameters if any(n in layer.masks for layer in question.layers)]
    passes, last = passes_of(question, names), question.steps[-1]
    split, replay = replayed(run)
    function.values(split.theta)
    parts = Blocks.of(question, names, function.outputs)
    first = first_needed(split, question.steps[0], function.dtype)
    seconds, entries = replay * last, 0
    if passes:
        assert question.train is not None
        labels = len(question.train.labels) if question.keeps("train") else 1
        entries = -(-labels // passes)
        seconds += first * replay + passes * (last - first + 1) * (replay + _fed(question, names, entries))
    nodes = GUESSED_NODES if question.quadrature.adaptive else float(question.quadrature.ladder[0])
    few = slice(0, min(_TESTED, parts.blocks[0].stop))
    points, columns = question.quadrature.points(1), parts.pieces[0]
    phi = feature_map(question, function, split.theta_before, split.theta, names, few, points, columns)
    one_map = timed(
        lambda: feature_map(question, function, split.theta_before, split.theta, names, few, points, columns)
    )
    weights = {n: u.kernel.square() for n, u in split.updates.items() if n in names}
    one_product = timed(lambda: [gram_products(phi, phi, weights, layer.masks) for layer in question.layers])
    each = nodes * one_map * parts.maps / few.stop + one_product * parts.products / few.stop**2
    if question.quadrature.adaptive:
        each += timed(lambda: order_of(question, split, 1e30, 0))
    seconds += len(question.steps) * each
    size = sum(run.parameters[n].shape.numel() for n in names)
    item = function.dtype.itemsize
    # First the features of training samples; then two blocks of feature maps, and both scaled by one tensor's weights.
    rows = max(block.stop - block.start for block in parts.blocks) * parts.together
    maps = rows * (1 if len(parts.blocks) == 1 else 2) * (size + max(run.parameters[n].shape.numel() for n in names))
    working = max(HELD * entries * size, maps) * item
    return Plan(
        strategy="gram",
        steps=len(question.steps),
        tangents=function.outputs if question.keeps("output") else 1,
        nodes=nodes,
        chunks=len(parts.blocks),
        passes=max(1, passes),
        gradient_steps=last - first + 1 if passes else 0,
        seconds=seconds,
        result_bytes=asked.held // 3,
        peak_bytes=asked.held + 2 * run_bytes(question) + max(working, peak_memory() - held),
        fits=True,
    )


def _fed(question: Question, names: list[str], entries: int) -> float:
    """Seconds of feeding one step to the features of so many training samples."""
    split, _ = replayed(question.run)
    if not question.keeps("train"):
        features = EntryFeatures(question, names, others=False)
        return timed(lambda: features.feed(split))
    points = []
    for count in sorted({min(_FEW, entries), min(_SOME, entries)}):
        features = EntryFeatures(restricted_to(question, slice(0, count)), names, others=False)
        points.append((count, timed(lambda f=features: f.feed(split))))  # type: ignore[misc]
    (few, least), (some, most) = points[0], points[-1]
    slope = (most - least) / (some - few) if some > few else 0.0
    return most + max(0.0, slope) * (entries - some)
