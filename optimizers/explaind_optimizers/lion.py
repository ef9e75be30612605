"""Optimizers that move by a sign: Lion, and its relatives Tiger and SignSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Composition, Diagonal, OfReadout, Scalar
from explaind_optimizers.common import (
    ABSENT,
    DECAYS,
    MAXIMIZE,
    Centred,
    ascent,
    cautious_mask,
    decayed,
    decays,
    lengthening,
)

__all__ = ["LionRule", "SignSGDRule", "TigerRule"]


def sign_step(rate: float, c: Tensor, u: Tensor | None = None) -> Diagonal:
    """``c -> rate sign(c)`` as a frozen operator: ``rate / |c|``, and 0 where c = 0; cautious of ``u``, if given.

    Args:
        rate: of the step.
        c: what the sign is taken of.
        u: what a cautious optimizer compares signs with; None for an optimizer that is not.
    """
    moved = c != 0
    weight = (rate / c.abs().where(moved, 1.0)).where(moved, 0.0)
    return Diagonal(weight if u is None else weight * cautious_mask(c.sign(), u))


class LionRule(UpdateRule):
    r"""Lion (Chen et al., 2023), of pytorch_optimizer and of lion_pytorch.

    ``c = b1 m + (1 - b1) g;  theta <- theta - lr sign(c);  m <- b2 m + (1 - b2) g``, with weight decay that acts on
    its own (``rho_s = lr wd``) or enters g. As a frozen preconditioner, the sign is ``P_s = lr / |c|``.

    Proved without gradient centralisation, AdaNorm and cautious updates, which look at axes, norms and counts.
    """

    optimizers = ("pytorch_optimizer.optimizer.lion.Lion", "lion_pytorch.lion_pytorch.Lion")
    options = frozenset(
        {"lr", "betas", "weight_decay", "weight_decouple", "fixed_decay", "foreach", "maximize", "step"}
        | {"use_gc", "adanorm", "adanorm_r", "cautious", "decoupled_weight_decay", "first_lr"}
    )
    attributes = {"maximize": "maximize", "decoupled_weight_decay": "decoupled_wd", "first_lr": "_init_lr"}
    filter_states = ("exp_avg",)
    proved_for = {
        "betas": ((..., ...),),
        # Four of pytorch_optimizer, two of lion_pytorch.
        "weight_decouple fixed_decay decoupled_weight_decay maximize": (
            *((False, False, ABSENT, False), (False, False, ABSENT, True)),
            *((True, False, ABSENT, True), (True, True, ABSENT, False)),
            *((ABSENT, ABSENT, False, False), (ABSENT, ABSENT, True, False)),
        ),
        "adanorm": (False,),
        "use_gc": (False,),
        "cautious": (False,),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = b1, D = 1 - b1`` reads c out, ``A = b2, B = 1 - b2`` remembers; ``P_s = lr / |c|``."""
        hyper, (beta1, beta2) = step.hyper, step.hyper["betas"]
        decay = decays(hyper, decoupled=True)
        if hyper.get("decoupled_weight_decay"):  # lion_pytorch: independent of the (first) learning rate
            decay["decoupled_decay"] /= hyper["first_lr"]
        sign = Scalar(ascent(hyper))
        E = Composition((Centred(), sign)) if hyper.get("use_gc") else sign
        u = torch.add(E.apply(step.gradient), step.theta, alpha=decay["coupled_decay"])
        longer = lengthening(step, u)  # of what is remembered, not of what is read out
        return StepCoefficients(
            filter=LinearFilter(A=((beta2,),), B=((1 - beta2) * longer,), C=(beta1,), D=1 - beta1),
            preconditioner=OfReadout(lambda c: sign_step(hyper["lr"], c, u if hyper.get("cautious") else None)),
            gradient_operator=E,
            **decay,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 2 of Chen et al."""
        hyper, (beta1, beta2), state = step.hyper, step.hyper["betas"], step.state
        theta, g = decayed(step, decoupled=True)
        if hyper.get("decoupled_weight_decay"):
            theta = step.theta * (1 - hyper["lr"] / hyper["first_lr"] * hyper["weight_decay"])
        c = beta1 * state["exp_avg"] + (1 - beta1) * g
        state["exp_avg"] = beta2 * state["exp_avg"] + (1 - beta2) * g
        return theta - hyper["lr"] * step.sign(c)

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``b1 (1 - b2) b2^(s-i-1)``, and ``1 - b1`` for the newest gradient."""
        beta1, beta2 = hyper["betas"]
        return 1 - beta1 if i == s else beta1 * (1 - beta2) * beta2 ** (s - i - 1)


class TigerRule(UpdateRule):
    """Tiger of pytorch_optimizer (Su, 2023), with one beta: ``m <- b m + (1 - b) g;  theta <- theta - lr sign(m)``."""

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.tiger.Tiger",)
    options = frozenset({"lr", "beta", "weight_decay", "weight_decouple", "fixed_decay", "foreach", "maximize", "step"})
    filter_states = ("exp_avg",)
    proved_for = {**DECAYS, "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / |m_s|``."""
        return StepCoefficients(
            filter=LinearFilter.ema(step.hyper["beta"]),
            preconditioner=OfReadout(lambda m: sign_step(step.hyper["lr"], m)),
            gradient_operator=ascent(step.hyper),
            **decays(step.hyper),
        )

    def recursion(self, step: Any) -> Any:
        """As its author describes it."""
        hyper, state, (theta, g) = step.hyper, step.state, decayed(step)
        m = state["exp_avg"] = hyper["beta"] * state["exp_avg"] + (1 - hyper["beta"]) * g
        return theta - hyper["lr"] * step.sign(m)

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - b) b^(s-i)``."""
        return (1 - hyper["beta"]) * hyper["beta"] ** (s - i)


class SignSGDRule(UpdateRule):
    r"""SignSGD and Signum of pytorch_optimizer (Bernstein et al., 2018).

    ``m <- mu m + (1 - mu) g;  theta <- theta - lr sign(m)``; with momentum 0 the sign of g, and m is frozen.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.sgd.SignSGD",)
    options = frozenset({"lr", "momentum", "weight_decay", "weight_decouple", "foreach", "maximize", "step"})
    filter_states = ("momentum_buffer",)
    proved_for = {"weight_decouple": (False, True), "momentum": (0, ...), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / |m_s|``, or ``lr / |u_s|`` without momentum."""
        hyper, decay, sign = step.hyper, decays(step.hyper), ascent(step.hyper)
        mu = hyper["momentum"]
        return StepCoefficients(
            filter=LinearFilter.ema(mu) if mu > 0 else LinearFilter(A=((1.0,),), B=(0.0,), C=(0.0,), D=1.0),
            preconditioner=OfReadout(lambda m: sign_step(hyper["lr"], m)),
            gradient_operator=sign,
            **decay,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithms 1 and 2 of Bernstein et al."""
        hyper, state, mu, (theta, g) = step.hyper, step.state, step.hyper["momentum"], decayed(step)
        if mu > 0:
            g = state["momentum_buffer"] = mu * state["momentum_buffer"] + (1 - mu) * g
        return theta - hyper["lr"] * step.sign(g)

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - mu) mu^(s-i)``, or 1 for the newest gradient alone."""
        mu = hyper["momentum"]
        if mu == 0:
            return 1 if i == s else 0
        return (1 - mu) * mu ** (s - i)
