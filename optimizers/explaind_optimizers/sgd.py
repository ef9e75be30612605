"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule

__all__ = ["SGDRule"]


class SGDRule(UpdateRule):
    r"""torch.optim.SGD (paper, Corollary 3.2, with every option of torch).

    ``g <- g + wd theta;  m <- mu m + (1 - dampening) g;  theta <- theta - lr (m, or g + mu m for Nesterov)``.
    The buffer's first gradient is undampened. With momentum 0 the buffer is frozen, not decayed.

    Example:
        >>> "torch.optim.sgd.SGD" in SGDRule.optimizers
        True
    """

    optimizers = ("torch.optim.sgd.SGD",)
    options = frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "fused"})
    fixed = {"differentiable": (False,)}
    filter_states = ("momentum_buffer",)
    proved_for = {"momentum": (0, ..., [..., 0, ...]), "nesterov": (False, True), "maximize": (False, True)}

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """One state for the momentum buffer; W_s is the weight decay, E_s the sign of ``maximize``."""
        hyper = step.hyper
        frozen = LinearFilter(A=((1.0,),), B=(0.0,), C=(0.0,), D=1.0)
        momentum = LinearFilter.momentum(
            hyper["momentum"],
            dampening=hyper["dampening"],
            nesterov=hyper["nesterov"],
            first=step.before.get("momentum_buffer") is None,
        )
        return StepCoefficients(
            filter=momentum if hyper["momentum"] else frozen,
            preconditioner=hyper["lr"],
            gradient_operator=-1.0 if hyper["maximize"] else 1.0,
            coupled_decay=hyper["weight_decay"],
        )

    def recursion(self, step: Any) -> Any:
        """As torch documents it; ``b_t = g_t`` where there is no buffer yet."""
        hyper, state, mu = step.hyper, step.state, step.hyper["momentum"]
        g = -step.gradient if hyper["maximize"] else step.gradient
        g = g + hyper["weight_decay"] * step.theta
        if mu != 0:
            first = "momentum_buffer" not in state
            state["momentum_buffer"] = g if first else mu * state["momentum_buffer"] + (1 - hyper["dampening"]) * g
            g = g + mu * state["momentum_buffer"] if hyper["nesterov"] else state["momentum_buffer"]
        return step.theta - hyper["lr"] * g

    def alpha(self, s: Any, i: Any, hyper: Mapping[str, Any]) -> Any:
        """``mu^(s-i)`` (paper, Corollary 3.2), dampened but for the first gradient; Nesterov is one step ahead."""
        mu, kept = hyper["momentum"], 1 if i == 1 else 1 - hyper["dampening"]
        if mu == 0:
            return 1 if i == s else 0
        if hyper["nesterov"]:
            return mu ** (s - i + 1) * kept + (1 if i == s else 0)
        return mu ** (s - i) * kept
