"""The optimizer, as its users know it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class QHM(torch.optim.Optimizer):
    """Quasi-hyperbolic momentum (Ma & Yarats, 2019): a mixture of the gradient and of its average.

    ``m <- beta m + (1 - beta) g;  theta <- theta - lr [(1 - nu) g + nu m]``; weight decay enters g.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.1, beta: float = 0.9, nu: float = 0.7, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "nu": nu, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                m = self.state[p].setdefault("average", torch.zeros_like(p))
                m.mul_(group["beta"]).add_(g, alpha=1 - group["beta"])
                p.sub_(group["lr"] * ((1 - group["nu"]) * g + group["nu"] * m))
        return loss
