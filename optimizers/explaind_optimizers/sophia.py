"""Sophia: momentum over a diagonal Hessian, clipped."""

from __future__ import annotations

import torch
from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal
from explaind_optimizers.aside import OptionsAside, ascent, decays

__all__ = ["SophiaGRule", "SophiaHRule"]


def clipped(m: Tensor, h: Tensor, bound: float) -> Tensor:
    """``clip(m / h, -bound, bound) / m``: the smaller of ``1 / h`` and ``bound / |m|``."""
    size = m.abs()
    return torch.where(size > bound * h, bound / size.clamp(min=torch.finfo(m.dtype).tiny), 1 / h)


class SophiaHRule(OptionsAside):
    r"""SophiaH of pytorch_optimizer (Liu et al., 2023): Hutchinson's estimate of the Hessian's diagonal h.

    ``m <- b1 m + (1 - b1) g;  theta <- theta - lr clip(m / max(h, eps), p)``. h is an average of random estimates, or
    of what ``step(hessian=...)`` was given: it is taken from the state.
    """

    optimizers = ("pytorch_optimizer.optimizer.sophia.SophiaH",)
    options = frozenset(
        {"lr", "betas", "weight_decay", "weight_decouple", "fixed_decay", "p", "eps", "foreach", "maximize", "step"}
        | {"update_period", "num_samples", "hessian_distribution"}
    )
    aside = {
        "maximize": "maximize",
        "update_period": "update_period",
        "num_samples": "num_samples",
        "hessian_distribution": "distribution",
    }
    filter_states = ("momentum",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr min(1 / max(h, eps), p / |m_s|)``."""
        hyper = step.hyper
        h = step.after["hessian_moment"].clamp(min=hyper["eps"])
        return StepCoefficients(
            filter=LinearFilter.ema(hyper["betas"][0]),
            preconditioner=Diagonal(clipped(step.after["momentum"], h, hyper["p"]) * hyper["lr"]),
            gradient_operator=ascent(hyper),
            **decays(hyper),
        )


class SophiaGRule(UpdateRule):
    r"""SophiaG, the authors' optimizer (Liu et al., 2023): the Hessian's diagonal by Gauss-Newton-Bartlett.

    ``m <- b1 m + (1 - b1) g;  theta <- (1 - lr wd) theta - lr clip(m / (rho bs h), 1)``. h changes in
    ``update_hessian()``, between steps: it is taken from the state. ``bs`` is an argument of ``step``; it is
    taken to have its default.
    """

    optimizers = ("sophia.SophiaG",)
    options = frozenset({"lr", "betas", "rho", "weight_decay", "maximize"})
    fixed = {"capturable": (False,)}
    filter_states = ("exp_avg",)
    batch_size = 5120

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr min(1 / (rho bs h), 1 / |m_s|)``, ``rho_s = lr wd``."""
        hyper = step.hyper
        h = hyper["rho"] * self.batch_size * step.after["hessian"] + 1e-15
        return StepCoefficients(
            filter=LinearFilter.ema(hyper["betas"][0]),
            preconditioner=Diagonal(clipped(step.after["exp_avg"], h, 1.0) * hyper["lr"]),
            gradient_operator=ascent(hyper),
            decoupled_decay=hyper["lr"] * hyper["weight_decay"],
        )
