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

import math
from dataclasses import dataclass, replace

from explaind_core.errors import QuestionError
from explaind_core.questions import GRADIENT_AXES, Question, readable_size
from explaind_core.strategies.features import STATES
from explaind_core.strategies.stepwise import row_bytes

__all__ = ["Choice", "choose", "run_bytes"]

#: Rows up to which a forward-mode derivative per row is cheaper than the gradients of all samples.
DIRECTIONAL = 2
#: What one step of an entry's, or a row's, state costs per parameter, in multiplications of a matrix product: these
#: are limited by memory. Measured on the demo's decoder (4,000 entries, 200 rows) on two cores.
_ENTRY, _ROW = 1000.0, 500.0


@dataclass(frozen=True)
class Choice:
    """How a question is answered.

    Attributes:
        strategy: its name. rows: test samples answered in one pass over the run. passes: how many passes that makes.
        segment: steps of the run held at a time (adjoint). method: of the products with samples' gradients (adjoint).
        working_bytes: what is held at the same time because of what is asked, besides the result.
        base_bytes: what is held of the run, whatever is asked: it cannot be made smaller.
    """

    strategy: str
    rows: int
    passes: int
    segment: int
    method: str
    working_bytes: int
    base_bytes: int


def choose(question: Question, outputs: int) -> Choice:
    """The strategy that answers a question with the least work within its memory budget, or the one insisted on.

    Raises:
        QuestionError: the strategy insisted on cannot answer it; nothing fits into the budget.
    """
    wanted = question.strategy
    splits, parameter = question.splits_gradients, question.keeps("parameter")
    gradient_axes = any(question.keeps(axis) for axis in GRADIENT_AXES)
    if wanted == "forward" and parameter:
        raise _cannot("forward", "keep single parameters", "keep layers, or say strategy='reverse'")
    if wanted == "reverse" and splits:
        raise _cannot(
            "reverse", "tell gradients apart by step or training sample", "say strategy='features' or 'adjoint'"
        )
    if wanted == "features" and not splits:
        raise _cannot("features", "do without an axis or a restriction of gradients", "leave strategy out")
    features, adjoint = _features(question, outputs), _adjoint(question, outputs)
    if wanted == "adjoint":
        chosen = adjoint
    elif wanted == "features":
        chosen = features
    elif wanted is not None:
        chosen = _stepwise(question, wanted)
    elif not splits:
        chosen = _stepwise(question, "reverse" if parameter or _few_outputs(question, outputs) else "forward")
    elif not gradient_axes:
        chosen = features if parameter else _stepwise(question, "forward")
    elif parameter and features.working_bytes <= question.memory:
        chosen = features  # right for every optimizer; the adjoint keeps parameters of elementwise ones only
    else:
        fitting = [c for c in (adjoint, features) if c.working_bytes <= question.memory]
        chosen = min(fitting or [adjoint], key=lambda c: _work(question, outputs, c))
    if chosen.working_bytes > question.memory:
        raise QuestionError(
            "the question does not fit into the memory budget",
            where=f"strategy {chosen.strategy!r}, {question.sizes(outputs)}",
            expected=f"at most {readable_size(question.memory)}",
            got=f"{readable_size(chosen.working_bytes)} for one test sample at a time",
            remedy="restrict layers=, sum over the output or the step axis, name fewer windows, or raise memory=",
        )
    return chosen


def _cannot(strategy: str, what: str, remedy: str) -> QuestionError:
    return QuestionError(f"the strategy {strategy!r} cannot {what}", where="strategy", got=strategy, remedy=remedy)


def _few_outputs(question: Question, outputs: int) -> bool:
    """Whether backward passes (3 forwards each) are fewer than forward-mode derivatives (2 and more each)."""
    kept = outputs if question.keeps("output") else 1
    return 3 * kept < 2 * 2 * len(question.layers)


def _item(question: Question) -> int:
    return question.function.dtype.itemsize


def _covered(question: Question) -> int:
    """Entries of all tensors that a layer touches, once for every layer."""
    return sum(question.run.parameters[n].shape.numel() for layer in question.layers for n in layer.masks)


def run_bytes(question: Question) -> int:
    """One step of the run as it is held: four updates in float64; theta before and after, and the gradient."""
    size = sum(info.shape.numel() for info in question.run.parameters.values())
    return size * (4 * 8 + 3 * _item(question))


def _stepwise(question: Question, strategy: str) -> Choice:
    rows, base = question.function.samples, 2 * run_bytes(question)
    if strategy == "forward":
        return Choice(strategy, rows, 1, 1, "", 0, base)
    one = row_bytes(question)
    held = min(one * (rows if question.keeps("test") else 1), max(question.memory // 4, one))
    return Choice(strategy, rows, 1, 1, "", held, base)


def _features(question: Question, outputs: int) -> Choice:
    sizes = question.sizes(outputs)
    entries = math.prod(sizes[a] for a in GRADIENT_AXES if question.keeps(a)) + question.restricts_gradients
    reverse = _stepwise(question, "reverse")
    names = {n for layer in question.layers for n in layer.masks}
    size = sum(question.run.parameters[n].shape.numel() for n in names)
    # Gradients, states, and what is read out.
    held = entries * size * _item(question) * (2 + STATES)
    return replace(reverse, strategy="features", working_bytes=reverse.working_bytes + held)


def _adjoint(question: Question, outputs: int) -> Choice:
    n = question.function.samples
    segment = max(1, min(math.isqrt(question.steps[-1]), question.memory // 8 // run_bytes(question)))
    base = (segment + 1) * run_bytes(question)
    per_row = (outputs if question.keeps("output") else 1) * _covered(question) * _item(question)
    # phi, psi and a of one window; z and a of all of them. phi twice, while its order is searched for.
    held = per_row * (4 + len(question.windows) * (STATES + 1))
    if not question.keeps("test"):
        return Choice("adjoint", n, 1, segment, _method(question, outputs, 1), held, base)
    rows = max(1, min(n, (question.memory // 2) // held))
    return Choice("adjoint", rows, -(-n // rows), segment, _method(question, outputs, rows), rows * held, base)


def _method(question: Question, outputs: int, rows: int) -> str:
    derivatives = rows * (outputs if question.keeps("output") else 1) * len(question.windows) * len(question.layers)
    return "directional" if derivatives <= DIRECTIONAL else "materialised"


def _work(question: Question, outputs: int, choice: Choice) -> float:
    """Multiplications, roughly: of states with coefficients, and of gradients with what they are worth."""
    sizes = question.sizes(outputs)
    rows = (sizes["test"] if question.keeps("test") else 1) * (outputs if question.keeps("output") else 1)
    last, explained = question.steps[-1], len(question.steps)
    size = _covered(question)
    batch = 1 if question.train is None else len(question.run.sample_ids(last))
    gradients = (
        0.0 if question.train is None else 6.0 * batch * sum(p.shape.numel() for p in question.run.parameters.values())
    )
    if choice.strategy == "features":
        entries = math.prod(sizes[a] for a in GRADIENT_AXES if question.keeps(a))
        return last * (entries * size * _ENTRY + gradients) + explained * entries * rows * size
    alive = len(question.windows)
    return last * (choice.passes * gradients + rows * alive * size * (_ROW + batch))
