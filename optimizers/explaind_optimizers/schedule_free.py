"""Schedule-Free optimizers: gradients are taken at y, the model is evaluated at x."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator, Scalar
from explaind_optimizers.common import MAXIMIZE, ascent

__all__ = ["AdamWScheduleFreePaperRule", "AdamWScheduleFreeRule", "RAdamScheduleFreeRule", "SGDScheduleFreeRule"]


class ScheduleFree(UpdateRule):
    r"""What all of them share (Defazio et al., 2024).

    ``u = E[g] + lr wd y;  z <- z - u;  x <- (1 - c) x + c z;  y = (1 - b) z + b x``, c the weight of this step among
    all so far. The parameters in training are y. With the filter state ``m = y - z``::

        m_s = (1 - c) m + b (1 - c) u;  y_s - y = -c m - (1 - b (1 - c)) u;  x_s - x = -c m / b - c u
    """

    attributes = MAXIMIZE
    evaluates_elsewhere = True

    @abstractmethod
    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """The learning rate of this step, and what gradients (not decay) are divided by before it."""

    def coefficients(self, step: RecordedStep) -> StepCoefficients:
        """``A = 1 - c, B = b (1 - c)``, and C, D of y or of x; ``E_s`` holds the rate, ``P_s = 1``."""
        hyper, after = step.hyper, step.hyper_after
        b, t = _mixing(hyper), _ticks(hyper)
        rate, inverse = self.divided(step)
        total = float(after["weight_sum"])
        c = t ** hyper["r"] * float(after["lr_max"]) ** hyper["weight_lr_power"] / total if total else 0.0
        if hyper.get("decoupling_c", 0) > 0:
            c = min(1.0, c * (1 - b) * hyper["decoupling_c"])
        decay = rate * hyper["weight_decay"]
        C, D = (c, 1 - b * (1 - c)) if step.point == "gradient" else (c / b, c)
        # Decay at z = y - m instead of y: u loses decay * m.
        lost = decay if hyper.get("decay_at_z") else 0.0
        A, B = 1 - c, b * (1 - c)
        return StepCoefficients(
            filter=LinearFilter(A=((A - B * lost,),), B=(B,), C=(C - D * lost,), D=D),
            preconditioner=1.0,
            gradient_operator=inverse * (rate * ascent(hyper)),
            coupled_decay=decay,
        )

    def evaluated(self, theta: Tensor, state: Mapping[str, Any], hyper: Mapping[str, Any]) -> Tensor:
        """x: extrapolated from y and z as the optimizer's ``eval()`` does, or kept (reference implementations)."""
        x, z = state.get("x"), state.get("z")
        if x is not None or z is None:
            return theta if x is None else x
        return theta.lerp(z, 1 - 1 / _mixing(hyper))


def _mixing(hyper: Mapping[str, Any]) -> float:
    return float(hyper["momentum"] if "momentum" in hyper else hyper["betas"][0])


def _ticks(hyper: Mapping[str, Any]) -> int:
    return int(hyper["k"] if "k" in hyper else hyper.get("step", 0)) + 1


def _warmed_up(step: RecordedStep) -> float:
    """The rate after warm-up; schedulefree notes it down, pytorch_optimizer does not."""
    if "scheduled_lr" in step.hyper_after:
        return float(step.hyper_after["scheduled_lr"])
    t, warmup = _ticks(step.hyper), step.hyper["warmup_steps"]
    return float(step.hyper["lr"]) * (t / warmup if t < warmup else 1.0)


COMMON = frozenset(
    {"lr", "weight_decay", "r", "weight_lr_power", "warmup_steps", "foreach", "train_mode", "weight_sum", "lr_max"}
    | {"k", "scheduled_lr", "step", "maximize"}
)


class SGDScheduleFreeRule(ScheduleFree):
    """Schedule-Free SGD, of schedulefree and of pytorch_optimizer: ``E_s = lr``."""

    optimizers = (
        "schedulefree.sgd_schedulefree.SGDScheduleFree",
        "schedulefree.sgd_schedulefree_reference.SGDScheduleFreeReference",
        "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeSGD",
    )
    options = COMMON | {"momentum", "eps"}

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By nothing."""
        return _warmed_up(step), Scalar(1.0)


class AdamWScheduleFreeRule(ScheduleFree):
    """Schedule-Free AdamW, of schedulefree and of pytorch_optimizer: ``E_s = lr / (sqrt(v^) + eps)``."""

    optimizers = (
        "schedulefree.adamw_schedulefree.AdamWScheduleFree",
        "schedulefree.adamw_schedulefree_reference.AdamWScheduleFreeReference",
        "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW",
    )
    options = COMMON | {"betas", "eps", "decay_at_z", "decoupling_c", "ams_bound", "use_palm"}

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By ``sqrt(v^) + eps``; pytorch_optimizer adds 1e-15 to v^, or to the largest v^ so far."""
        hyper = step.hyper
        v = step.after["exp_avg_sq"] / (1 - hyper["betas"][1] ** _ticks(hyper))
        if "ams_bound" in hyper:
            v = (step.after["max_exp_avg_sq"] if hyper["ams_bound"] else v) + 1e-15
        return _warmed_up(step), Diagonal(1 / (v.sqrt() + hyper["eps"]))


class AdamWScheduleFreePaperRule(ScheduleFree):
    """Schedule-Free AdamW as in the paper, of schedulefree: ``E_s = lr sqrt(1 - b2^t) / (sqrt(v) + eps)``."""

    optimizers = ("schedulefree.adamw_schedulefree_paper.AdamWScheduleFreePaper",)
    options = COMMON | {"betas", "eps"}

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By ``sqrt(v) + eps``: the rate holds the bias correction."""
        return _warmed_up(step), Diagonal(1 / (step.after["exp_avg_sq"].sqrt() + step.hyper["eps"]))


class RAdamScheduleFreeRule(ScheduleFree):
    """Schedule-Free RAdam, of schedulefree and of pytorch_optimizer.

    Like AdamW with a rectified rate; while the variance of v is too large, it stands still (``silent_sgd_phase``) or
    descends without v (pytorch_optimizer at rate 1, whatever the learning rate).
    """

    optimizers = (
        "schedulefree.radam_schedulefree.RAdamScheduleFree",
        "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeRAdam",
    )
    options = (COMMON - {"warmup_steps"}) | {"betas", "eps", "silent_sgd_phase", "use_palm"}

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By ``sqrt(v^) + eps``, or in the first steps by nothing."""
        hyper, t = step.hyper, _ticks(step.hyper)
        beta2, silent = hyper["betas"][1], hyper["silent_sgd_phase"]
        correction, limit = 1 - beta2**t, 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / correction
        if "scheduled_lr" in step.hyper_after:
            rate = float(step.hyper_after["scheduled_lr"])
        elif length >= 4:
            variance = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            rate = float(hyper["lr"]) * math.sqrt(variance)
        else:
            rate = float(hyper["lr"] > 0 and not silent)
        if length <= 4:
            return rate, Scalar(1.0)
        return rate, Diagonal(1 / ((step.after["exp_avg_sq"] / correction).sqrt() + hyper["eps"]))
