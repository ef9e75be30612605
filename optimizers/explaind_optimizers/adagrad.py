"""Adagrad and Adadelta: no momentum, a diagonal preconditioner from accumulated squares."""

from __future__ import annotations

from typing import Any

import torch

from explaind_core import RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal

__all__ = ["AdadeltaRule", "AdagradRule"]


class AdagradRule(UpdateRule):
    r"""torch.optim.Adagrad (Duchi et al., 2011), dense and sparse gradients.

    ``sum <- sum + g^2;  theta <- theta - lr / (1 + (t - 1) lr_decay) g / (sqrt(sum) + eps)``; weight decay enters g.
    """

    optimizers = ("torch.optim.adagrad.Adagrad",)
    options = frozenset(
        {"lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value", "foreach", "maximize", "fused"}
    )
    fixed = {"differentiable": (False,)}
    proved_for = {"maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr_t / (sqrt(sum) + eps)``."""
        hyper = step.hyper
        lr = hyper["lr"] / (1 + (step.clock - 1) * hyper["lr_decay"])
        return StepCoefficients(
            preconditioner=Diagonal(lr / (step.after["sum"].sqrt() + hyper["eps"])),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """As torch documents it."""
        hyper, state = step.hyper, step.state
        lr = hyper["lr"] / (1 + (step.clock - 1) * hyper["lr_decay"])
        g = (-step.gradient if hyper["maximize"] else step.gradient) + hyper["weight_decay"] * step.theta
        state["sum"] = state.get("sum", hyper["initial_accumulator_value"]) + g**2
        return step.theta - lr * g / (step.sqrt(state["sum"]) + hyper["eps"])


class AdadeltaRule(UpdateRule):
    r"""torch.optim.Adadelta (Zeiler, 2012).

    ``v <- rho v + (1 - rho) g^2;  theta <- theta - lr sqrt(acc + eps) / sqrt(v + eps) g`` with ``acc`` the average of
    squared updates BEFORE this step; weight decay enters g.
    """

    optimizers = ("torch.optim.adadelta.Adadelta",)
    options = frozenset({"lr", "rho", "eps", "weight_decay", "maximize", "foreach"})
    fixed = {"capturable": (False,), "differentiable": (False,)}
    proved_for = {"maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr sqrt(acc_{s-1} + eps) / sqrt(v_s + eps)``."""
        hyper = step.hyper
        updates = step.before.get("acc_delta", torch.zeros_like(step.theta))  # created at the first step
        ratio = (updates + hyper["eps"]).sqrt() / (step.after["square_avg"] + hyper["eps"]).sqrt()
        return StepCoefficients(
            preconditioner=Diagonal(hyper["lr"] * ratio),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of Zeiler, with a learning rate and weight decay, as torch documents it."""
        hyper, state, rho = step.hyper, step.state, step.hyper["rho"]
        g = (-step.gradient if hyper["maximize"] else step.gradient) + hyper["weight_decay"] * step.theta
        state["square_avg"] = rho * state["square_avg"] + (1 - rho) * g**2
        rms_g, rms_delta = (step.sqrt(state[n] + hyper["eps"]) for n in ("square_avg", "acc_delta"))
        delta = rms_delta / rms_g * g
        state["acc_delta"] = rho * state["acc_delta"] + (1 - rho) * delta**2
        return step.theta - hyper["lr"] * delta
