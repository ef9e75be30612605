"""Rprop and ASGD."""

from __future__ import annotations

from typing import Any

import torch

from explaind_core import RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal

__all__ = ["ASGDRule", "RpropRule"]


class RpropRule(UpdateRule):
    r"""torch.optim.Rprop (Riedmiller & Braun, 1993): steps of adapted size along the gradient's sign.

    ``theta <- theta - step_size sign(g)``, nothing where the sign has just changed. As a frozen preconditioner:
    ``P_s = step_size / |g|``, and 0 where nothing moved.
    """

    optimizers = ("torch.optim.rprop.Rprop",)
    options = frozenset({"lr", "etas", "step_sizes", "foreach", "maximize"})
    fixed = {"capturable": (False,), "differentiable": (False,)}
    proved_for = {"etas": ((..., ...),), "step_sizes": ((..., ...),), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = step_size_s / |g_s|`` where the optimizer kept the gradient, else 0."""
        kept = step.after["prev"] != 0
        size = step.after["step_size"] / step.gradient.abs().where(kept, 1.0)
        return StepCoefficients(
            preconditioner=Diagonal(size.where(kept, 0.0)),
            gradient_operator=-1.0 if step.hyper["maximize"] else 1.0,
        )

    def recursion(self, step: Any) -> Any:
        """As torch does it: sizes grow while the sign stays; where it changes they shrink, and the step is left out."""
        hyper, state, (shrink, grow) = step.hyper, step.state, step.hyper["etas"]
        g = -step.gradient if hyper["maximize"] else step.gradient
        agreement, size = g * state["prev"], state.get("step_size", hyper["lr"])
        if agreement > 0:
            size = size * grow
        elif agreement < 0:
            size, g = size * shrink, 0 * g
        smallest, largest = hyper["step_sizes"]
        state["step_size"] = step.min(step.max(size, smallest), largest)
        state["prev"] = g
        return step.theta - state["step_size"] * step.sign(g)


class ASGDRule(UpdateRule):
    r"""torch.optim.ASGD (Polyak & Juditsky, 1992): the trained parameters, not their average ``ax``.

    ``theta <- (1 - lambd eta) theta - eta g`` with the eta that the LAST step computed (in single precision), so
    a changed learning rate acts one step late; weight decay enters g.
    """

    optimizers = ("torch.optim.asgd.ASGD",)
    options = frozenset({"lr", "lambd", "alpha", "t0", "weight_decay", "foreach", "maximize"})
    fixed = {"capturable": (False,), "differentiable": (False,)}
    proved_for = {"maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = eta_{s-1}``, ``rho_s = lambd eta_{s-1}``."""
        hyper = step.hyper
        # Created in the first step as lr in torch's default precision, which is part of the algorithm.
        default = torch.full((), hyper["lr"], dtype=torch.get_default_dtype())
        rate = step.before.get("eta", default).item()
        return StepCoefficients(
            preconditioner=rate,
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=hyper["weight_decay"],
            decoupled_decay=hyper["lambd"] * rate,
        )

    def recursion(self, step: Any) -> Any:
        """As torch does it, in exact arithmetic."""
        hyper, state = step.hyper, step.state
        lr, eta = hyper["lr"], state.get("eta", hyper["lr"])
        g = (-step.gradient if hyper["maximize"] else step.gradient) + hyper["weight_decay"] * step.theta
        state["eta"] = lr / (1 + hyper["lambd"] * lr * step.clock) ** hyper["alpha"]
        return step.theta * (1 - hyper["lambd"] * eta) - eta * g
