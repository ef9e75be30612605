"""Adagrad and Adadelta: no momentum, a diagonal preconditioner from accumulated squares."""

from __future__ import annotations

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

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr_t / (sqrt(sum) + eps)``."""
        hyper = step.hyper
        lr = hyper["lr"] / (1 + (step.clock - 1) * hyper["lr_decay"])
        return StepCoefficients(
            preconditioner=Diagonal(lr / (step.after["sum"].sqrt() + hyper["eps"])),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=hyper["weight_decay"],
        )


class AdadeltaRule(UpdateRule):
    r"""torch.optim.Adadelta (Zeiler, 2012).

    ``v <- rho v + (1 - rho) g^2;  theta <- theta - lr sqrt(acc + eps) / sqrt(v + eps) g`` with ``acc`` the average of
    squared updates BEFORE this step; weight decay enters g.
    """

    optimizers = ("torch.optim.adadelta.Adadelta",)
    options = frozenset({"lr", "rho", "eps", "weight_decay", "maximize", "foreach"})
    fixed = {"capturable": (False,), "differentiable": (False,)}

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
