"""The rule that is assumed, fitted to a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from explaind_core.decomposition.split import ParameterFilter, relative_correction, split_step
from explaind_core.rules import DECAYS, InferredRule, fitted_by
from explaind_core.run import Replay, Run

__all__ = ["fit_inferred"]

#: What a fit tries first; then it halves the distance between the best one and its neighbours.
_MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


@fitted_by
def fit_inferred(
    run: Run,
    *,
    steps: int | None = None,
    bound: float = 0.1,
    force: bool = False,
    kind: type[InferredRule] = InferredRule,
) -> InferredRule:
    """The inferred rule whose corrections on ``run`` are smallest (by their root mean square).

    Tries momenta with and without Nesterov, every decay that the run's hyper-parameters allow, with the identity
    as P_0 and with the quotient. The quotient has as many free numbers as there are parameters, so a filter is
    chosen with it only where the identity explains none (above ``bound``).

    Args:
        run: any recorded run.
        steps: how many of its first steps to look at, all by default.
        bound: of the rule that is returned: the largest correction of a step that it accepts.
        force: of the rule that is returned: accept any correction.
        kind: the class of the rule.

    Returns:
        The rule, of the class ``kind``.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> run = record_example(make_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        >>> round(fit_inferred(run).momentum, 2)
        0.9
    """
    last = len(run.steps) if steps is None else steps
    decays = DECAYS if any(group.get("weight_decay") for group in run.hyper(1)) else ("none",)

    def sizes(rules: Iterable[InferredRule]) -> dict[InferredRule, float]:
        """All rules in one pass over the run: root mean square of their corrections."""
        squares = dict.fromkeys(rules, 0.0)
        memories: dict[InferredRule, dict[str, ParameterFilter]] = {rule: {} for rule in squares}
        for replayed in Replay(run).steps(until=last):
            for rule, memory in memories.items():
                splits = [split for split, _, _ in split_step(rule, replayed, memory).values()]
                squares[rule] += relative_correction(splits) ** 2
        return {rule: (total / last) ** 0.5 for rule, total in squares.items()}

    def search(preconditioner: str) -> tuple[float, InferredRule]:
        start = kind(preconditioner=preconditioner, force=True)
        variants = [replace(start, nesterov=n, decay=d) for n in (False, True) for d in decays]
        tried = sizes(replace(v, momentum=m) for v in variants for m in _MOMENTA)
        best = min(tried, key=lambda rule: tried[rule])
        for _ in range(6):
            alike = [r.momentum for r in tried if replace(r, momentum=0.0) == replace(best, momentum=0.0)]
            tried |= sizes(replace(best, momentum=m) for m in _between(best.momentum, alike))
            best = min(tried, key=lambda rule: tried[rule])
        return tried[best], best

    by_identity: tuple[float, InferredRule] = search("identity")
    found = by_identity if by_identity[0] <= bound else min(by_identity, search("quotient"), key=lambda f: f[0])
    fitted: InferredRule = replace(found[1], bound=bound, force=force)
    return fitted


def _between(best: float, tried: Iterable[float]) -> Iterable[float]:
    """The middles between the best value and its neighbours."""
    below = max((m for m in tried if m < best), default=None)
    above = min((m for m in tried if m > best), default=None)
    return [(best + other) / 2 for other in (below, above) if other is not None]
