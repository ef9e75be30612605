"""Adafactor."""

from __future__ import annotations

from typing import Any

import torch

from explaind_core import RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal

__all__ = ["AdafactorRule"]


class AdafactorRule(UpdateRule):
    r"""torch.optim.Adafactor (Shazeer & Stern, 2018): factored second moments, clipped and relative step sizes.

    ``U = g rsqrt(max(V^, eps1^2));  theta <- (1 - lr wd) theta - max(eps2, RMS(theta)) min(lr, 1 / sqrt t) U /
    max(1, RMS(U) / d)``, with V^ the outer product of row and column averages for tensors of two axes and more.
    """

    optimizers = ("torch.optim.Adafactor", "torch.optim._adafactor.Adafactor")
    options = frozenset({"lr", "beta2_decay", "eps", "d", "weight_decay", "foreach", "maximize"})
    proved_for = {"eps": ((None, ...), (..., ...)), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = max(eps2, RMS(theta)) min(lr, 1 / sqrt t) / max(1, RMS(U) / d) rsqrt(max(V^, eps1^2))``."""
        hyper, (eps1, eps2) = step.hyper, step.hyper["eps"]
        if eps1 is None:
            eps1 = torch.finfo(step.dtype).eps
        if step.gradient.ndim > 1:
            row, column = step.after["row_var"], step.after["col_var"]
            estimate = row @ column / row.mean(dim=-2, keepdim=True).clamp(min=eps1)
        else:
            estimate = step.after["variance"]
        inverse = estimate.clamp(min=eps1 * eps1).rsqrt()
        rms = (inverse * step.gradient).square().mean().sqrt()
        size = max(eps2, step.theta.square().mean().sqrt().item()) * min(hyper["lr"], step.clock**-0.5)
        return StepCoefficients(
            preconditioner=Diagonal(inverse * size / max(1.0, rms.item() / hyper["d"])),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            decoupled_decay=hyper["lr"] * hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 4 of Shazeer & Stern, for vectors, which are not factored; with torch's weight decay."""
        hyper, state, t, (eps1, eps2) = step.hyper, step.state, step.clock, step.hyper["eps"]
        eps1 = torch.finfo(torch.float64).eps if eps1 is None else eps1
        g = -step.gradient if hyper["maximize"] else step.gradient
        weight = t ** hyper["beta2_decay"]
        state["variance"] = (1 - weight) * state["variance"] + weight * g**2
        u = g / step.sqrt(step.max(state["variance"], eps1**2))
        u = u / max(1, step.sqrt(step.mean(u**2)) / hyper["d"])
        rate = max(eps2, step.sqrt(step.mean(step.theta**2))) * min(hyper["lr"], 1 / step.sqrt(t))
        return (1 - hyper["lr"] * hyper["weight_decay"]) * step.theta - rate * u
