"""Relatives of Adam with one average of gradients: Adamax, NAdam, RAdam."""

from __future__ import annotations

from typing import Any

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, Scalar
from explaind_optimizers.adam import AdamRule

__all__ = ["AdamaxRule", "NAdamRule", "RAdamRule"]


class AdamaxRule(UpdateRule):
    r"""torch.optim.Adamax (Kingma & Ba, 2015): Adam with the infinity norm.

    ``u <- max(b2 u, |g| + eps);  theta <- theta - lr m^ / u``; weight decay enters g.
    """

    optimizers = ("torch.optim.adamax.Adamax",)
    options = frozenset({"lr", "betas", "eps", "weight_decay", "maximize", "foreach"})
    fixed = {"capturable": (False,), "differentiable": (False,)}
    filter_states = ("exp_avg",)
    proved_for = {"betas": ((..., ...),), "maximize": (False, True)}
    alpha = AdamRule.alpha

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / u_s``."""
        hyper = step.hyper
        return StepCoefficients(
            filter=LinearFilter.ema(hyper["betas"][0], bias_correction=step.clock),
            preconditioner=Diagonal(hyper["lr"] / step.after["exp_inf"]),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 2 of Kingma & Ba, with torch's eps."""
        hyper, (beta1, beta2), state = step.hyper, step.hyper["betas"], step.state
        g = (-step.gradient if hyper["maximize"] else step.gradient) + hyper["weight_decay"] * step.theta
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        u = state["exp_inf"] = step.max(beta2 * state["exp_inf"], abs(g) + hyper["eps"])
        return step.theta - hyper["lr"] / (1 - beta1**step.clock) * m / u


class NAdamRule(UpdateRule):
    r"""torch.optim.NAdam (Dozat, 2016): Adam with Nesterov momentum and a schedule of it.

    ``mu_t = b1 (1 - 0.96^(t momentum_decay) / 2);  theta <- theta - lr [ (1 - mu_t) g / (1 - prod_t) +
    mu_{t+1} m / (1 - prod_t mu_{t+1}) ] / (sqrt(v^) + eps)``, prod the product of all mu so far, which torch
    keeps in single precision: it is read from the state.
    """

    optimizers = ("torch.optim.nadam.NAdam",)
    options = frozenset(
        {"lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "maximize", "foreach"}
    )
    fixed = {"capturable": (False,), "differentiable": (False,)}
    filter_states = ("exp_avg",)
    proved_for = {"betas": ((..., ...),), "maximize": (False, True), "decoupled_weight_decay": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = cm b1, D = cm (1 - b1) + cg``; ``P_s = lr / (sqrt(v^) + eps)``."""
        hyper, (beta1, beta2) = step.hyper, step.hyper["betas"]
        mu, following = (
            beta1 * (1 - 0.5 * 0.96 ** (t * hyper["momentum_decay"])) for t in (step.clock, step.clock + 1)
        )
        product = step.after["mu_product"].item()
        cg, cm = (1 - mu) / (1 - product), following / (1 - product * following)
        second_moment = step.after["exp_avg_sq"] / (1 - beta2**step.clock)
        decoupled = hyper["decoupled_weight_decay"]
        return StepCoefficients(
            filter=LinearFilter(A=((beta1,),), B=(1 - beta1,), C=(cm * beta1,), D=cm * (1 - beta1) + cg),
            preconditioner=Diagonal(hyper["lr"] / (second_moment.sqrt() + hyper["eps"])),
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=0.0 if decoupled else hyper["weight_decay"],
            decoupled_decay=hyper["lr"] * hyper["weight_decay"] if decoupled else 0.0,
        )

    def recursion(self, step: Any) -> Any:
        """As torch documents it, in exact arithmetic. alpha has no closed form, because of the product of all mu."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.clock
        theta, g = step.theta, -step.gradient if hyper["maximize"] else step.gradient
        if hyper["decoupled_weight_decay"]:
            theta = theta * (1 - hyper["lr"] * hyper["weight_decay"])
        else:
            g = g + hyper["weight_decay"] * theta
        mu = beta1 * (1 - 0.96 ** (t * hyper["momentum_decay"]) / 2)
        mu_next = beta1 * (1 - 0.96 ** ((t + 1) * hyper["momentum_decay"]) / 2)
        state["mu_product"] = state.get("mu_product", 1) * mu
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        m_hat = mu_next * m / (1 - state["mu_product"] * mu_next) + (1 - mu) * g / (1 - state["mu_product"])
        return theta - hyper["lr"] * m_hat / (step.sqrt(v / (1 - beta2**t)) + hyper["eps"])


class RAdamRule(UpdateRule):
    r"""torch.optim.RAdam (Liu et al., 2020): Adam, rectified; without v while its variance is too large.

    ``rho_t = rho_inf - 2 t b2^t / (1 - b2^t)``; where ``rho_t > 5``, ``theta <- theta - lr r_t m^ sqrt(1 - b2^t) /
    (sqrt(v) + eps)``, and before that ``theta <- theta - lr m^``.
    """

    optimizers = ("torch.optim.radam.RAdam",)
    options = frozenset({"lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "foreach"})
    fixed = {"capturable": (False,), "differentiable": (False,)}
    filter_states = ("exp_avg",)
    proved_for = {"betas": ((..., ...),), "maximize": (False, True), "decoupled_weight_decay": (False, True)}
    alpha = AdamRule.alpha

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr r_t sqrt(1 - b2^t) / (sqrt(v) + eps)`` or ``lr``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], step.clock
        correction, limit = 1 - beta2**t, 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / correction
        preconditioner: Diagonal | Scalar = Scalar(hyper["lr"])
        if length > 5:
            rectified = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            scale = hyper["lr"] * (rectified * correction) ** 0.5
            preconditioner = Diagonal(scale / (step.after["exp_avg_sq"].sqrt() + hyper["eps"]))
        decoupled = hyper["decoupled_weight_decay"]
        return StepCoefficients(
            filter=LinearFilter.ema(beta1, bias_correction=t),
            preconditioner=preconditioner,
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=0.0 if decoupled else hyper["weight_decay"],
            decoupled_decay=hyper["lr"] * hyper["weight_decay"] if decoupled else 0.0,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 2 of Liu et al., with torch's threshold of 5."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.clock
        theta, g = step.theta, -step.gradient if hyper["maximize"] else step.gradient
        if hyper["decoupled_weight_decay"]:
            theta = theta * (1 - hyper["lr"] * hyper["weight_decay"])
        else:
            g = g + hyper["weight_decay"] * theta
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            r = step.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            return theta - hyper["lr"] * m_hat * r * step.sqrt(1 - beta2**t) / (step.sqrt(v) + hyper["eps"])
        return theta - hyper["lr"] * m_hat
