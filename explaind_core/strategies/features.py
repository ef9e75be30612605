"""The strategy that carries every entry's own part of the optimizer's state forwards in time.

See :mod:`explaind_core.strategies.entry_features` for the recursion.
"""

from __future__ import annotations

import math
from dataclasses import replace

from explaind_core.errors import QuestionError
from explaind_core.questions import GRADIENT_AXES, Question
from explaind_core.strategies.entry_features import STATES
from explaind_core.strategies.reverse import Reverse
from explaind_core.strategies.stepwise import covered, gradient_work
from explaind_core.strategies.strategy import Choice

__all__ = ["Features"]

#: What one step of an entry's state costs per parameter, in multiplications of a matrix product: it is limited by
#: memory. Measured on the demo's decoder (4,000 entries, 200 rows) on two cores.
_ENTRY = 1000.0


class Features(Reverse):
    """As reverse, with forward-time features: cheapest where steps and few training samples are kept."""

    name = "features"

    def refuses(self, question: Question) -> QuestionError | None:
        """Without an axis or a restriction of gradients there is but one entry."""
        if question.splits_gradients:
            return None
        return self.cannot("do without an axis or a restriction of gradients", "leave strategy out")

    def holds(self, question: Question, outputs: int) -> Choice:
        """Besides what reverse holds: gradients, states, and what is read out, of every entry."""
        sizes = question.sizes(outputs)
        entries = math.prod(sizes[a] for a in GRADIENT_AXES if question.keeps(a)) + question.restricts_gradients
        names = {n for layer in question.layers for n in layer.masks}
        size = sum(question.run.parameters[n].shape.numel() for n in names)
        held = entries * size * question.function.dtype.itemsize * (2 + STATES)
        reverse = super().holds(question, outputs)
        return replace(reverse, working_bytes=reverse.working_bytes + held)

    def work(self, question: Question, outputs: int) -> float | None:
        """Multiplications of states with coefficients, and of features with feature maps."""
        if not question.keeps("parameter") and not any(question.keeps(axis) for axis in GRADIENT_AXES):
            return None
        sizes = question.sizes(outputs)
        rows = (sizes["test"] if question.keeps("test") else 1) * (outputs if question.keeps("output") else 1)
        last, explained, size = question.steps[-1], len(question.steps), covered(question)
        entries = math.prod(sizes[a] for a in GRADIENT_AXES if question.keeps(a))
        states = last * (entries * size * _ENTRY + gradient_work(question))
        return states + explained * entries * rows * size
