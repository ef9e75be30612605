"""LARS, and SGD with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_optimizers.common import MAXIMIZE, ascent, decayed, decays, number
from explaind_optimizers.sgd import SGDRule

__all__ = ["LARSRule", "SGDWRule"]

FROZEN = LinearFilter(A=((1.0,),), B=(0.0,), C=(0.0,), D=1.0)


class LARSRule(UpdateRule):
    r"""LARS of pytorch_optimizer (You et al., 2017): SGD whose gradients get a trust ratio before the momentum.

    ``u = trust (g + wd theta)``, ``trust = eta |theta| / (|g| + wd |theta|)``; ``m <- mu m + (1 - dampening) u``;
    ``theta <- theta - lr (m, or u + mu m for Nesterov)``. The ratio stands BEFORE the momentum: it is E_s. Vectors
    and scalars have neither ratio nor decay.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.lars.LARS",)
    options = frozenset(
        {"lr", "weight_decay", "momentum", "dampening", "trust_coefficient", "nesterov", "foreach", "maximize", "step"}
    )
    filter_states = ("momentum_buffer",)
    proved_for = {"ndim": (1, 2), "momentum": (0, ...), "nesterov": (False, True), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``E_s = trust``, ``W_s = trust wd``, ``P_s = lr``."""
        hyper, trust, decay = step.hyper, 1.0, 0.0
        if step.theta.ndim > 1:
            decay, size = hyper["weight_decay"], number(step.theta.norm())
            total = number(step.gradient.norm()) + decay * size
            trust = hyper["trust_coefficient"] * size / total if size > 0 and total > 0 else 1.0
        momentum = LinearFilter.momentum(hyper["momentum"], dampening=hyper["dampening"], nesterov=hyper["nesterov"])
        return StepCoefficients(
            filter=momentum if hyper["momentum"] > 0 else FROZEN,
            preconditioner=hyper["lr"],
            gradient_operator=trust * ascent(hyper),
            coupled_decay=trust * decay,
        )

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of You et al., with dampening and Nesterov's momentum as in torch."""
        hyper, state, mu, decay = step.hyper, step.state, step.hyper["momentum"], step.hyper["weight_decay"]
        g = -step.gradient if hyper["maximize"] else step.gradient
        if step.theta.ndim > 1:
            size, length, trust = step.norm(step.theta), step.norm(g), 1
            if size > 0 and length + decay * size > 0:
                trust = hyper["trust_coefficient"] * size / (length + decay * size)
            g = trust * (g + decay * step.theta)
        if mu > 0:
            m = state["momentum_buffer"] = mu * state["momentum_buffer"] + (1 - hyper["dampening"]) * g
            g = g + mu * m if hyper["nesterov"] else m
        return step.theta - hyper["lr"] * g

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``(1 - dampening) mu^(s-i)``; Nesterov is one step ahead."""
        mu, kept = hyper["momentum"], 1 - hyper["dampening"]
        if mu == 0:
            return 1 if i == s else 0
        return mu ** (s - i + 1) * kept + (1 if i == s else 0) if hyper["nesterov"] else mu ** (s - i) * kept


class SGDWRule(UpdateRule):
    r"""SGDW of pytorch_optimizer (Loshchilov & Hutter, 2019): SGD with momentum and ``rho_s = lr wd``."""

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.sgd.SGDW",)
    options = frozenset(
        {"lr", "weight_decay", "weight_decouple", "momentum", "dampening", "nesterov", "foreach", "maximize", "step"}
    )
    filter_states = ("momentum_buffer",)
    proved_for = {
        "weight_decouple": (False, True),
        "momentum": (0, ...),
        "nesterov": (False, True),
        "maximize": (False, True),
    }

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """One state for the momentum buffer, whose first gradient is undampened."""
        hyper = step.hyper
        momentum = LinearFilter.momentum(
            hyper["momentum"],
            dampening=hyper["dampening"],
            nesterov=hyper["nesterov"],
            first="momentum_buffer" not in step.before,
        )
        return StepCoefficients(
            filter=momentum if hyper["momentum"] > 0 else FROZEN,
            preconditioner=hyper["lr"],
            gradient_operator=ascent(hyper),
            **decays(hyper),
        )

    def recursion(self, step: Any) -> Any:
        """As torch's SGD, but for the decay."""
        hyper, state, mu, (theta, g) = step.hyper, step.state, step.hyper["momentum"], decayed(step)
        if mu > 0:
            first = "momentum_buffer" not in state
            m = g if first else mu * state["momentum_buffer"] + (1 - hyper["dampening"]) * g
            state["momentum_buffer"] = m
            g = g + mu * m if hyper["nesterov"] else m
        return theta - hyper["lr"] * g

    alpha = SGDRule.alpha
