"""A rule whose filter gains a state while it trains."""

from __future__ import annotations

from explaind_core import LinearFilter, StepCoefficients, UpdateRule

__all__ = ["Grown"]


class Grown(UpdateRule):
    """SGD's rule, but for a state that is only there once there is momentum."""

    optimizers = ("torch.optim.sgd.SGD",)
    options = frozenset({"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "foreach", "fused"})
    fixed = {"differentiable": (False,)}  # noqa: RUF012
    filter_states = ("momentum_buffer",)

    def coefficients(self, step):
        mu = step.hyper["momentum"]
        known = step.before.get("momentum_buffer") is not None
        return StepCoefficients(
            filter=LinearFilter.momentum(mu, first=not known) if mu else LinearFilter(),
            preconditioner=step.hyper["lr"],
        )
