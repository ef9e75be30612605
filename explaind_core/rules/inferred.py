"""A rule for optimizers that nobody has declared: opt-in, labelled, and with the size of its own doubt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, ParamSpec, Self

import torch

from explaind_core.errors import CoefficientError, InferenceError
from explaind_core.rules.filters import LinearFilter
from explaind_core.rules.rule import RecordedStep, StepCoefficients, UpdateRule
from explaind_core.rules.secant import Fitted

__all__ = ["DECAYS", "InferredRule", "fitted_by"]

P = ParamSpec("P")
DECAYS = ("none", "coupled", "decoupled")

#: What fits a rule to a run. Runs are a later stage's, which puts its function here.
_FITTED_BY: list[Callable[..., InferredRule]] = []


def fitted_by(function: Callable[P, InferredRule]) -> Callable[P, InferredRule]:
    """Let ``function`` be what :meth:`InferredRule.fit` calls."""
    _FITTED_BY[:] = [function]
    return function


@dataclass(frozen=True)
class InferredRule(UpdateRule):
    r"""An assumed momentum filter, and a preconditioner fitted to each step and closed by a rank-one secant.

    ``m <- mu m + u;  theta <- theta - P_s[m, or u + mu m for Nesterov] - rho_s theta`` with
    ``P_s[X] = P_0 X + (U_s - P_0 out_s) <out_s, X> / <out_s, out_s>``: every step closes exactly, whatever trained.
    That proves nothing. How far to trust the split between past gradients is told by the *correction* of each step,
    ``||U_s - P_0 out_s|| / ||U_s||`` over all parameters: for the right momentum it is small.

    Args:
        momentum: mu, of the assumed filter; 0 for none.
        nesterov: whether that filter looks ahead.
        preconditioner: P_0: ``"identity"`` (a multiple of it) or ``"quotient"`` (elementwise, never negative).
        decay: how the group's ``weight_decay`` acts: ``"none"``, ``"coupled"`` (it enters the filter) or
            ``"decoupled"`` (``rho = lr weight_decay``).
        bound: the largest correction of a step that is accepted, as a fraction of the update.
        force: accept any correction.

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
        if self.decay not in DECAYS:
            raise CoefficientError("there is no such decay", expected=f"one of {DECAYS}", got=repr(self.decay))
        if not 0 <= self.momentum < 1:
            raise CoefficientError("the momentum is out of range", expected="0 <= momentum < 1", got=self.momentum)
        if not self.bound > 0:
            raise CoefficientError("the bound is not positive", expected="> 0", got=self.bound)

    def check_options(self, group: Mapping[str, Any], names: Sequence[str]) -> None:
        """Nothing is known of any option, so none is refused."""

    def check_held_options(self, optimizer: torch.optim.Optimizer, *, unused: bool = False) -> None:
        """Nothing is known of any option, so none is refused."""

    def settings(self) -> dict[str, Any]:
        """The arguments, by which a recorded run knows its rule again."""
        return asdict(self)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """The assumed filter; P_0 is fitted, and closed, by the engine.

        Raises:
            InferenceError: the parameter is in half precision, and ``force`` is not set.
        """
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

        Args:
            correction: ``||what secants added|| / ||update||`` over all parameters of the step.
            step: s, for the error.

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
    def fit(cls, run: Any, *, steps: int | None = None, bound: float = 0.1, force: bool = False) -> Self:
        """The inferred rule whose corrections on ``run`` are smallest: see :func:`explaind_core.fit_inferred`."""
        fitted: Any = _FITTED_BY[0](run, steps=steps, bound=bound, force=force, kind=cls)
        return fitted  # type: ignore[no-any-return]
