"""Prodigy."""

from __future__ import annotations

from typing import Any

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal
from explaind_optimizers.common import COUNTED, DECAYS, MAXIMIZE, ascent, number, root

__all__ = ["ProdigyRule", "PytorchOptimizerProdigyRule"]


class ProdigyRule(UpdateRule):
    r"""Prodigy of prodigyopt (Mishchenko & Defazio, 2024): Adam that estimates its own rate d.

    ``m <- b1 m + (1 - b1) d g;  v <- b2 v + (1 - b2) d^2 g^2;  theta <- theta - d lr m / (sqrt(v) + d' eps)``, d' the
    estimate after this step. d is a number made of all tensors; the optimizer notes it down in its groups. All groups
    are taken to share betas, ``decouple`` and ``use_bias_correction``: the optimizer reads the first group's.

    Proved for any values of d, and for rates that are not 0: the optimizer then takes the other groups' rate.
    """

    optimizers = ("prodigyopt.prodigy.Prodigy",)
    options = frozenset(
        {"lr", "betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup", "d0"}
        | {"d_coef", "growth_rate", "slice_p", "d", "d_max", "d_hat", "d_numerator", "d_denom", "k"}
    )
    fixed = {"fsdp_in_use": (False,)}
    filter_states = ("exp_avg",)
    proved_for = {
        "lr": (...,),
        "k": COUNTED,
        "betas": ((..., ...), (0, ...)),
        "decouple": (False, True),
        "use_bias_correction": (False, True),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``E_s = d``, ``P_s = d lr / (sqrt(v_s) + d' eps)``, ``W_s = d wd`` or ``rho_s = d lr wd``."""
        hyper, (beta1, beta2) = step.hyper, step.hyper["betas"]
        d, k = number(hyper["d"]), hyper["k"]
        rate = d * hyper["lr"]
        if hyper["use_bias_correction"]:
            rate *= root(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1))
        decay, decoupled = hyper["weight_decay"], hyper["decouple"]
        denominator = step.after["exp_avg_sq"].sqrt() + number(step.hyper_after["d"]) * hyper["eps"]
        filter_ = LinearFilter.ema(beta1)
        if beta1 == 0 or hyper["lr"] == 0:  # averages stand still, if there are any
            filter_ = LinearFilter(A=((1.0,),), B=(0.0,), C=(float(beta1 > 0),), D=float(beta1 == 0))
        if step.hyper_after["k"] == k:  # no gradient but zeros so far: it does not step
            rate = 0.0
        elif hyper["lr"] == 0 and beta1 > 0:  # the largest rate of all groups moves this one along its averages
            along = step.after["exp_avg"] / denominator + (decay if decoupled else 0.0) * step.theta
            size = float(along.square().sum())
            rate = -float((step.displacement * along).sum()) / size if size else 0.0
        scale = d if beta1 > 0 else number(step.hyper_after["d"])  # without averages it takes the new estimate
        return StepCoefficients(
            filter=filter_,
            preconditioner=Diagonal(rate / denominator),
            gradient_operator=scale,
            coupled_decay=0.0 if decoupled else scale * decay,
            decoupled_decay=rate * decay if decoupled else 0.0,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 4 of Mishchenko & Defazio, for whatever the next d is: it is made of sums over all tensors."""
        hyper, (beta1, beta2), state, k = step.hyper, step.hyper["betas"], step.state, step.hyper["k"]
        theta, g, d = step.theta, step.gradient, hyper["d"]
        step.hyper_after["k"] = k + 1
        d_next = step.hyper_after["d"] = step.given("d_next", nonnegative=True)
        rate = d * hyper["lr"]
        if hyper["use_bias_correction"]:
            rate = rate * step.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1))
        if hyper["decouple"]:
            theta = theta - rate * hyper["weight_decay"] * theta
        else:
            g = g + hyper["weight_decay"] * theta
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2 * g**2
        if beta1 == 0:
            return theta - rate * d_next * g / (step.sqrt(v) + d_next * hyper["eps"])
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * d * g
        return theta - rate * m / (step.sqrt(v) + d_next * hyper["eps"])


class PytorchOptimizerProdigyRule(UpdateRule):
    r"""Prodigy of pytorch_optimizer: as :class:`ProdigyRule`, with another clock and another weight decay.

    Without ``eps`` it moves by ``d lr atan2(m, sqrt(v))``. Decay that is not decoupled has no effect: it enters the
    gradient when that has been used already. All groups are taken to share their learning rate and betas.

    Proved for any values of d and of the sum that it is divided by, with ``eps``.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.prodigy.Prodigy",)
    options = frozenset(
        {"lr", "betas", "beta3", "eps", "weight_decay", "weight_decouple", "fixed_decay", "bias_correction", "d0"}
        | {"safeguard_warmup", "d_coef", "growth_rate", "foreach", "maximize", "step", "d", "d_max", "d_hat"}
        | {"d_numerator", "d_de_nom"}
    )
    filter_states = ("exp_avg",)
    proved_for = {
        **DECAYS,
        "betas": ((..., ...),),
        "bias_correction": (False, True),
        "maximize": (False, True),
        "eps": (...,),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = d lr / (sqrt(v_s) + d' eps)``, or ``d lr atan2(m_s, sqrt(v_s)) / m_s``."""
        hyper, (beta1, beta2), after = step.hyper, step.hyper["betas"], step.hyper_after
        d, t = number(hyper["d"]), hyper["step"]
        rate = d * hyper["lr"]
        if hyper["bias_correction"]:
            rate /= (1 - beta1**t) / root(1 - beta2**t)
        # With no gradient but zeros it averages, but does not step; the sum over all tensors then stands still.
        moves = bool(step.displacement.any()) or after.get("d_de_nom") != hyper.get("d_de_nom")
        m, scale = step.after["exp_avg"], step.after["exp_avg_sq"].sqrt()
        if hyper["eps"] is None:
            P = torch.where(m != 0, torch.atan2(m, scale) / torch.where(m != 0, m, 1.0), 0.0)
        else:
            P = 1 / (scale + number(after["d"]) * hyper["eps"])
        decay = hyper["weight_decay"] * (1.0 if hyper["fixed_decay"] else rate)
        return StepCoefficients(
            filter=LinearFilter.ema(beta1),
            preconditioner=Diagonal(P * (rate if moves else 0.0)),
            gradient_operator=d * ascent(hyper),
            decoupled_decay=decay if hyper["weight_decouple"] and moves else 0.0,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 4 of Mishchenko & Defazio, as the package has it: its bias correction counts from 0."""
        hyper, (beta1, beta2), state, t = step.hyper, step.hyper["betas"], step.state, step.hyper["step"]
        d = hyper["d"]
        rate = d * hyper["lr"]
        if hyper["bias_correction"]:
            rate = rate * step.sqrt(1 - beta2**t) / (1 - beta1**t)
        g = -step.gradient if hyper["maximize"] else step.gradient
        m = state["exp_avg"] = beta1 * state["exp_avg"] + (1 - beta1) * d * g
        v = state["exp_avg_sq"] = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2 * g**2
        d_next = step.hyper_after["d"] = step.given("d_next", nonnegative=True)
        step.hyper_after["d_de_nom"] = step.given("d_de_nom_next", nonnegative=True)
        theta = step.theta
        if hyper["weight_decouple"]:
            theta = theta * (1 - hyper["weight_decay"] * (1 if hyper["fixed_decay"] else rate))
        return theta - rate * m / (step.sqrt(v) + d_next * hyper["eps"])
