"""A rule for optimizers that nobody has declared: opt-in, labelled, and with the size of its own doubt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch

from explaind_core.coefficients import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.decompose import ParameterFilter, relative_correction, split_step
from explaind_core.errors import CoefficientError, InferenceError
from explaind_core.replay import Replay
from explaind_core.run import Run
from explaind_core.secant import Fitted

__all__ = ["InferredRule"]

_DECAYS = ("none", "coupled", "decoupled")
#: What a fit tries first; then it halves the distance between the best one and its neighbours.
_MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class InferredRule(UpdateRule):
    r"""An assumed momentum filter, and a preconditioner fitted to each step and closed by a rank-one secant.

    ``m <- mu m + u;  theta <- theta - P_s[m, or u + mu m for Nesterov] - rho_s theta`` with
    ``P_s[X] = P_0 X + (U_s - P_0 out_s) <out_s, X> / <out_s, out_s>``: every step closes exactly, whatever trained.
    That proves nothing. How far to trust the split between past gradients is told by the *correction* of each step,
    ``||U_s - P_0 out_s|| / ||U_s||`` over all parameters: for the right momentum it is small.

    Args:
        momentum: mu, of the assumed filter; 0 for none. nesterov: whether it looks ahead.
        preconditioner: P_0: ``"identity"`` (a multiple of it) or ``"quotient"`` (elementwise, never negative).
        decay: how the group's ``weight_decay`` acts: ``"none"``, ``"coupled"`` (it enters the filter) or
            ``"decoupled"`` (``rho = lr weight_decay``).
        bound: the largest correction of a step that is accepted. force: accept any.

    Raises:
        CoefficientError: an argument is out of range.

    Example:
        >>> import torch, explaind_core as explaind
        >>> from explaind_core.testing import record_example
        >>> class Mystery(torch.optim.SGD):
        ...     "Nobody has declared this one."
        >>> make = lambda p: Mystery(p, lr=0.1, momentum=0.9)
        >>> run = record_example(make_optimizer=make, rule=explaind.InferredRule())
        >>> rule = explaind.InferredRule.fit(run)
        >>> round(rule.momentum, 2)
        0.9
    """

    momentum: float = 0.0
    nesterov: bool = False
    preconditioner: str = "identity"
    decay: str = "none"
    bound: float = 0.1
    force: bool = False

    closed_by_secant: ClassVar[bool] = True
    inferred: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Fitted(self.preconditioner)
        if self.decay not in _DECAYS:
            raise CoefficientError("there is no such decay", expected=f"one of {_DECAYS}", got=repr(self.decay))
        if not 0 <= self.momentum < 1:
            raise CoefficientError("the momentum is out of range", expected="0 <= momentum < 1", got=self.momentum)
        if not self.bound > 0:
            raise CoefficientError("the bound is not positive", expected="> 0", got=self.bound)

    def check_options(self, group: Mapping[str, Any], names: Sequence[str]) -> None:
        """Nothing is known of any option, so none is refused."""

    def settings(self) -> dict[str, Any]:
        """The arguments, by which a recorded run knows its rule again."""
        return asdict(self)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """The assumed filter; P_0 is fitted, and closed, by the engine."""
        if step.dtype in (torch.bfloat16, torch.float16) and not self.force:
            raise InferenceError(
                "parameters in half precision cannot be explained by an inferred rule: rounding decides their updates",
                where=f"parameter {step.name!r}, step {step.step}",
                expected="float32 or float64 parameters",
                got=step.dtype,
                remedy="train on float32 master weights (autocast); or pass force=True, and trust the closure only",
            )
        hyper, mu = step.hyper, self.momentum
        decay = 0.0 if self.decay == "none" else float(hyper.get("weight_decay", 0.0))
        return StepCoefficients(
            preconditioner=Fitted(self.preconditioner),
            filter=LinearFilter.momentum(mu, nesterov=self.nesterov) if mu else LinearFilter(),
            gradient_operator=-1.0 if hyper.get("maximize") else 1.0,
            coupled_decay=decay if self.decay == "coupled" else 0.0,
            decoupled_decay=float(hyper["lr"]) * decay if self.decay == "decoupled" else 0.0,
        )

    def check_correction(self, correction: float, step: int) -> None:
        """Refuse a step whose correction is above the bound, unless forced.

        Raises:
            InferenceError: naming the step, its correction and the bound.
        """
        if not self.force and not correction <= self.bound:
            raise InferenceError(
                "the inferred rule does not explain a step: its correction is above the bound",
                where=f"step {step}",
                expected=f"a correction of at most {self.bound:g} of the update",
                got=f"{correction:.2g}, by {self}",
                remedy="fit it (explaind.InferredRule.fit(run)), assume another momentum, preconditioner or decay; "
                "declare the optimizer; raise the bound; or pass force=True, and trust the closure only",
            )

    @classmethod
    def fit(cls, run: Run, *, steps: int | None = None, bound: float = 0.1, force: bool = False) -> Self:
        """The inferred rule whose corrections on ``run`` are smallest (by their root mean square).

        Tries momenta with and without Nesterov, every decay that the run's hyper-parameters allow, with the identity
        as P_0 and with the quotient. The quotient has as many free numbers as there are parameters, so a filter is
        chosen with it only where the identity explains none (above ``bound``).

        Args:
            run: any recorded run. steps: how many of its first steps to look at, all by default.
            bound, force: of the rule that is returned, see the class.
        """
        last = len(run.steps) if steps is None else steps
        decays = _DECAYS if any(group.get("weight_decay") for group in run.hyper(1)) else ("none",)

        def sizes(rules: Iterable[Self]) -> dict[Self, float]:
            """All rules in one pass over the run: root mean square of their corrections."""
            squares = dict.fromkeys(rules, 0.0)
            memories: dict[Self, dict[str, ParameterFilter]] = {rule: {} for rule in squares}
            for replayed in Replay(run).steps(until=last):
                for rule, memory in memories.items():
                    splits = [split for split, _, _ in split_step(rule, replayed, memory).values()]
                    squares[rule] += relative_correction(splits) ** 2
            return {rule: (total / last) ** 0.5 for rule, total in squares.items()}

        def search(preconditioner: str) -> tuple[float, Self]:
            start = cls(preconditioner=preconditioner, force=True)
            variants = [replace(start, nesterov=n, decay=d) for n in (False, True) for d in decays]
            tried = sizes(replace(v, momentum=m) for v in variants for m in _MOMENTA)
            best = min(tried, key=lambda rule: tried[rule])
            for _ in range(6):
                alike = [r.momentum for r in tried if replace(r, momentum=0.0) == replace(best, momentum=0.0)]
                tried |= sizes(replace(best, momentum=m) for m in _between(best.momentum, alike))
                best = min(tried, key=lambda rule: tried[rule])
            return tried[best], best

        by_identity: tuple[float, Self] = search("identity")
        found = by_identity if by_identity[0] <= bound else min(by_identity, search("quotient"), key=lambda f: f[0])
        fitted: Self = replace(found[1], bound=bound, force=force)
        return fitted


def _between(best: float, tried: Iterable[float]) -> Iterable[float]:
    """The middles between the best value and its neighbours."""
    below = max((m for m in tried if m < best), default=None)
    above = min((m for m in tried if m > best), default=None)
    return [(best + other) / 2 for other in (below, above) if other is not None]
