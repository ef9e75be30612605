"""Shampoo."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import LinearOperator
from explaind_optimizers.common import ascent, decays

__all__ = ["AlongAxes", "ShampooRule"]


@dataclass(frozen=True, eq=False)
class AlongAxes(LinearOperator):
    """Multiplies the fibres along every axis by that axis' matrix.

    Example:
        >>> AlongAxes((torch.tensor([[0.0, 2.0], [1.0, 0.0]]),)).apply(torch.tensor([3.0, 4.0]))
        tensor([8., 3.])
    """

    matrices: tuple[Tensor, ...]

    def apply(self, x: Tensor) -> Tensor:
        """The Kronecker product of the matrices, times ``x``."""
        for matrix in self.matrices:  # each product moves its axis to the end: after all of them, all are in place
            x = torch.tensordot(x, matrix, dims=([0], [1]))
        return x

    @property
    def adjoint(self) -> LinearOperator:
        """Each axis by its transpose."""
        return AlongAxes(tuple(matrix.mT for matrix in self.matrices))


class ShampooRule(UpdateRule):
    r"""Shampoo of pytorch_optimizer (Gupta et al., 2018), with and without momentum.

    ``L_a <- L_a + G_a G_a^T`` for each of n axes; ``m <- K (mu m + (1 - mu) g)``, ``K`` the product of all
    ``L_a^(-1/2n)``; ``theta <- theta - lr m``. The momentum stands BEFORE the preconditioner, and remembers what comes
    out of it: the filter's coefficients are operators. The buffer starts as the first gradient, of unchanged sign
    where the optimizer maximizes.
    """

    optimizers = ("pytorch_optimizer.optimizer.shampoo.Shampoo",)
    options = frozenset(
        {"lr", "momentum", "weight_decay", "weight_decouple", "fixed_decay", "matrix_eps", "maximize", "step"}
        | {"preconditioning_compute_steps"}
    )
    attributes = {n: n for n in ("maximize", "preconditioning_compute_steps")}
    filter_states = ("momentum_buffer",)
    no_closed_form = (
        "its preconditioner is made of inverse roots of accumulated outer products, matrices of which one element of a "
        "tensor shows nothing; they are read from the optimizer's state"
    )

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = C = mu K``, ``B = D = K``, ``E_s = 1 - mu``, ``P_s = lr``."""
        hyper, mu, sign = step.hyper, step.hyper["momentum"], ascent(step.hyper)
        first = "momentum_buffer" not in step.before
        axes = range(step.theta.ndim)
        matrices = [step.after[f"inv_pre_cond_{axis}"] for axis in axes]
        if matrices:  # they are symmetric up to rounding; the last one is multiplied from the right
            matrices[-1] = matrices[-1].mT
        K = AlongAxes(tuple(matrices))
        return StepCoefficients(
            filter=LinearFilter(A=((K * mu,),), B=(K,), C=(K * mu,), D=K),
            preconditioner=hyper["lr"],
            gradient_operator=(1 - mu) * sign + (mu if first else 0.0),
            **decays(hyper),
        )
