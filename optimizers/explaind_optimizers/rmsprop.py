"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal

__all__ = ["RMSpropRule"]


class RMSpropRule(UpdateRule):
    r"""torch.optim.RMSprop (Hinton, 2012), plain, centered, with momentum.

    ``v <- alpha v + (1 - alpha) g^2;  m <- mu m + g / (sqrt(v) + eps);  theta <- theta - lr m``; centered takes
    ``v - mean(g)^2``. The division stands BEFORE the momentum: it is E_s, not P_s. Weight decay enters g.
    """

    optimizers = ("torch.optim.rmsprop.RMSprop",)
    options = frozenset({"lr", "momentum", "alpha", "eps", "centered", "weight_decay", "foreach", "maximize"})
    fixed = {"capturable": (False,), "differentiable": (False,)}
    filter_states = ("momentum_buffer",)
    proved_for = {"momentum": (0, ...), "centered": (False, True), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``E_s = 1 / (sqrt(v) + eps)``, ``W_s = wd E_s``, ``P_s = lr``."""
        hyper, v = step.hyper, step.after["square_avg"]
        if hyper["centered"]:
            v = v - step.after["grad_avg"] ** 2
            if step.dtype != torch.float64:  # there v can underflow to 0 where this square of the average does not
                v = v.clamp(min=0)
        scale = 1 / (v.sqrt() + hyper["eps"])
        frozen = LinearFilter(A=((1.0,),), B=(0.0,), C=(0.0,), D=1.0)
        return StepCoefficients(
            filter=LinearFilter.momentum(hyper["momentum"]) if hyper["momentum"] > 0 else frozen,
            preconditioner=hyper["lr"],
            gradient_operator=Diagonal(-scale if hyper["maximize"] else scale),
            coupled_decay=Diagonal(scale * hyper["weight_decay"]),
        )

    def recursion(self, step: Any) -> Any:
        """As torch documents it."""
        hyper, state, a = step.hyper, step.state, step.hyper["alpha"]
        g = (-step.gradient if hyper["maximize"] else step.gradient) + hyper["weight_decay"] * step.theta
        v = state["square_avg"] = a * state["square_avg"] + (1 - a) * g**2
        if hyper["centered"]:
            state["grad_avg"] = a * state["grad_avg"] + (1 - a) * g
            v = v - state["grad_avg"] ** 2
        update = g / (step.sqrt(v) + hyper["eps"])
        if hyper["momentum"] > 0:
            update = state["momentum_buffer"] = hyper["momentum"] * state["momentum_buffer"] + update
        return step.theta - hyper["lr"] * update

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``mu^(s-i)``."""
        return hyper["momentum"] ** (s - i)
