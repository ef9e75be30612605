"""Which way to an answer is cheapest, and what it holds in memory.

======== ======================================= ======================================= ==========================
strategy what is differentiated                  cheapest for                            held, besides the result
======== ======================================= ======================================= ==========================
forward  f along every (layer, term, entry)      all outputs, training samples summed    one tangent per pass
reverse  every (test sample, output)             parameters kept; few outputs            phi of a block of samples
features as reverse, with forward-time features  steps and few training samples kept     entries x parameters x states
adjoint  as reverse, walking back in time        training samples or gradient steps kept rows x parameters x states
======== ======================================= ======================================= ==========================
"""

from __future__ import annotations

from explaind_core.errors import QuestionError
from explaind_core.questions import Question
from explaind_core.store import readable_size
from explaind_core.strategies.adjoint import Adjoint
from explaind_core.strategies.features import Features
from explaind_core.strategies.forward import Forward
from explaind_core.strategies.reverse import Reverse
from explaind_core.strategies.strategy import Choice, Strategy

__all__ = ["STRATEGIES", "choose", "insisted_on"]

#: All strategies, in the order of choosing: of two that cost the same the later one is taken, as is the last where none
#: fits. A later one cuts its work into smaller pieces.
STRATEGIES: tuple[Strategy, ...] = (Forward(), Reverse(), Features(), Adjoint())


def insisted_on(question: Question) -> Strategy | None:
    """The strategy that the question insists on, None for the cheapest.

    Raises:
        QuestionError: there is none of this name.
    """
    if question.strategy is None:
        return None
    for strategy in STRATEGIES:
        if strategy.name == question.strategy:
            return strategy
    raise QuestionError(
        "there is no such strategy",
        where="strategy",
        expected=tuple(strategy.name for strategy in STRATEGIES),
        got=question.strategy,
    )


def choose(question: Question, outputs: int) -> Choice:
    """The strategy that answers a question with the least work within its memory budget, or the one insisted on.

    Args:
        question: the question.
        outputs: J.

    Raises:
        QuestionError: the strategy insisted on cannot answer it, or is none; nothing fits into the budget.
    """
    wanted = insisted_on(question)
    if wanted is not None:
        refusal = wanted.refuses(question)
        if refusal is not None:
            raise refusal
        chosen = wanted.holds(question, outputs)
    else:
        chosen = _cheapest(question, outputs)
    if chosen.working_bytes > question.memory:
        raise QuestionError(
            "the question does not fit into the memory budget",
            where=f"strategy {chosen.strategy.name!r}, {question.sizes(outputs)}",
            expected=f"at most {readable_size(question.memory)}",
            got=f"{readable_size(chosen.working_bytes)} for one test sample at a time",
            remedy="restrict layers=, sum over the output or the step axis, name fewer windows, or raise memory=",
        )
    return chosen


def _cheapest(question: Question, outputs: int) -> Choice:
    """Of those that fit, the one with the least work; the last that offers itself where none fits."""
    offers: list[tuple[float, Choice]] = []
    for strategy in reversed(STRATEGIES):  # min takes the first of equals
        if strategy.refuses(question) is None:
            work = strategy.work(question, outputs)
            if work is not None:
                offers.append((work, strategy.holds(question, outputs)))
    fitting = [offer for offer in offers if offer[1].working_bytes <= question.memory]
    return min(fitting or offers[:1], key=lambda offer: offer[0])[1]
