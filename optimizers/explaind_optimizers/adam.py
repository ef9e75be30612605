"""Adam and AdamW."""

from __future__ import annotations

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


class AdamWRule(AdamRule):
    """torch.optim.AdamW (Loshchilov & Hutter, 2019): Adam with ``r_s = lr wd theta_{s-1}``."""

    optimizers = ("torch.optim.adamw.AdamW",)
    decoupled = True
