"""Stochastic gradient descent."""

from __future__ import annotations

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
