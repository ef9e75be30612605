"""Muon."""

from __future__ import annotations

import math

import torch

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Left, LinearOperator, Right

__all__ = ["MuonRule"]


class MuonRule(UpdateRule):
    r"""torch.optim.Muon (Jordan et al., 2024): momentum M, orthogonalised by Newton-Schulz iterations.

    ``theta <- (1 - lr wd) theta - lr_adjusted NS(M)``. In exact arithmetic ``NS(M) = L M`` with L a polynomial in
    ``M M^T`` (``M R`` for tall matrices). torch iterates in bfloat16, which no such L reproduces, so the observed
    update U closes the step by a rank-one secant: ``P[X] = L X + (U - L M) <M, X> / <M, M>``, whose size results carry.
    """

    optimizers = ("torch.optim.Muon", "torch.optim._muon.Muon")
    options = frozenset(
        {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"}
    )
    filter_states = ("momentum_buffer",)
    closed_by_secant = True
    no_closed_form = (
        "Newton-Schulz runs in bfloat16 on whole matrices; its exact polynomial is closed by the observed update, "
        "which an algebraic proof would take for granted"
    )

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = mu, B = 1 - mu``, read out as M; ``P_s`` as above."""
        hyper, mu = step.hyper, step.hyper["momentum"]
        c, d = (mu * mu, (1 - mu) * (1 + mu)) if hyper["nesterov"] else (mu, 1 - mu)
        adjusted = _adjustment(hyper["adjust_lr_fn"], step.theta.shape)
        before = step.before.get("momentum_buffer", torch.zeros_like(step.theta))
        momentum = c * before + d * step.gradient
        return StepCoefficients(
            filter=LinearFilter(A=((mu,),), B=(1 - mu,), C=(c,), D=d),
            preconditioner=polynomial(momentum, hyper) * (hyper["lr"] * adjusted),
            decoupled_decay=hyper["lr"] * hyper["weight_decay"],
        )


def polynomial(momentum: torch.Tensor, hyper: object) -> LinearOperator:
    """Newton-Schulz in float64 as a multiplication from the shorter side: ``NS(M) = L M`` or ``M R``."""
    a, b, c = hyper["ns_coefficients"]  # type: ignore[index]
    tall = momentum.shape[0] > momentum.shape[1]
    x = momentum.mT if tall else momentum
    matrix = torch.eye(len(x), dtype=x.dtype) / x.norm().clamp(min=hyper["eps"])  # type: ignore[index]
    for _ in range(hyper["ns_steps"]):  # type: ignore[index]
        gram = matrix @ x @ x.mT @ matrix.mT
        matrix = (a * torch.eye(len(x), dtype=x.dtype) + b * gram + c * gram @ gram) @ matrix
    return Right(matrix.mT) if tall else Left(matrix)


def _adjustment(name: str | None, shape: torch.Size) -> float:
    if name in (None, "original"):
        return math.sqrt(max(1.0, shape[0] / shape[1]))
    return 0.2 * math.sqrt(max(shape)) if name == "match_rms_adamw" else 1.0
