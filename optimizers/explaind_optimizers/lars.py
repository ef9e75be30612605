"""LARS, and SGD with decoupled weight decay."""

from __future__ import annotations

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_optimizers.common import MAXIMIZE, ascent, decays

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

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``E_s = trust``, ``W_s = trust wd``, ``P_s = lr``."""
        hyper, trust, decay = step.hyper, 1.0, 0.0
        if step.theta.ndim > 1:
            decay, size = hyper["weight_decay"], float(step.theta.norm())
            total = float(step.gradient.norm()) + decay * size
            trust = hyper["trust_coefficient"] * size / total if size > 0 and total > 0 else 1.0
        momentum = LinearFilter.momentum(hyper["momentum"], dampening=hyper["dampening"], nesterov=hyper["nesterov"])
        return StepCoefficients(
            filter=momentum if hyper["momentum"] > 0 else FROZEN,
            preconditioner=hyper["lr"],
            gradient_operator=trust * ascent(hyper),
            coupled_decay=trust * decay,
        )


class SGDWRule(UpdateRule):
    r"""SGDW of pytorch_optimizer (Loshchilov & Hutter, 2019): SGD with momentum and ``rho_s = lr wd``."""

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.sgd.SGDW",)
    options = frozenset(
        {"lr", "weight_decay", "weight_decouple", "momentum", "dampening", "nesterov", "foreach", "maximize", "step"}
    )
    filter_states = ("momentum_buffer",)

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
