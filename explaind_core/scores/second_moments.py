"""The second moments of a step's updates over training samples: the weights of similarity's Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition, decompose
from explaind_core.questions import Findings, Question
from explaind_core.store import WorkingFolder
from explaind_core.strategies import EntryFeatures, GradientSplitter, horizon

__all__ = ["Moments", "restricted_to"]


def restricted_to(question: Question, entries: slice) -> Question:
    """The question about some entries of the train axis."""
    assert question.train is not None
    start, stop = entries.start, entries.stop
    of = {k: e - start for k, e in question.train.of.items() if start <= e < stop}
    return replace(question, train=replace(question.train, labels=question.train.labels[entries], of=of))


@dataclass
class Moments:
    """``sum_k h_{s,k}^2`` of every step explained, on disk while it is entered.

    Args:
        question: the question.
        names: the parameters that are wanted.
        passes: walks over the run, each with the features of some training samples. None where training samples are
            summed and all asked for: the squares of the kernel's updates will do.
        advance: called with the number of steps walked over.

    Attributes:
        findings: what was found on the walks.
    """

    question: Question
    names: list[str]
    passes: int
    advance: Callable[[int], object]
    findings: Findings = field(init=False, default=Findings())
    _where: dict[str, slice] = field(default_factory=dict)
    _row: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Moments:
        self._folder = WorkingFolder("moments")
        try:
            self._fill()
        except BaseException:
            self._folder.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def _fill(self) -> None:
        question = self.question
        if not self.passes:
            return
        assert question.train is not None
        start = 0
        for name in self.names:
            end = start + question.run.parameters[name].shape.numel()
            self._where[name] = slice(start, end)
            start = end
        self._row = {s: row for row, s in enumerate(question.steps)}
        # All of it at once: a disk that is full when a page of a mapped file is written kills the process.
        path = self._folder.allocate("moments", 8 * len(self._row) * start)
        self._stored = np.memmap(path, dtype=np.float64, mode="r+", shape=(len(self._row), start))
        first, splitter = horizon(question), GradientSplitter(question)
        labels = question.train.labels
        size = math.ceil(len(labels) / self.passes)
        for low in range(0, len(labels), size):
            some = restricted_to(question, slice(low, low + size))
            features = EntryFeatures(some, self.names, others=False, splitter=splitter)
            self.advance(first - 1)
            for split in decompose(question.run, first=first, last=question.steps[-1]):
                read = split.step in self._row
                for _, name, h in features.blocks(split, read=read):
                    squares = h.double().square_().sum(0).reshape(-1)
                    self._stored[self._row[split.step], self._where[name]] += squares.numpy()
                self.advance(1)
        tail = f"below rounding before step {first}" if first > 1 else None
        self.findings = Findings(tail_dropped=tail) | splitter.take()

    def of(self, split: StepDecomposition) -> dict[str, Tensor]:
        """Parameter name -> weights of its shape."""
        if not self.passes:
            return {n: u.kernel.square() for n, u in split.updates.items() if n in self.names}
        row = torch.from_numpy(np.array(self._stored[self._row[split.step]]))
        return {n: row[where].reshape(split.theta[n].shape) for n, where in self._where.items()}
