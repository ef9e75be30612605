"""SparseAdam: Adam of the rows that a sparse gradient touches."""

from __future__ import annotations

from typing import Any

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal

__all__ = ["SparseAdamRule"]


class SparseAdamRule(UpdateRule):
    r"""torch.optim.SparseAdam: Adam (Kingma & Ba, 2015) whose averages advance only where the gradient has a value.

    With M_s the mask of these rows, ``m <- m + (1 - b1) M_s (g - m);  v <- v + (1 - b2) M_s (g^2 - v);
    theta <- theta - lr sqrt(1 - b2^t) / (1 - b1^t) M_s m / (sqrt(v) + eps)``. A row that is left out keeps its
    averages, so the filter's coefficients are operators.
    """

    optimizers = ("torch.optim.sparse_adam.SparseAdam",)
    options = frozenset({"lr", "betas", "eps", "maximize"})
    filter_states = ("exp_avg",)
    proved_for = {"betas": ((..., ...),), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = I - (1 - b1) M_s``, ``B = (1 - b1) M_s``, ``P_s = rate M_s / (sqrt(v) + eps)``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], step.clock
        assert step.mask is not None  # torch refuses dense gradients
        kept, taken = Diagonal(1 - (1 - beta1) * step.mask), Diagonal((1 - beta1) * step.mask)
        scale = hyper["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        return StepCoefficients(
            filter=LinearFilter(A=((kept,),), B=(taken,), C=(kept,), D=taken),
            preconditioner=Diagonal(scale * step.mask / (step.after["exp_avg_sq"].sqrt() + hyper["eps"])),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
        )

    def recursion(self, step: Any) -> Any:
        """As torch does it: Adam's step for the elements that are in the gradient, nothing for the others."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.clock
        g, mask = -step.gradient if hyper["maximize"] else step.gradient, step.mask
        m = state["exp_avg"] = state["exp_avg"] + mask * (1 - beta1) * (g - state["exp_avg"])
        v = state["exp_avg_sq"] = state["exp_avg_sq"] + mask * (1 - beta2) * (g**2 - state["exp_avg_sq"])
        rate = hyper["lr"] * step.sqrt(1 - beta2**t) / (1 - beta1**t)
        return step.theta - mask * rate * m / (step.sqrt(v) + hyper["eps"])
