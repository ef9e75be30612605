"""AdEMAMix: two averages of gradients, a fast and a slow one."""

from __future__ import annotations

import math

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator
from explaind_optimizers.common import MAXIMIZE, ascent, cautious_mask, decays, ticks

__all__ = ["AdEMAMixRule", "SimplifiedAdEMAMixRule"]


class AdEMAMixRule(UpdateRule):
    r"""AdEMAMix of pytorch_optimizer (Pagliardini et al., 2024).

    ``m1 <- b1 m1 + (1 - b1) g;  m2 <- b3 m2 + (1 - b3) g;  v <- b2 v + (1 - b2) g^2;
    theta <- theta - lr (m1^ + alpha m2) / (sqrt(v^) + eps)``, alpha and b3 warmed up over ``t_alpha_beta3`` steps. The
    filter has two states.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.ademamix.AdEMAMix",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "alpha", "t_alpha_beta3", "step"}
        | {"foreach", "maximize", "cautious", "stable_adamw"}
    )
    filter_states = ("exp_avg", "exp_avg_slow")

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = diag(b1, b3)``, ``B = (1 - b1, 1 - b3)``, read out as ``m1 / (1 - b1^t) + alpha m2``."""
        hyper, (beta1, beta2, beta3), t = step.hyper, step.hyper["betas"], ticks(step)
        alpha, warmup = hyper["alpha"], hyper["t_alpha_beta3"]
        if warmup is not None:
            alpha = min(t * alpha / warmup, alpha)
            fast, slow, done = math.log(beta1), math.log(beta3), t / warmup
            beta3 = min(math.exp(fast * slow / ((1 - done) * slow + done * fast)), beta3)
        decay, sign = decays(hyper), ascent(hyper)
        u = torch.add(sign * step.gradient, step.theta, alpha=decay["coupled_decay"])
        v = step.after["exp_avg_sq"]
        rate = hyper["lr"] / (v.sqrt() / math.sqrt(1 - beta2**t) + hyper["eps"])
        if hyper.get("stable_adamw"):
            rate = rate / max(1.0, math.sqrt(float((u.square() / v.clip(min=1e-16)).mean())))
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


class SimplifiedAdEMAMixRule(UpdateRule):
    r"""SimplifiedAdEMAMix of pytorch_optimizer (Morwani et al., 2025): the current gradient and one average of them.

    ``m <- b1 m + (1 - b1) g;  theta <- theta - lr (m + alpha g) / (sqrt(v) + n eps) / n``, n^2 the weight of all
    gradients in v, whose root the batched implementation rounds to single precision.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.ademamix.SimplifiedAdEMAMix",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "alpha", "beta1_warmup", "min_beta1"}
        | {"foreach", "maximize", "step"}
    )
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = b1, D = 1 - b1 + alpha``; ``P_s = lr / (sqrt(v_s) + n eps) / n``."""
        hyper, t = step.hyper, ticks(step)
        beta1, warmup = hyper["betas"][0], hyper["beta1_warmup"]
        if warmup and t < warmup:  # linear in the half-life
            start, end = (math.log(0.5) / math.log(b + 1e-8) - 1 for b in (hyper["min_beta1"], beta1))
            beta1 = math.pow(0.5, 1 / ((1 - t / warmup) * start + t / warmup * end + 1))
        single = torch.float64 if hyper["foreach"] is False else torch.float32
        n = torch.tensor(math.sqrt(step.after["den_sum"]), dtype=single)
        denominator = step.after["exp_avg_sq"].sqrt() + float(n * hyper["eps"])
        return StepCoefficients(
            filter=LinearFilter(A=((beta1,),), B=(1 - beta1,), C=(beta1,), D=1 - beta1 + hyper["alpha"]),
            preconditioner=Diagonal(hyper["lr"] / denominator / float(n)),
            gradient_operator=ascent(hyper),
            **decays(hyper),
        )
