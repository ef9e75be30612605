"""AdEMAMix: two averages of gradients, a fast and a slow one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator
from explaind_optimizers.common import (
    COUNTED,
    MAXIMIZE,
    ascent,
    cautious_mask,
    decayed,
    decays,
    exp,
    log,
    number,
    root,
    ticks,
)

__all__ = ["AdEMAMixRule", "SimplifiedAdEMAMixRule"]


class AdEMAMixRule(UpdateRule):
    r"""AdEMAMix of pytorch_optimizer (Pagliardini et al., 2024).

    ``m1 <- b1 m1 + (1 - b1) g;  m2 <- b3 m2 + (1 - b3) g;  v <- b2 v + (1 - b2) g^2;
    theta <- theta - lr (m1^ + alpha m2) / (sqrt(v^) + eps)``, alpha and b3 warmed up over ``t_alpha_beta3`` steps. The
    filter has two states.

    Proved without cautious updates, which count elements.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.ademamix.AdEMAMix",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "alpha", "t_alpha_beta3", "step"}
        | {"foreach", "maximize", "cautious", "stable_adamw"}
    )
    filter_states = ("exp_avg", "exp_avg_slow")
    proved_for = {
        "betas": ((..., ..., ...),),
        "step": COUNTED,
        "weight_decouple fixed_decay t_alpha_beta3 stable_adamw maximize": (
            (False, False, None, False, True),
            (True, False, None, True, False),
            (True, True, ..., False, False),
        ),
        "cautious": (False,),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = diag(b1, b3)``, ``B = (1 - b1, 1 - b3)``, read out as ``m1 / (1 - b1^t) + alpha m2``."""
        hyper, (beta1, beta2, beta3), t = step.hyper, step.hyper["betas"], ticks(step)
        alpha, warmup = hyper["alpha"], hyper["t_alpha_beta3"]
        if warmup is not None:
            alpha = min(t * alpha / warmup, alpha)
            fast, slow, done = log(beta1), log(beta3), t / warmup
            beta3 = min(exp(fast * slow / ((1 - done) * slow + done * fast)), beta3)
        decay, sign = decays(hyper), ascent(hyper)
        u = torch.add(sign * step.gradient, step.theta, alpha=decay["coupled_decay"])
        v = step.after["exp_avg_sq"]
        rate = hyper["lr"] / (v.sqrt() / root(1 - beta2**t) + hyper["eps"])
        if hyper.get("stable_adamw"):
            rate = rate / max(1.0, root(number((u.square() / v.clip(min=1e-16)).mean())))
        scale = 1 / (1 - beta1**t)
        c, d = scale * beta1, scale * (1 - beta1) + alpha * (1 - beta3)
        C: float | LinearOperator = c
        D: float | LinearOperator = d
        if hyper.get("cautious"):  # only the fast average is masked
            mask = cautious_mask(step.after["exp_avg"], u)
            C, D = Diagonal(mask * c), Diagonal(mask * (scale * (1 - beta1)) + alpha * (1 - beta3))
        return StepCoefficients(
            filter=LinearFilter(A=((beta1, 0.0), (0.0, beta3)), B=(1 - beta1, 1 - beta3), C=(C, alpha * beta3), D=D),
            preconditioner=Diagonal(rate),
            gradient_operator=sign,
            **decay,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of Pagliardini et al. with its schedulers, and StableAdamW's smaller rate."""
        hyper, (beta1, beta2, beta3), state, t = step.hyper, step.hyper["betas"], step.state, step.hyper["step"] + 1
        (theta, g), alpha, warmup = decayed(step), hyper["alpha"], hyper["t_alpha_beta3"]
        if warmup is not None:
            fast, slow = step.log(beta1), step.log(beta3)
            warmed_up = step.exp(fast * slow / ((1 - t / warmup) * slow + t / warmup * fast))
            alpha, beta3 = step.min(alpha * t / warmup, alpha), step.min(warmed_up, beta3)
        m1 = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        m2 = state["exp_avg_slow"] = beta3 * state["exp_avg_slow"] + (1 - beta3) * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        update = (m1 / (1 - beta1**t) + alpha * m2) / (step.sqrt(v / (1 - beta2**t)) + hyper["eps"])
        if hyper["stable_adamw"]:
            rms = step.sqrt(step.mean(g**2 / step.max(v, 1e-16)))
            update = update / rms if rms > 1 else update
        return theta - hyper["lr"] * update

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - b1) b1^(s-i) / (1 - b1^s) + alpha (1 - b3) b3^(s-i)``, without warm-up."""
        if hyper["t_alpha_beta3"] is not None:
            return NotImplemented
        beta1, _, beta3 = hyper["betas"]
        slow = hyper["alpha"] * (1 - beta3) * beta3 ** (s - i)
        return (1 - beta1) * beta1 ** (s - i) / (1 - beta1**s) + slow


class SimplifiedAdEMAMixRule(UpdateRule):
    r"""SimplifiedAdEMAMix of pytorch_optimizer (Morwani et al., 2025): the current gradient and one average of them.

    ``m <- b1 m + (1 - b1) g;  theta <- theta - lr (m + alpha g) / (sqrt(v) + n eps) / n``, n^2 the weight of all
    gradients in v, whose root the batched implementation rounds to single precision.

    Proved without warm-up, and for the implementation that rounds nothing.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.ademamix.SimplifiedAdEMAMix",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "alpha", "beta1_warmup", "min_beta1"}
        | {"foreach", "maximize", "step"}
    )
    filter_states = ("exp_avg",)
    proved_for = {
        "betas": ((..., ...),),
        "step": COUNTED,
        "weight_decouple fixed_decay beta1_warmup maximize": (
            (False, False, None, True),
            (True, False, None, False),
            (True, True, None, False),
        ),
        "foreach": (False,),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = b1, D = 1 - b1 + alpha``; ``P_s = lr / (sqrt(v_s) + n eps) / n``."""
        hyper, t = step.hyper, ticks(step)
        beta1, warmup = hyper["betas"][0], hyper["beta1_warmup"]
        if warmup and t < warmup:  # linear in the half-life
            start, end = (log(0.5) / log(b + 1e-8) - 1 for b in (hyper["min_beta1"], beta1))
            beta1 = 0.5 ** (1 / ((1 - t / warmup) * start + t / warmup * end + 1))
        n = root(step.after["den_sum"])
        offset = n * hyper["eps"]
        if hyper["foreach"] is not False:
            single = torch.tensor(n, dtype=torch.float32)
            n, offset = float(single), float(single * hyper["eps"])
        denominator = step.after["exp_avg_sq"].sqrt() + offset
        return StepCoefficients(
            filter=LinearFilter(A=((beta1,),), B=(1 - beta1,), C=(beta1,), D=1 - beta1 + hyper["alpha"]),
            preconditioner=Diagonal(hyper["lr"] / denominator / n),
            gradient_operator=ascent(hyper),
            **decays(hyper),
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 2 of Morwani et al., in its simplified form."""
        hyper, (beta1, beta2), state, (theta, g) = step.hyper, step.hyper["betas"], step.state, decayed(step)
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        weight = state["den_sum"] = beta2 * state["den_sum"] + (1 - beta2)
        n = step.sqrt(weight)
        return theta - hyper["lr"] * (m + hyper["alpha"] * g) / (step.sqrt(v) + n * hyper["eps"]) / n

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - b1) b1^(s-i)``, and ``alpha`` more for the newest gradient."""
        beta1 = hyper["betas"][0]
        return (1 - beta1) * beta1 ** (s - i) + (hyper["alpha"] if i == s else 0)
