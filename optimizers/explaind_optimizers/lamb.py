"""LAMB."""

from __future__ import annotations

import math

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator, Scalar
from explaind_optimizers.common import ascent, ticks

__all__ = ["LambRule", "rectified"]


class LambRule(UpdateRule):
    r"""Lamb of pytorch_optimizer (You et al., 2020): Adam with a trust ratio for each tensor.

    ``m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  r = m / (sqrt(v) + eps) + wd theta;
    theta <- theta - lr / (1 - b1^t) trust r`` with ``trust = |theta| / |r|``. Both norms are taken as given.
    ``pre_norm`` divides g by the norm of all gradients, which is read off the state as a factor E_s.
    """

    optimizers = ("pytorch_optimizer.optimizer.lamb.Lamb",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "rectify", "grad_averaging", "step"}
        | {"max_grad_norm", "adam", "foreach", "maximize", "pre_norm", "n_sma_threshold", "degenerated_to_sgd"}
        | {"adanorm", "adanorm_r", "adam_debias"}
    )
    attributes = {n: n for n in ("maximize", "pre_norm", "n_sma_threshold", "degenerated_to_sgd")}
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / (1 - b1^t) trust / (sqrt(v_s) + eps)``; decay has the same factors, or ``rho_s = lr wd``."""
        hyper, beta1 = step.hyper, step.hyper["betas"][0]
        gain = 1 - beta1 if hyper["grad_averaging"] else 1.0
        adaptive = Diagonal(1 / (step.after["exp_avg_sq"].sqrt() + hyper["eps"]))
        P: LinearOperator
        rate, P = rectified(step, adaptive) if hyper["rectify"] else (float(hyper["lr"]), adaptive)
        rate /= 1.0 if hyper.get("adam_debias") else 1 - beta1 ** ticks(step)
        if rate and not hyper["adam"]:
            rate *= float(step.after["trust_ratio"])
        rho, decay = 0.0, float(hyper["weight_decay"])
        if hyper["weight_decouple"]:
            rho = decay * (1.0 if hyper["fixed_decay"] else hyper["lr"])
        elif not hyper["rectify"]:
            rho = rate * decay
        return StepCoefficients(
            filter=LinearFilter(A=((beta1,),), B=(gain,), C=(beta1,), D=gain),
            preconditioner=P * rate,
            gradient_operator=self._factor(step, beta1, gain),
            decoupled_decay=rho,
        )

    def _factor(self, step: RecordedStep, beta1: float, gain: float) -> float:
        """E_s: the sign, times the two norms' factors."""
        g = step.gradient
        if not g.any():
            return 1.0
        if step.hyper["pre_norm"]:  # the norm is over all tensors; m tells what this one's gradient was made
            before = step.before.get("exp_avg", 0 * g)
            return float(((step.after["exp_avg"] - beta1 * before) * g).sum() / (gain * g.square().sum()))
        usual = float(step.after["exp_grad_adanorm"]) if step.hyper.get("adanorm") else 0.0
        return ascent(step.hyper) * max(1.0, usual / float(g.norm()))


def rectified(step: RecordedStep, adaptive: LinearOperator) -> tuple[float, LinearOperator]:
    """RAdam's rate and preconditioner (Liu et al., 2020): no v while its variance is too large, or no step at all."""
    hyper, t = step.hyper, ticks(step)
    beta2, lr = hyper["betas"][1], float(hyper["lr"])
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t * beta2**t / (1 - beta2**t)
    if length >= hyper["n_sma_threshold"]:
        variance = (length - 4) / (limit - 4) * (length - 2) / length * limit / (limit - 2)
        return lr * math.sqrt((1 - beta2**t) * variance), adaptive
    return (lr if hyper["degenerated_to_sgd"] else 0.0), Scalar(1.0)
