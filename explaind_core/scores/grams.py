r"""Similarity's weighted Gram matrices, step by step: in blocks of test samples, under a memory budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition, decompose
from explaind_core.derivatives import climb
from explaind_core.progress import counted
from explaind_core.questions import Ends, Findings, Question, Window, check_fits, finite_values, reduced
from explaind_core.scores.second_moments import Moments
from explaind_core.strategies import HELD, Matrices, feature_map, gram_products

__all__ = ["Blocks", "InnerProducts", "Matrices", "gram", "gram_products", "order_of", "passes_of", "step_gram"]


def passes_of(question: Question, names: Sequence[str]) -> int:
    """How many walks over the run the features of training samples take; 0 where they are not needed.

    Raises:
        QuestionError: one sample's features, or its feature map, do not fit into the memory budget.
    """
    size = _size(question, names)
    passes = 0
    if question.splits_gradients:
        held = size * HELD
        check_fits(question.memory, 2 * held, "similarity, features of one training sample", _REMEDY)
        assert question.train is not None
        entries = len(question.train.labels) if question.keeps("train") else 1
        passes = math.ceil(entries / (question.memory // 2 // held))
    check_fits(question.memory, 4 * size, "similarity, feature maps of one test sample", _REMEDY)
    return passes


@dataclass(frozen=True)
class Blocks:
    """The test samples, and the outputs of each, in pieces: feature maps of two blocks of samples are held at a time.

    Attributes:
        blocks: of test samples.
        pieces: of outputs.
        together: the outputs in the largest piece.
    """

    blocks: list[slice]
    pieces: list[slice]
    together: int

    @classmethod
    def of(cls, question: Question, names: Sequence[str], outputs: int) -> Blocks:
        """All outputs of a block of samples, or as many as fit."""
        n, fitting = question.function.samples, max(1, question.memory // 4 // _size(question, names))
        if question.keeps("output"):
            together = min(outputs, max(1, fitting // n))
            pieces = [slice(a, min(a + together, outputs)) for a in range(0, outputs, together)]
        else:
            together, pieces = 1, [slice(None)]
        rows = max(1, fitting // together)
        return cls([slice(a, min(a + rows, n)) for a in range(0, n, rows)], pieces, together)

    @property
    def maps(self) -> int:
        """Test samples whose feature maps are made, with those that are made again."""
        return len(self.pieces) * sum(size * (position + 1) for position, size in enumerate(self._sizes))

    @property
    def products(self) -> int:
        """Pairs of test samples that are multiplied."""
        sizes = self._sizes
        return len(self.pieces) * sum(one * other for i, one in enumerate(sizes) for other in sizes[i:])

    @property
    def _sizes(self) -> list[int]:
        return [int(block.stop) - int(block.start) for block in self.blocks]


_REMEDY = "restrict layers= or test=, or raise memory="


def _size(question: Question, names: Sequence[str]) -> int:
    """Bytes of one feature map."""
    return sum(question.run.parameters[n].shape.numel() for n in names) * question.function.dtype.itemsize


class InnerProducts(NamedTuple):
    """The inner products of the tensors of all pairs of test samples.

    Attributes:
        products: ``[*per, n, n]``.
        nodes_used: of all steps.
        missed: how many steps did not meet the tolerance.
        findings: what was found on the way.
    """

    products: Matrices
    nodes_used: int
    missed: int
    findings: Findings


def gram(question: Question, windows: Sequence[Window], per: tuple[str, ...], progress: bool) -> InnerProducts:
    """The inner products by weighted Gram matrices.

    Args:
        question: for the tensors.
        windows: with a matrix each, where ``per`` has ``"step"``.
        per: the axes with a matrix for each entry.
        progress: show a bar with the remaining time.
    """
    names = [n for n in question.run.parameters if any(n in layer.masks for layer in question.layers)]
    passes = passes_of(question, names)
    scale = Ends.of(question).scale(question)
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
            question.check_update(split)
            order, rung, converged = order_of(question, split, scale, rung)
            nodes_used, failed = nodes_used + order, failed + (not converged)
            parts = step_gram(question, split, names, moments.of(split), order)
            for layer, part in enumerate(parts):
                total[layer if "layer" in per else 0, window_of[split.step]] += part
            advance(1)
    axes = [axis for axis in sizes if axis in per]
    found = total.reshape(*(sizes[axis] for axis in axes), n, n)
    found = found if tuple(axes) == per else found.swapaxes(0, 1)
    return InnerProducts(found, nodes_used, failed, moments.findings)


def order_of(question: Question, split: StepDecomposition, scale: float, rung: int) -> tuple[int, int, bool]:
    """How many nodes a step needs, by forward mode along its displacement.

    Returns:
        Their number, where to start the next search, and whether the tolerance is met.
    """
    quadrature, function = question.quadrature, question.function.at(split.step - 1)
    if not quadrature.adaptive:
        return quadrature.ladder[0], 0, True
    before = finite_values(question, split.theta_before, split.step - 1)
    after = finite_values(question, split.theta, split.step, buffers=split.step - 1)
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


def step_gram(
    question: Question, split: StepDecomposition, names: list[str], weights: Mapping[str, Tensor], order: int
) -> list[Matrices]:
    """One step's inner products, layer by layer: ``[n, n]`` each."""
    function, points = question.function.at(split.step - 1), question.quadrature.points(order)
    n, parts = function.samples, Blocks.of(question, names, function.outputs)
    found = [np.zeros((n, n)) for _ in question.layers]
    for columns in parts.pieces:
        for one, block in enumerate(parts.blocks):
            left = feature_map(question, function, split.theta_before, split.theta, names, block, points, columns)
            for other in parts.blocks[one:]:
                right = left if other == block else feature_map(
                    question, function, split.theta_before, split.theta, names, other, points, columns
                )  # fmt: skip
                for position, layer in enumerate(question.layers):
                    part = gram_products(left, right, weights, layer.masks)
                    found[position][block, other] += part
                    if other != block:
                        found[position][other, block] += part.T
    return found
