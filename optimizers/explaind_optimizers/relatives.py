"""Relatives of Adam and of momentum: AdaBelief, LaProp, QHAdam, QHM, AggMo."""

from __future__ import annotations

import math

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator
from explaind_optimizers.common import MAXIMIZE, ascent, cautious_mask, decays, ticks
from explaind_optimizers.lamb import rectified

__all__ = ["AdaBeliefRule", "AggMoRule", "LaPropRule", "QHAdamRule", "QHMRule"]

COMMON = frozenset({"lr", "weight_decay", "weight_decouple", "fixed_decay", "foreach", "maximize", "step"})


class AdaBeliefRule(UpdateRule):
    r"""AdaBelief of pytorch_optimizer (Zhuang et al., 2020): Adam with the variance of g around m.

    ``v <- b2 v + (1 - b2) (g - m)^2 + eps;  theta <- theta - lr m^ / (sqrt(v^) + eps)``, optionally rectified.
    """

    optimizers = ("pytorch_optimizer.optimizer.adabelief.AdaBelief",)
    options = (
        COMMON
        | {"betas", "eps", "rectify", "ams_bound", "n_sma_threshold", "degenerated_to_sgd"}
        | {
            "adanorm",
            "adanorm_r",
            "adam_debias",
        }
    )
    attributes = {n: n for n in ("maximize", "n_sma_threshold", "degenerated_to_sgd")}
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / (1 - b1^t) / (sqrt(v^) + eps)``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], ticks(step)
        root = step.after["max_exp_avg_var" if hyper["ams_bound"] else "exp_avg_var"].sqrt()
        rate: float = float(hyper["lr"])
        P: LinearOperator
        if hyper["rectify"]:
            rate, P = rectified(step, Diagonal(1 / (root + hyper["eps"])))
        else:
            P = Diagonal(1 / (root / math.sqrt(1 - beta2**t) + hyper["eps"]))
        decay, sign = decays(hyper), ascent(hyper)
        u = sign * step.gradient + decay["coupled_decay"] * step.theta
        # AdaNorm: what is averaged is never shorter than gradients used to be.
        usual = float(step.after["exp_grad_adanorm"]) if hyper.get("adanorm") else 0.0
        gain = (1 - beta1) * (max(1.0, usual / float(u.norm())) if u.any() else 1.0)
        return StepCoefficients(
            filter=LinearFilter(A=((beta1,),), B=(gain,), C=(beta1,), D=gain),
            preconditioner=P * (rate if hyper.get("adam_debias") else rate / (1 - beta1**t)),
            gradient_operator=sign,
            **decay,
        )


class LaPropRule(UpdateRule):
    r"""LaProp of pytorch_optimizer (Ziyin et al., 2020): momentum of preconditioned gradients.

    ``v <- b2 v + (1 - b2) g^2;  m <- b1 m + (1 - b1) lr g / (sqrt(v) + eps) sqrt(1 - b2^t);
    theta <- theta - m / n`` with n the average of lr over its present value. The division stands BEFORE the momentum:
    it is E_s. Decay acts after the step, and only if decoupled (coupled decay comes too late to have an effect).
    """

    optimizers = ("pytorch_optimizer.optimizer.laprop.LaProp",)
    options = COMMON | {"betas", "eps", "centered", "ams_bound", "steps_before_using_centered", "cautious"}
    attributes = {n: n for n in ("maximize", "steps_before_using_centered")}
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``E_s = lr sqrt(1 - b2^t) / (sqrt(v_s) + eps)``, ``P_s = (1 - rho_s) / n``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], ticks(step)
        v, sign, lr = step.after["exp_avg_sq"], ascent(hyper), float(hyper["lr"])
        if hyper["centered"] and t > hyper["steps_before_using_centered"]:
            v = v - step.after["exp_mean_avg_beta2"].square()
        if hyper["ams_bound"]:
            v = step.after["max_exp_avg_sq"]
        denominator = ((v + 1e-15).sqrt() + hyper["eps"]) / math.sqrt(1 - beta2**t)
        n = step.after["exp_avg_lr_1"] / lr if lr else 1.0
        if hyper["foreach"] is not False and not hyper.get("cautious"):  # the batched implementation rounds it
            n = 1 / float(torch.tensor(1 / n, dtype=torch.float32))
        rho = decays(hyper)["decoupled_decay"]
        P: LinearOperator | float = (1 - rho) / n
        if hyper.get("cautious"):
            P = Diagonal(cautious_mask(step.after["exp_avg"], sign * step.gradient) * ((1 - rho) / n))
        return StepCoefficients(
            filter=LinearFilter.ema(beta1),
            preconditioner=P,
            gradient_operator=Diagonal(sign * lr / denominator),
            decoupled_decay=rho,
        )


class QHAdamRule(UpdateRule):
    r"""QHAdam of pytorch_optimizer (Ma & Yarats, 2019): Adam that mixes averages with the present gradient.

    ``theta <- theta - lr (nu1 m + (1 - nu1) g) / (sqrt(nu2 v + (1 - nu2) g^2) + eps)``. The averages' weights
    ``1 / (1 + b + b^2 + ...)`` are kept in single precision: they are read from the state.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.qhadam.QHAdam",)
    options = COMMON | {"betas", "nus", "eps"}
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = 1 - w, B = w``, read out as ``nu1 m + (1 - nu1) u``."""
        hyper, (nu1, nu2) = step.hyper, step.hyper["nus"]
        decay, sign = decays(hyper), ascent(hyper)
        w = float(step.after["beta1_weight"].float().reciprocal())
        u = sign * step.gradient + decay["coupled_decay"] * step.theta
        v = nu2 * step.after["exp_avg_sq"] + (1 - nu2) * u.square()
        return StepCoefficients(
            filter=LinearFilter(A=((1 - w,),), B=(w,), C=(nu1 * (1 - w),), D=nu1 * w + 1 - nu1),
            preconditioner=Diagonal(hyper["lr"] / (v.sqrt() + hyper["eps"])),
            gradient_operator=sign,
            **decay,
        )


class QHMRule(UpdateRule):
    r"""QHM of pytorch_optimizer (Ma & Yarats, 2019): ``theta <- theta - lr (nu m + (1 - nu) g)``."""

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.qhm.QHM",)
    options = COMMON | {"momentum", "nu"}
    filter_states = ("momentum_buffer",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = nu mu, D = nu (1 - mu) + 1 - nu``."""
        mu, nu = step.hyper["momentum"], step.hyper["nu"]
        return StepCoefficients(
            filter=LinearFilter(A=((mu,),), B=(1 - mu,), C=(nu * mu,), D=nu * (1 - mu) + 1 - nu),
            preconditioner=step.hyper["lr"],
            gradient_operator=ascent(step.hyper),
            **decays(step.hyper),
        )


class AggMoRule(UpdateRule):
    r"""AggMo of pytorch_optimizer (Lucas et al., 2019): the mean of K momentum buffers, one for each beta.

    ``m_k <- b_k m_k + g;  theta <- theta - lr (m_1 + ... + m_K) / K``. The filter has K states.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.aggmo.AggMo",)
    options = COMMON | {"betas"}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = diag(b_k)``, ``B = 1``, read out as the mean."""
        betas = step.hyper["betas"]
        count = len(betas)
        return StepCoefficients(
            filter=LinearFilter(
                A=[[beta * (i == k) for i in range(count)] for k, beta in enumerate(betas)],
                B=[1.0] * count,
                C=[beta / count for beta in betas],
                D=1.0,
            ),
            preconditioner=step.hyper["lr"],
            gradient_operator=ascent(step.hyper),
            **decays(step.hyper),
        )
