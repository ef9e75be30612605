"""A way to an answer, as everything else knows it: what it refuses, holds and costs, and the contributions themselves.

A strategy is one file with one subclass of :class:`Strategy`, and one entry in
:data:`explaind_core.strategies.choose.STRATEGIES`. Nothing else names one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from explaind_core.errors import QuestionError
from explaind_core.questions import Contribution, Ends, Question
from explaind_core.strategies.probe import Estimate, Probe

__all__ = ["Choice", "Strategy", "run_bytes"]


@dataclass(frozen=True)
class Choice:
    """How a question is answered, and what that holds in memory.

    Attributes:
        strategy: the strategy.
        rows: test samples answered in one pass over the run.
        passes: how many passes that makes.
        segment: steps of the run held at a time (adjoint).
        method: of the products with samples' gradients (adjoint).
        working_bytes: what is held at the same time because of what is asked, besides the result.
        base_bytes: what is held of the run, whatever is asked: it cannot be made smaller.
    """

    strategy: Strategy
    rows: int
    passes: int
    segment: int
    method: str
    working_bytes: int
    base_bytes: int


class Strategy(ABC):
    """One way to the same numbers. It has no state: everything is in the question.

    Attributes:
        name: what users call it.
        along: the axis along which its contributions come, ``"step"`` or ``"test"``: window by window of all test
            samples, or all windows of one block of test samples after the other. Results are written in such blocks.
        derivatives_are: what a plan calls its derivatives.
    """

    name: ClassVar[str]
    along: ClassVar[str] = "step"
    derivatives_are: ClassVar[str] = "rows per test sample"

    def refuses(self, question: Question) -> QuestionError | None:  # noqa: ARG002
        """Why it cannot answer a question; None where it can."""
        return None

    @abstractmethod
    def holds(self, question: Question, outputs: int) -> Choice:
        """How it would answer a question, and what it would hold in memory.

        Args:
            question: one that it does not refuse.
            outputs: J.
        """

    @abstractmethod
    def work(self, question: Question, outputs: int) -> float | None:
        """How much work an answer is: of the strategies that fit into the memory, the one with the least is chosen.

        Args:
            question: one that it does not refuse.
            outputs: J.

        Returns:
            Multiplications, roughly, where gradients are told apart by an axis, passes through the model otherwise.
            ``inf`` where it should be chosen only if no other fits, None where only if somebody insists on it.
        """

    @abstractmethod
    def probe(self, probe: Probe, choice: Choice) -> Estimate:
        """Time its own pieces of work on one step of the run.

        Args:
            probe: the step, and the question.
            choice: how the question is answered.
        """

    @abstractmethod
    def contributions(
        self, question: Question, ends: Ends, choice: Choice, *, done: int = 0, block: int, progress: bool = True
    ) -> Iterator[Contribution]:
        """What the windows of a question added to the explained function.

        Args:
            question: the question.
            ends: the explained function at both ends.
            choice: how it is answered.
            done: how many windows, or test samples, are left out: those of an earlier call.
            block: so many windows are written to a result at a time. Whatever is taken up behind one must be answered
                as in one go.
            progress: show a bar with the remaining time.

        Returns:
            Along ``"step"``, one window after the other; along ``"test"``, all windows of one block of ``choice.rows``
            test samples after the other.
        """

    def derivatives(self, question: Question, outputs: int) -> int:
        """How many derivatives it takes at a node (see ``derivatives_are``).

        Args:
            question: the question.
            outputs: J.
        """
        return outputs if question.keeps("output") else 1

    def scale(self, question: Question, ends: Ends) -> float:
        """What the quadrature's tolerance is a fraction of: the largest change of what is explained.

        Args:
            question: the question.
            ends: the explained function at both ends.
        """
        return ends.scale(question)

    def cannot(self, what: str, remedy: str) -> QuestionError:
        """The refusal of a question.

        Args:
            what: it cannot do.
            remedy: what to do.
        """
        return QuestionError(
            f"the strategy {self.name!r} cannot {what}", where="strategy", got=self.name, remedy=remedy
        )  # fmt: skip


def run_bytes(question: Question) -> int:
    """One step of the run as it is held: four updates in float64; theta before and after, and the gradient."""
    size = sum(info.shape.numel() for info in question.run.parameters.values())
    return size * (4 * 8 + 3 * question.function.dtype.itemsize)
