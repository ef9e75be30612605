"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal

__all__ = ["AdamRule", "AdamWRule"]


class AdamRule(UpdateRule):
    r"""torch.optim.Adam (Kingma & Ba, 2015), with every option of torch but ``capturable``.

    ``m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  theta <- theta - lr m^ / (sqrt(v^) + eps)`` with
    ``m^ = m / (1 - b1^t)``, ``v^ = v / (1 - b2^t)``; amsgrad takes the largest v so far. Weight decay enters g
    (``W_s = wd``), or acts on its own (``rho_s = lr wd``) where ``decoupled_weight_decay`` is set.

    Example:
        >>> AdamRule.filter_states
        ('exp_avg',)
    """

    optimizers = ("torch.optim.adam.Adam",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "fused", "decoupled_weight_decay"}
    )
    fixed = {"capturable": (False,), "differentiable": (False,)}
    filter_states = ("exp_avg",)
    proved_for = {
        "betas": ((..., ...),),
        "amsgrad": (False, True),
        "maximize": (False, True),
        "decoupled_weight_decay": (False, True),
    }
    decoupled = False

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``alpha_{s,i} = (1 - b1) b1^(s-i) / (1 - b1^t)``, ``P_s = lr / (sqrt(v^) + eps)`` (paper, Theorem 3.1)."""
        hyper, (beta1, beta2) = step.hyper, step.hyper["betas"]
        second_moment = step.after["max_exp_avg_sq" if hyper["amsgrad"] else "exp_avg_sq"] / (1 - beta2**step.clock)
        decoupled = hyper.get("decoupled_weight_decay", self.decoupled)
        return StepCoefficients(
            filter=LinearFilter.ema(beta1, bias_correction=step.clock),
            preconditioner=Diagonal(hyper["lr"] / (second_moment.sqrt() + hyper["eps"])),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=0.0 if decoupled else hyper["weight_decay"],
            decoupled_decay=hyper["lr"] * hyper["weight_decay"] if decoupled else 0.0,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of Kingma & Ba, algorithm 2 of Loshchilov & Hutter, and amsgrad as torch does it."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.clock
        theta, g = step.theta, -step.gradient if hyper["maximize"] else step.gradient
        if hyper["decoupled_weight_decay"]:
            theta = theta - hyper["lr"] * hyper["weight_decay"] * theta
        else:
            g = g + hyper["weight_decay"] * theta
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        if hyper["amsgrad"]:
            v = state["max_exp_avg_sq"] = step.max(state["max_exp_avg_sq"], v)
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        return theta - hyper["lr"] * m_hat / (step.sqrt(v_hat) + hyper["eps"])

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - b1) b1^(s-i) / (1 - b1^s)`` (paper, Theorem 3.1; the learning rate is in P_s)."""
        beta1 = hyper["betas"][0]
        return (1 - beta1) * beta1 ** (s - i) / (1 - beta1**s)


class AdamWRule(AdamRule):
    """torch.optim.AdamW (Loshchilov & Hutter, 2019): Adam with ``r_s = lr wd theta_{s-1}``."""

    optimizers = ("torch.optim.adamw.AdamW",)
    decoupled = True
    proved_for = {**AdamRule.proved_for, "decoupled_weight_decay": (True,)}
