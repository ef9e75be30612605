"""Optimizers that move by a sign: Lion, and its relatives Tiger and SignSGD."""

from __future__ import annotations

import torch
from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Composition, Diagonal, OfReadout, Scalar
from explaind_optimizers.common import MAXIMIZE, Centred, ascent, cautious_mask, decays

__all__ = ["LionRule", "SignSGDRule", "TigerRule"]


def sign_step(rate: float, c: Tensor, u: Tensor | None = None) -> Diagonal:
    """``c -> rate sign(c)`` as a frozen operator: ``rate / |c|``, and 0 where c = 0; cautious of ``u``, if given."""
    moved = c != 0
    weight = (rate / c.abs().where(moved, 1.0)).where(moved, 0.0)
    return Diagonal(weight if u is None else weight * cautious_mask(c.sign(), u))


class LionRule(UpdateRule):
    r"""Lion (Chen et al., 2023), of pytorch_optimizer and of lion_pytorch.

    ``c = b1 m + (1 - b1) g;  theta <- theta - lr sign(c);  m <- b2 m + (1 - b2) g``, with weight decay that acts on
    its own (``rho_s = lr wd``) or enters g. As a frozen preconditioner, the sign is ``P_s = lr / |c|``.
    """

    optimizers = ("pytorch_optimizer.optimizer.lion.Lion", "lion_pytorch.lion_pytorch.Lion")
    options = frozenset(
        {"lr", "betas", "weight_decay", "weight_decouple", "fixed_decay", "foreach", "maximize", "step"}
        | {"use_gc", "adanorm", "adanorm_r", "cautious", "decoupled_weight_decay", "first_lr"}
    )
    attributes = {"maximize": "maximize", "decoupled_weight_decay": "decoupled_wd", "first_lr": "_init_lr"}
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``C = b1, D = 1 - b1`` reads c out, ``A = b2, B = 1 - b2`` remembers; ``P_s = lr / |c|``."""
        hyper, (beta1, beta2) = step.hyper, step.hyper["betas"]
        decay = decays(hyper, decoupled=True)
        if hyper.get("decoupled_weight_decay"):  # lion_pytorch: independent of the (first) learning rate
            decay["decoupled_decay"] /= hyper["first_lr"]
        sign = Scalar(ascent(hyper))
        E = Composition((Centred(), sign)) if hyper.get("use_gc") else sign
        u = torch.add(E.apply(step.gradient), step.theta, alpha=decay["coupled_decay"])
        # AdaNorm: what is remembered (not what is read out) is never shorter than gradients used to be.
        usual = float(step.after["exp_grad_adanorm"]) if hyper.get("adanorm") else 0.0
        longer = max(1.0, usual / float(u.norm())) if u.any() else 1.0
        return StepCoefficients(
            filter=LinearFilter(A=((beta2,),), B=((1 - beta2) * longer,), C=(beta1,), D=1 - beta1),
            preconditioner=OfReadout(lambda c: sign_step(hyper["lr"], c, u if hyper.get("cautious") else None)),
            gradient_operator=E,
            **decay,
        )


class TigerRule(UpdateRule):
    """Tiger of pytorch_optimizer (Su, 2023), with one beta: ``m <- b m + (1 - b) g;  theta <- theta - lr sign(m)``."""

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.tiger.Tiger",)
    options = frozenset({"lr", "beta", "weight_decay", "weight_decouple", "fixed_decay", "foreach", "maximize", "step"})
    filter_states = ("exp_avg",)

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``P_s = lr / |m_s|``."""
        return StepCoefficients(
            filter=LinearFilter.ema(step.hyper["beta"]),
            preconditioner=OfReadout(lambda m: sign_step(step.hyper["lr"], m)),
            gradient_operator=ascent(step.hyper),
            **decays(step.hyper),
        )


class SignSGDRule(UpdateRule):
    r"""SignSGD and Signum of pytorch_optimizer (Bernstein et al., 2018).

    ``m <- mu m + (1 - mu) g;  theta <- theta - lr sign(m)``; with momentum 0 the sign of g, and m is frozen.
    """

    attributes = MAXIMIZE
    optimizers = ("pytorch_optimizer.optimizer.sgd.SignSGD",)
    options = frozenset({"lr", "momentum", "weight_decay", "weight_decouple", "foreach", "maximize", "step"})
    filter_states = ("momentum_buffer",)

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
