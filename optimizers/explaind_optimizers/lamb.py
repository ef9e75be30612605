"""LAMB."""

from __future__ import annotations

from typing import Any

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator, Scalar
from explaind_optimizers.common import COUNTED, ascent, lengthened, lengthening, number, root, ticks

__all__ = ["LambRule", "rectification", "rectified"]


class LambRule(UpdateRule):
    r"""Lamb of pytorch_optimizer (You et al., 2020): Adam with a trust ratio for each tensor.

    ``m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  r = m / (sqrt(v) + eps) + wd theta;
    theta <- theta - lr / (1 - b1^t) trust r`` with ``trust = |theta| / |r|``. Both norms are taken as given.
    ``pre_norm`` divides g by the norm of all gradients, which is read off the state as a factor E_s.

    Proved without ``pre_norm``, whose norm is over other tensors too, and without ``rectify``: see AdaBeliefRule.
    """

    optimizers = ("pytorch_optimizer.optimizer.lamb.Lamb",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "weight_decouple", "fixed_decay", "rectify", "grad_averaging", "step"}
        | {"max_grad_norm", "adam", "foreach", "maximize", "pre_norm", "n_sma_threshold", "degenerated_to_sgd"}
        | {"adanorm", "adanorm_r", "adam_debias"}
    )
    attributes = {n: n for n in ("maximize", "pre_norm", "n_sma_threshold", "degenerated_to_sgd")}
    filter_states = ("exp_avg",)
    proved_for = {
        "lr": (...,),
        "betas": ((..., ...),),
        "step": COUNTED,
        "weight_decouple fixed_decay adam grad_averaging adam_debias adanorm maximize": (
            (False, False, False, True, False, False, False),
            (False, False, True, False, False, True, True),
            (True, False, False, False, True, False, True),
            (True, True, True, True, True, False, False),
        ),
        "rectify pre_norm": ((False, False),),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / (1 - b1^t) trust / (sqrt(v_s) + eps)``; decay has the same factors, or ``rho_s = lr wd``."""
        hyper, beta1 = step.hyper, step.hyper["betas"][0]
        gain = 1 - beta1 if hyper["grad_averaging"] else 1.0
        adaptive = Diagonal(1 / (step.after["exp_avg_sq"].sqrt() + hyper["eps"]))
        P: LinearOperator
        rate, P = rectified(step, adaptive) if hyper["rectify"] else (number(hyper["lr"]), adaptive)
        rate /= 1.0 if hyper.get("adam_debias") else 1 - beta1 ** ticks(step)
        if rate and not hyper["adam"]:
            rate *= number(step.after["trust_ratio"])
        rho, decay = 0.0, number(hyper["weight_decay"])
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

    def recursion(self, step: Any) -> Any:
        """Algorithm 2 of You et al., with bias correction in the rate; the norm of theta counts as 10 at most."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.hyper["step"] + 1
        g = -step.gradient if hyper["maximize"] else step.gradient
        gain = 1 - beta1 if hyper["grad_averaging"] else 1
        m = state["exp_avg"] = beta1 * state["exp_avg"] + gain * lengthened(step, g)
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        theta, rate = step.theta, hyper["lr"] if hyper["adam_debias"] else hyper["lr"] / (1 - beta1**t)
        r = m / (step.sqrt(v) + hyper["eps"])
        if hyper["weight_decouple"]:
            theta = theta * (1 - hyper["weight_decay"] * (1 if hyper["fixed_decay"] else hyper["lr"]))
        else:
            r = r + hyper["weight_decay"] * theta
        state["trust_ratio"] = step.min(step.norm(theta), 10) / (step.norm(r) + hyper["eps"])
        return theta - rate * r * (1 if hyper["adam"] else state["trust_ratio"])

    def _factor(self, step: RecordedStep, beta1: float, gain: float) -> float:
        """E_s: the sign, times the two norms' factors."""
        g = step.gradient
        if not g.any():
            return 1.0
        if step.hyper["pre_norm"]:  # the norm is over all tensors; m tells what this one's gradient was made
            before = step.before.get("exp_avg", 0 * g)
            return float(((step.after["exp_avg"] - beta1 * before) * g).sum() / (gain * g.square().sum()))
        return ascent(step.hyper) * lengthening(step, g)


def rectified(step: RecordedStep, adaptive: LinearOperator) -> tuple[float, LinearOperator]:
    """RAdam's rate and preconditioner (Liu et al., 2020): no v while its variance is too large, or no step at all."""
    hyper, t = step.hyper, ticks(step)
    beta2, lr = hyper["betas"][1], number(hyper["lr"])
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * t * beta2**t / (1 - beta2**t)
    if length >= hyper["n_sma_threshold"]:
        variance = (length - 4) / (limit - 4) * (length - 2) / length * limit / (limit - 2)
        return lr * root((1 - beta2**t) * variance), adaptive
    return (lr if hyper["degenerated_to_sgd"] else 0.0), Scalar(1.0)


def rectification(step: Any, t: Any) -> Any:
    """For a ``recursion``: algorithm 2 of Liu et al., r_t times the bias correction of v; 0 where v is left out."""
    beta2 = step.hyper["betas"][1]
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    if rho < step.hyper["n_sma_threshold"]:
        return 0
    r_squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return step.sqrt((1 - beta2**t) * r_squared)
