"""Sophia: momentum over a diagonal Hessian, clipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, OfReadout, is_symbolic
from explaind_optimizers.common import DECAYS, ascent, decayed, decays

__all__ = ["SophiaGRule", "SophiaHRule"]


def clipped(m: Tensor, h: Tensor, bound: float) -> Tensor:
    """``clip(m / h, -bound, bound) / m``: the smaller of ``1 / h`` and ``bound / |m|``.

    Args:
        m: the average of gradients.
        h: the scaled Hessian estimate.
        bound: of the quotient's magnitude.
    """
    size = m.abs()
    smallest = 0.0 if is_symbolic(m) else torch.finfo(m.dtype).tiny
    return torch.where(size > bound * h, bound / size.clamp(min=smallest), 1 / h)


def clip(x: Any, bound: Any) -> Any:
    """For a ``recursion``: ``clip(x, -bound, bound)``."""
    return bound * x / abs(x) if abs(x) > bound else x


def averaged(_: Any, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
    """``(1 - b1) b1^(s-i)``."""
    beta1 = hyper["betas"][0]
    return (1 - beta1) * beta1 ** (s - i)


class SophiaHRule(UpdateRule):
    r"""SophiaH of pytorch_optimizer (Liu et al., 2023): Hutchinson's estimate of the Hessian's diagonal h.

    ``m <- b1 m + (1 - b1) g;  theta <- theta - lr clip(m / max(h, eps), p)``. h is an average of random estimates, or
    of what ``step(hessian=...)`` was given: it is taken from the state.
    """

    optimizers = ("pytorch_optimizer.optimizer.sophia.SophiaH",)
    options = frozenset(
        {"lr", "betas", "weight_decay", "weight_decouple", "fixed_decay", "p", "eps", "foreach", "maximize", "step"}
        | {"update_period", "num_samples", "hessian_distribution"}
    )
    attributes = {
        "maximize": "maximize",
        "update_period": "update_period",
        "num_samples": "num_samples",
        "hessian_distribution": "distribution",
    }
    filter_states = ("momentum",)
    proved_for = {**DECAYS, "betas": ((..., ...),), "maximize": (False, True)}
    alpha = averaged
    outside = ("hessian",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr min(1 / max(h, eps), p / |m_s|)``."""
        hyper = step.hyper
        h = step.after["hessian_moment"].clamp(min=hyper["eps"])
        return StepCoefficients(
            filter=LinearFilter.ema(hyper["betas"][0]),
            preconditioner=OfReadout(lambda m: Diagonal(clipped(m, h, hyper["p"]) * hyper["lr"])),
            gradient_operator=ascent(hyper),
            **decays(hyper),
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 3 of Liu et al.; whatever the estimates are."""
        hyper, (beta1, beta2), state, (theta, g) = step.hyper, step.hyper["betas"], step.state, decayed(step)
        m = state["momentum"] = beta1 * state["momentum"] + (1 - beta1) * g
        h = state["hessian_moment"] = beta2 * state["hessian_moment"] + (1 - beta2) * step.given("hessian")
        return theta - hyper["lr"] * clip(m / step.max(h, hyper["eps"]), hyper["p"])

    def replay_step(self, optimizer: torch.optim.Optimizer, outside: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Give the recorded estimates where a step had new ones: there is no graph to make them from."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        first = optimizer.param_groups[0]
        if not outside and first.get("step", 0) % first["update_period"] != 0:
            optimizer.step()
            return
        held = {p: optimizer.state[p]["hessian"] for p in parameters if "hessian" in optimizer.state.get(p, {})}
        known = {**held, **{p: entries["hessian"] for p, entries in outside.items()}}
        optimizer.step(hessian=[known.get(p, torch.zeros_like(p)).clone() for p in parameters])  # type: ignore[call-overload]
        for p in parameters:
            if p not in known:  # it has no gradient, and the real optimizer no estimate of it
                del optimizer.state[p]["hessian"]
                if not optimizer.state[p]:
                    del optimizer.state[p]


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
    proved_for = {"betas": ((..., ...),), "maximize": (False, True)}
    alpha = averaged
    outside = ("hessian",)
    batch_size = 5120

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr min(1 / (rho bs h), 1 / |m_s|)``, ``rho_s = lr wd``."""
        hyper = step.hyper
        h = hyper["rho"] * self.batch_size * step.after["hessian"] + 1e-15
        return StepCoefficients(
            filter=LinearFilter.ema(hyper["betas"][0]),
            preconditioner=OfReadout(lambda m: Diagonal(clipped(m, h, 1.0) * hyper["lr"])),
            gradient_operator=ascent(hyper),
            decoupled_decay=hyper["lr"] * hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 3 of Liu et al., as its authors' code has it; whatever the estimates are, they are not negative."""
        hyper, beta1, state, (theta, g) = step.hyper, step.hyper["betas"][0], step.state, decayed(step, decoupled=True)
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        h = state["hessian"] = step.given("hessian", nonnegative=True)
        ratio = m / (hyper["rho"] * self.batch_size * h + 1e-15)
        return theta - hyper["lr"] * clip(ratio, 1)

    def replay_step(self, optimizer: torch.optim.Optimizer, outside: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Set the Hessian as it stood; before its first step the optimizer makes it itself."""
        for p, entries in outside.items():
            if optimizer.state.get(p):
                optimizer.state[p]["hessian"] = entries["hessian"].clone()
        optimizer.step()
