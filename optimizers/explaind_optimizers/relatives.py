"""Relatives of Adam and of momentum: AdaBelief, LaProp, QHAdam, QHM, AggMo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator
from explaind_optimizers.common import (
    COUNTED,
    DECAYS,
    MAXIMIZE,
    ascent,
    cautious_mask,
    decayed,
    decays,
    lengthened,
    lengthening,
    number,
    root,
    ticks,
)
from explaind_optimizers.lamb import rectification, rectified

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
    proved_for = {
        "betas": ((..., ...),),
        "step": COUNTED,
        "weight_decouple fixed_decay rectify degenerated_to_sgd ams_bound adam_debias adanorm maximize": (
            (False, False, False, False, False, False, False, True),
            (True, True, False, False, True, True, False, False),
            (True, False, False, False, True, False, True, True),
            (False, False, True, True, False, True, False, False),
            (True, False, True, False, False, True, False, False),
        ),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / (1 - b1^t) / (sqrt(v^) + eps)``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], ticks(step)
        v = step.after["max_exp_avg_var" if hyper["ams_bound"] else "exp_avg_var"].sqrt()
        rate = number(hyper["lr"])
        P: LinearOperator
        if hyper["rectify"]:
            rate, P = rectified(step, Diagonal(1 / (v + hyper["eps"])))
        else:
            P = Diagonal(1 / (v / root(1 - beta2**t) + hyper["eps"]))
        decay, sign = decays(hyper), ascent(hyper)
        u = sign * step.gradient + decay["coupled_decay"] * step.theta
        gain = (1 - beta1) * lengthening(step, u)
        return StepCoefficients(
            filter=LinearFilter(A=((beta1,),), B=(gain,), C=(beta1,), D=gain),
            preconditioner=P * (rate if hyper.get("adam_debias") else rate / (1 - beta1**t)),
            gradient_operator=sign,
            **decay,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 2 of Zhuang et al., rectified as in Liu et al."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.hyper["step"] + 1
        theta, g = decayed(step)
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * lengthened(step, g)
        v = state["exp_avg_var"] = beta2 * state["exp_avg_var"] + (1 - beta2) * (g - m) ** 2 + hyper["eps"]
        if hyper["ams_bound"]:
            v = state["max_exp_avg_var"] = step.max(state["max_exp_avg_var"], v)
        rate = hyper["lr"] if hyper["adam_debias"] else hyper["lr"] / (1 - beta1**t)
        if not hyper["rectify"]:
            return theta - rate * m / (step.sqrt(v / (1 - beta2**t)) + hyper["eps"])
        factor = rectification(step, t)
        if factor == 0:
            return theta - rate * m if hyper["degenerated_to_sgd"] else theta
        return theta - rate * factor * m / (step.sqrt(v) + hyper["eps"])

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - b1) b1^(s-i)``; AdaNorm's factors have no closed form."""
        return NotImplemented if hyper["adanorm"] else LaPropRule.alpha(self, s, i, hyper)  # type: ignore[arg-type]


class LaPropRule(UpdateRule):
    r"""LaProp of pytorch_optimizer (Ziyin et al., 2020): momentum of preconditioned gradients.

    ``v <- b2 v + (1 - b2) g^2;  m <- b1 m + (1 - b1) lr g / (sqrt(v) + eps) sqrt(1 - b2^t);
    theta <- theta - m / n`` with n the average of lr over its present value. The division stands BEFORE the momentum:
    it is E_s. Decay acts after the step, and only if decoupled (coupled decay comes too late to have an effect).

    Proved without cautious updates, which count elements, and for the implementation that rounds nothing.
    """

    optimizers = ("pytorch_optimizer.optimizer.laprop.LaProp",)
    options = COMMON | {"betas", "eps", "centered", "ams_bound", "steps_before_using_centered", "cautious"}
    attributes = {n: n for n in ("maximize", "steps_before_using_centered")}
    filter_states = ("exp_avg",)
    proved_for = {
        **DECAYS,
        "lr": (...,),
        "betas": ((..., ...),),
        "step": COUNTED,
        "centered ams_bound maximize": ((False, False, True), (False, True, False), (True, False, False)),
        "cautious": (False,),
        "foreach": (False,),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``E_s = lr sqrt(1 - b2^t) / (sqrt(v_s) + eps)``, ``P_s = (1 - rho_s) / n``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], ticks(step)
        v, sign, lr = step.after["exp_avg_sq"], ascent(hyper), number(hyper["lr"])
        if hyper["centered"] and t > hyper["steps_before_using_centered"]:
            v = v - step.after["exp_mean_avg_beta2"].square()
        if hyper["ams_bound"]:
            v = step.after["max_exp_avg_sq"]
        denominator = ((v + 1e-15).sqrt() + hyper["eps"]) / root(1 - beta2**t)
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

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of Ziyin et al., with the package's average of rates and its decay after the step."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.hyper["step"] + 1
        g, lr = -step.gradient if hyper["maximize"] else step.gradient, hyper["lr"]
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        state["exp_avg_lr_1"] = beta1 * state["exp_avg_lr_1"] + (1 - beta1) * lr
        if hyper["centered"]:
            state["exp_mean_avg_beta2"] = beta2 * state["exp_mean_avg_beta2"] + (1 - beta2) * g
            if t > hyper["steps_before_using_centered"]:
                v = v - state["exp_mean_avg_beta2"] ** 2
        if hyper["ams_bound"]:
            v = state["max_exp_avg_sq"] = step.max(state["max_exp_avg_sq"], v)
        scaled = g * step.sqrt(1 - beta2**t) / (step.sqrt(v + 1e-15) + hyper["eps"])
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * lr * scaled
        theta = step.theta - m / (state["exp_avg_lr_1"] / lr)
        if hyper["weight_decouple"]:
            theta = theta * (1 - hyper["weight_decay"] * (1 if hyper["fixed_decay"] else lr))
        return theta

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - b1) b1^(s-i)``."""
        beta1 = hyper["betas"][0]
        return (1 - beta1) * beta1 ** (s - i)


class QHAdamRule(UpdateRule):
    r"""QHAdam of pytorch_optimizer (Ma & Yarats, 2019): Adam that mixes averages with the present gradient.

    ``theta <- theta - lr (nu1 m + (1 - nu1) g) / (sqrt(nu2 v + (1 - nu2) g^2) + eps)``. The averages' weights
    ``1 / (1 + b + b^2 + ...)`` are kept in single precision: they are read from the state.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.qhadam.QHAdam",)
    options = COMMON | {"betas", "nus", "eps"}
    filter_states = ("exp_avg",)
    proved_for = {**DECAYS, "betas": ((..., ...),), "nus": ((..., ...),), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = 1 - w, B = w``, read out as ``nu1 m + (1 - nu1) u``."""
        hyper, (nu1, nu2) = step.hyper, step.hyper["nus"]
        decay, sign = decays(hyper), ascent(hyper)
        w = number(step.after["beta1_weight"].float().reciprocal())
        u = sign * step.gradient + decay["coupled_decay"] * step.theta
        v = nu2 * step.after["exp_avg_sq"] + (1 - nu2) * u.square()
        return StepCoefficients(
            filter=LinearFilter(A=((1 - w,),), B=(w,), C=(nu1 * (1 - w),), D=nu1 * w + 1 - nu1),
            preconditioner=Diagonal(hyper["lr"] / (v.sqrt() + hyper["eps"])),
            gradient_operator=sign,
            **decay,
        )

    def recursion(self, step: Any) -> Any:
        """Ma & Yarats' equations for QHAdam, with averages of weights ``1 / (1 + b + b^2 + ...)``."""
        hyper, (beta1, beta2), (nu1, nu2), state = step.hyper, step.hyper["betas"], step.hyper["nus"], step.state
        theta, g = decayed(step)
        n1 = state["beta1_weight"] = beta1 * state["beta1_weight"] + 1
        n2 = state["beta2_weight"] = beta2 * state["beta2_weight"] + 1
        m = state["exp_avg"] = (1 - 1 / n1) * state["exp_avg"] + g / n1
        v = state["exp_avg_sq"] = (1 - 1 / n2) * state["exp_avg_sq"] + g**2 / n2
        root_v = step.sqrt(nu2 * v + (1 - nu2) * g**2)
        return theta - hyper["lr"] * (nu1 * m + (1 - nu1) * g) / (root_v + hyper["eps"])


class QHMRule(UpdateRule):
    r"""QHM of pytorch_optimizer (Ma & Yarats, 2019): ``theta <- theta - lr (nu m + (1 - nu) g)``."""

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.qhm.QHM",)
    options = COMMON | {"momentum", "nu"}
    filter_states = ("momentum_buffer",)
    proved_for = {**DECAYS, "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = nu mu, D = nu (1 - mu) + 1 - nu``."""
        mu, nu = step.hyper["momentum"], step.hyper["nu"]
        return StepCoefficients(
            filter=LinearFilter(A=((mu,),), B=(1 - mu,), C=(nu * mu,), D=nu * (1 - mu) + 1 - nu),
            preconditioner=step.hyper["lr"],
            gradient_operator=ascent(step.hyper),
            **decays(step.hyper),
        )

    def recursion(self, step: Any) -> Any:
        """Ma & Yarats' equation (3)."""
        hyper, state, mu, nu, (theta, g) = (
            step.hyper,
            step.state,
            step.hyper["momentum"],
            step.hyper["nu"],
            decayed(step),
        )
        m = state["momentum_buffer"] = mu * state["momentum_buffer"] + (1 - mu) * g
        return theta - hyper["lr"] * ((1 - nu) * g + nu * m)

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``nu (1 - mu) mu^(s-i)``, and ``1 - nu`` more for the newest gradient."""
        mu, nu = hyper["momentum"], hyper["nu"]
        return nu * (1 - mu) * mu ** (s - i) + (1 - nu if i == s else 0)


class AggMoRule(UpdateRule):
    r"""AggMo of pytorch_optimizer (Lucas et al., 2019): the mean of K momentum buffers, one for each beta.

    ``m_k <- b_k m_k + g;  theta <- theta - lr (m_1 + ... + m_K) / K``. The filter has K states.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.aggmo.AggMo",)
    options = COMMON | {"betas"}
    proved_for = {**DECAYS, "betas": ((...,), (..., ...), (..., ..., ...)), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = diag(b_k)``, ``B = 1``, read out as the mean."""
        betas = step.hyper["betas"]
        count = len(betas)
        return StepCoefficients(
            filter=LinearFilter(
                A=[[beta if i == k else 0.0 for i in range(count)] for k, beta in enumerate(betas)],
                B=[1.0] * count,
                C=[beta / count for beta in betas],
                D=1.0,
            ),
            preconditioner=step.hyper["lr"],
            gradient_operator=ascent(step.hyper),
            **decays(step.hyper),
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of Lucas et al."""
        betas, state, (theta, g) = step.hyper["betas"], step.state, decayed(step)
        total = 0
        for k, beta in enumerate(betas):
            state[f"momentum_buffer_{k}"] = beta * state[f"momentum_buffer_{k}"] + g
            total = total + state[f"momentum_buffer_{k}"]
        return theta - step.hyper["lr"] / len(betas) * total

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """The mean of ``b_k^(s-i)``."""
        return sum(beta ** (s - i) for beta in hyper["betas"]) / len(hyper["betas"])
