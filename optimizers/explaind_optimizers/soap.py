"""SOAP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator, Rotated
from explaind_optimizers.common import ascent, ticks

__all__ = ["Layout", "Reshaped", "SOAPRule"]

Basis = list[Tensor | None]


@dataclass(frozen=True)
class Layout:
    """A tensor's axes permuted and small ones merged, as SOAP preconditions it.

    Example:
        >>> Layout((2, 3, 4), merge=6).shape
        (6, 4)
    """

    original: tuple[int, ...]
    merge: int | None = None
    channels_last: bool = False

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation, if any."""
        swapped = self.channels_last and self.merge is not None and len(self.original) == 4
        return (0, 3, 1, 2) if swapped else tuple(range(len(self.original)))

    @property
    def shape(self) -> tuple[int, ...]:
        """After permutation and merging: neighbours are merged as long as their product is at most ``merge``."""
        permuted = [self.original[axis] for axis in self.order]
        if self.merge is None or len(permuted) < 2:
            return tuple(permuted)
        merged = [1]
        for size in permuted:
            if merged[-1] * size > self.merge:
                merged.append(size)
            else:
                merged[-1] *= size
        return tuple(merged)

    def forth(self, x: Tensor) -> Tensor:
        """``x`` in this layout."""
        return x.permute(self.order).reshape(self.shape)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`forth`."""
        permuted = x.reshape([self.original[axis] for axis in self.order])
        return permuted.permute([self.order.index(axis) for axis in range(len(self.order))])


@dataclass(frozen=True, eq=False)
class Reshaped(LinearOperator):
    """An operator that acts in another layout of the tensor.

    Attributes:
        inner: the operator, in that layout.
        layout: the layout.
    """

    inner: LinearOperator
    layout: Layout

    def apply(self, x: Tensor) -> Tensor:
        """Forth, ``inner``, and back."""
        return self.layout.back(self.inner.apply(self.layout.forth(x)))

    @property
    def adjoint(self) -> LinearOperator:
        """The adjoint acts in the same layout: a layout keeps inner products."""
        return Reshaped(self.inner.adjoint, self.layout)


class SOAPRule(UpdateRule):
    r"""SOAP of pytorch_optimizer (Vyas et al., 2024): Adam in the eigenbasis Q of Shampoo's preconditioner.

    ``m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) (Q^T g)^2;  theta <- (1 - lr wd) (theta - lr Q [Q^T m^ /
    (sqrt(v^) + eps)])``; then Q moves on, and with it v, so that both are read BEFORE the step. The group's first call
    only prepares.
    """

    optimizers = ("pytorch_optimizer.optimizer.soap.SOAP",)
    options = frozenset(
        {"lr", "betas", "shampoo_beta", "weight_decay", "precondition_frequency", "max_precondition_dim", "merge_dims"}
        | {"precondition_1d", "correct_bias", "normalize_gradient", "data_format", "eps", "maximize", "step"}
    )
    attributes = {"maximize": "maximize", "data_format": "data_format"}
    filter_states = ("exp_avg",)
    no_closed_form = (
        "its basis is the eigenvectors of accumulated outer products, refined by QR; one element of a tensor shows "
        "nothing of them, so that P_s is read from the optimizer's state"
    )

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr (1 - lr wd) Q [. / (sqrt(v_s) + eps)] Q^T``, ``rho_s = lr wd``."""
        hyper, (beta1, beta2), t = step.hyper, step.hyper["betas"], ticks(step) - 1
        if t == 0:
            return StepCoefficients(0.0, LinearFilter(A=((1.0,),), B=(0.0,), C=(0.0,), D=1.0), ascent(hyper))
        rate = float(hyper["lr"])
        if hyper["correct_bias"]:
            rate *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        merge = hyper["max_precondition_dim"] if hyper["merge_dims"] else None
        layout = Layout(tuple(step.theta.shape), merge, hyper.get("data_format") == "channels_last")
        basis = self.basis(step, layout)
        v = layout.forth(step.before.get("exp_avg_sq", torch.zeros_like(step.theta)))
        v = v.lerp(rotated(layout.forth(step.gradient), basis).square(), 1 - beta2)
        P = Reshaped(Rotated(Diagonal(1 / (v.sqrt() + hyper["eps"])), tuple(basis)), layout)
        if hyper["normalize_gradient"]:
            rate /= math.sqrt(float(P.apply(step.after["exp_avg"]).square().mean())) + hyper["eps"]
        decay = hyper["lr"] * hyper["weight_decay"]
        return StepCoefficients(
            filter=LinearFilter.ema(beta1),
            preconditioner=P * (rate * (1 - decay)),
            gradient_operator=ascent(hyper),
            decoupled_decay=decay,
        )

    def basis(self, step: RecordedStep, layout: Layout) -> Basis:
        """Q before the step; for a parameter's first gradient, Q made of it."""
        t = ticks(step) - 1
        if "Q" in step.before or t % step.after["precondition_frequency"]:
            state = step.before if "Q" in step.before else step.after
            return [Q if len(Q) else None for Q in state["Q"]]
        return first_basis(
            layout.forth(step.gradient).to(step.dtype),
            1 - step.after["shampoo_beta"],
            [len(GG) > 0 for GG in step.after["GG"]],
        )


def rotated(x: Tensor, basis: Sequence[Tensor | None]) -> Tensor:
    """``Q^T x`` along every axis that has a Q."""
    for Q in basis:
        x = x.movedim(0, -1) if Q is None else torch.tensordot(x, Q, dims=([0], [0]))
    return x


def first_basis(gradient: Tensor, weight: float, wanted: Sequence[bool]) -> Basis:
    """What SOAP makes of a first gradient in a step that also refines: eigenvectors, then one power iteration.

    In the optimizer's own precision and its single-precision QR: where eigenvalues coincide, its rounding chooses.
    """
    found: Basis = []
    for axis, needed in enumerate(wanted):
        if not needed:
            found.append(None)
            continue
        others = [a for a in range(gradient.ndim) if a != axis]
        if others:
            outer = torch.tensordot(gradient, gradient, dims=[others] * 2)
        else:
            outer = gradient.unsqueeze(1) @ gradient.unsqueeze(0)
        GG = torch.zeros_like(outer).lerp_(outer, weight=weight)
        Q = torch.linalg.eigh(GG + 1e-30 * torch.eye(len(GG), dtype=GG.dtype))[1].flip(1)
        order = (Q * (GG @ Q)).sum(dim=0).argsort(descending=True)
        found.append(torch.linalg.qr((GG @ Q).index_select(1, order).float())[0].to(GG.dtype).double())
    return found
