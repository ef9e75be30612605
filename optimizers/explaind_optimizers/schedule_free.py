"""Schedule-Free optimizers: gradients are taken at y, the model is evaluated at x."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from explaind_core import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.operators import Diagonal, LinearOperator, Scalar, is_symbolic
from explaind_optimizers.common import ABSENT, COUNTED, MAXIMIZE, ascent, number, root

__all__ = ["AdamWScheduleFreePaperRule", "AdamWScheduleFreeRule", "RAdamScheduleFreeRule", "SGDScheduleFreeRule"]


class ScheduleFree(UpdateRule):
    r"""What all of them share (Defazio et al., 2024).

    ``u = E[g] + lr wd y;  z <- z - u;  x <- (1 - c) x + c z;  y = (1 - b) z + b x``, c the weight of this step among
    all so far. The parameters in training are y. With the filter state ``m = y - z``::

        m_s = (1 - c) m + b (1 - c) u;  y_s - y = -c m - (1 - b (1 - c)) u;  x_s - x = -c m / b - c u

    Proved for the first steps of y and of x. m is no entry of the optimizer's state, as an induction would need.
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
        total = number(after["weight_sum"])
        c = t ** hyper["r"] * number(after["lr_max"]) ** hyper["weight_lr_power"] / total if total else 0.0
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

    def averaged(self, step: Any, rate: Any, direction: Any) -> Any:
        """The three equations of Defazio et al. and the weights of the average; the state holds ``y - z``."""
        hyper, after, t, b = step.hyper, step.hyper_after, _ticks(step.hyper), _mixing(step.hyper)
        if "scheduled_lr" in hyper:
            rate = after["scheduled_lr"] = rate
        largest = after["lr_max"] = step.max(rate, hyper["lr_max"])
        weight = t ** hyper["r"] * largest ** hyper["weight_lr_power"]
        total = after["weight_sum"] = hyper["weight_sum"] + weight
        c = weight / total if total != 0 else 0
        if "decoupling_c" in hyper and hyper["decoupling_c"] > 0:
            c = step.min(1, c * (1 - b) * hyper["decoupling_c"])
        y, lag = step.theta, step.state["y_minus_z"]
        z, x = y - lag, y - lag + lag / b
        decay = hyper["weight_decay"] * (z if hyper.get("decay_at_z") else y)
        z_next = z - rate * (direction + decay)
        x_next = (1 - c) * x + c * z_next
        y_next = (1 - b) * z_next + b * x_next
        step.state["y_minus_z"] = y_next - z_next
        return y_next if step.point == "gradient" else y + x_next - x

    def evaluated(self, theta: Tensor, state: Mapping[str, Any], hyper: Mapping[str, Any]) -> Tensor:
        """x: extrapolated from y and z as the optimizer's ``eval()`` does, or kept (reference implementations)."""
        x, z = state.get("x"), state.get("z")
        if x is not None or z is None:
            return theta if x is None else x
        return theta.lerp(z, 1 - 1 / _mixing(hyper))


def _mixing(hyper: Mapping[str, Any]) -> float:
    return number(hyper["momentum"] if "momentum" in hyper else hyper["betas"][0])


def _ticks(hyper: Mapping[str, Any]) -> int:
    count = hyper["k"] if "k" in hyper else hyper.get("step", 0)
    return (count if is_symbolic(count) else int(count)) + 1


def _descent(step: Any) -> tuple[Any, Any]:
    """For a ``recursion``: the rate after warm-up, and the gradient to descend along."""
    hyper, t = step.hyper, _ticks(step.hyper)
    rate = hyper["lr"] * t / hyper["warmup_steps"] if t < hyper["warmup_steps"] else hyper["lr"]
    return rate, -step.gradient if hyper.get("maximize") else step.gradient


def _second_moment(step: Any, g: Any) -> Any:
    beta2 = step.hyper["betas"][1]
    step.state["exp_avg_sq"] = beta2 * step.state["exp_avg_sq"] + (1 - beta2) * g**2
    return step.state["exp_avg_sq"]


def _warmed_up(step: RecordedStep) -> float:
    """The rate after warm-up; schedulefree notes it down, pytorch_optimizer does not."""
    if "scheduled_lr" in step.hyper_after:
        return number(step.hyper_after["scheduled_lr"])
    t, warmup = _ticks(step.hyper), step.hyper["warmup_steps"]
    return number(step.hyper["lr"]) * (t / warmup if t < warmup else 1.0)


COMMON = frozenset(
    {"lr", "weight_decay", "r", "weight_lr_power", "warmup_steps", "foreach", "train_mode", "weight_sum", "lr_max"}
    | {"k", "scheduled_lr", "step", "maximize"}
)
#: What the optimizers' counters start with, in schedulefree and in pytorch_optimizer, at both points.
BEGINNING: Mapping[str, tuple[object, ...]] = {
    "point": ("gradient", "evaluated"),
    "weight_sum lr_max warmup_steps": ((0, 0, 2),),
    "k step scheduled_lr maximize": (
        (*COUNTED, ABSENT, 0, ABSENT),
        (ABSENT, *COUNTED, ABSENT, True),
    ),
}


class SGDScheduleFreeRule(ScheduleFree):
    """Schedule-Free SGD, of schedulefree and of pytorch_optimizer: ``E_s = lr``."""

    optimizers = (
        "schedulefree.sgd_schedulefree.SGDScheduleFree",
        "schedulefree.sgd_schedulefree_reference.SGDScheduleFreeReference",
        "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeSGD",
    )
    options = COMMON | {"momentum", "eps"}
    proved_for = BEGINNING

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By nothing."""
        return _warmed_up(step), Scalar(1.0)

    def recursion(self, step: Any) -> Any:
        """Equations (3) to (5) of Defazio et al."""
        return self.averaged(step, *_descent(step))


class AdamWScheduleFreeRule(ScheduleFree):
    """Schedule-Free AdamW, of schedulefree and of pytorch_optimizer: ``E_s = lr / (sqrt(v^) + eps)``."""

    optimizers = (
        "schedulefree.adamw_schedulefree.AdamWScheduleFree",
        "schedulefree.adamw_schedulefree_reference.AdamWScheduleFreeReference",
        "pytorch_optimizer.optimizer.schedulefree.ScheduleFreeAdamW",
    )
    options = COMMON | {"betas", "eps", "decay_at_z", "decoupling_c", "ams_bound", "use_palm"}
    proved_for = {
        "weight_sum lr_max warmup_steps": ((0, 0, 2),),
        "betas": ((..., ...),),
        "point k step scheduled_lr maximize decay_at_z ams_bound decoupling_c": (
            ("gradient", *COUNTED, ABSENT, 0, ABSENT, ABSENT, ABSENT, ABSENT),
            ("gradient", *COUNTED, ABSENT, 0, ABSENT, True, ABSENT, ABSENT),
            ("evaluated", ABSENT, *COUNTED, ABSENT, True, ABSENT, False, 0),
            ("gradient", ABSENT, *COUNTED, ABSENT, False, ABSENT, True, ...),
        ),
        "use_palm": (False,),
    }

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By ``sqrt(v^) + eps``; pytorch_optimizer adds 1e-15 to v^, or to the largest v^ so far."""
        hyper = step.hyper
        v = step.after["exp_avg_sq"] / (1 - hyper["betas"][1] ** _ticks(hyper))
        if "ams_bound" in hyper:
            v = (step.after["max_exp_avg_sq"] if hyper["ams_bound"] else v) + 1e-15
        return _warmed_up(step), Diagonal(1 / (v.sqrt() + hyper["eps"]))

    def recursion(self, step: Any) -> Any:
        """As schedulefree has it; pytorch_optimizer adds to v, or takes the largest so far."""
        hyper, (rate, g) = step.hyper, _descent(step)
        v = _second_moment(step, g) / (1 - hyper["betas"][1] ** _ticks(hyper))
        if "ams_bound" in hyper:
            if hyper["ams_bound"]:
                v = step.state["max_exp_avg_sq"] = step.max(step.state["max_exp_avg_sq"], v)
            v = v + 1e-15
        return self.averaged(step, rate, g / (step.sqrt(v) + hyper["eps"]))


class AdamWScheduleFreePaperRule(ScheduleFree):
    """Schedule-Free AdamW as in the paper, of schedulefree: ``E_s = lr sqrt(1 - b2^t) / (sqrt(v) + eps)``."""

    optimizers = ("schedulefree.adamw_schedulefree_paper.AdamWScheduleFreePaper",)
    options = COMMON | {"betas", "eps"}
    proved_for = {
        "point": ("gradient", "evaluated"),
        "weight_sum lr_max warmup_steps": ((0, 0, 2),),
        "betas": ((..., ...),),
        "k step scheduled_lr maximize": ((*COUNTED, ABSENT, 0, ABSENT),),
    }

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By ``sqrt(v) + eps``: the rate holds the bias correction."""
        return _warmed_up(step), Diagonal(1 / (step.after["exp_avg_sq"].sqrt() + step.hyper["eps"]))

    def recursion(self, step: Any) -> Any:
        """Algorithm 1 of Defazio et al."""
        rate, g = _descent(step)
        v = _second_moment(step, g)
        rate = rate * step.sqrt(1 - step.hyper["betas"][1] ** _ticks(step.hyper))
        return self.averaged(step, rate, g / (step.sqrt(v) + step.hyper["eps"]))


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
    proved_for = {
        "weight_sum lr_max": ((0, 0),),
        "lr": (...,),
        "betas": ((..., ...),),
        "point k step scheduled_lr maximize silent_sgd_phase": (
            ("gradient", *COUNTED, ABSENT, 0, ABSENT, False),
            ("evaluated", *COUNTED, ABSENT, 0, ABSENT, True),
            ("gradient", ABSENT, *COUNTED, ABSENT, True, False),
        ),
        "use_palm": (False,),
    }

    def divided(self, step: RecordedStep) -> tuple[float, LinearOperator]:
        """By ``sqrt(v^) + eps``, or in the first steps by nothing."""
        hyper, t = step.hyper, _ticks(step.hyper)
        beta2, silent = hyper["betas"][1], hyper["silent_sgd_phase"]
        correction, limit = 1 - beta2**t, 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / correction
        if "scheduled_lr" in step.hyper_after:
            rate = number(step.hyper_after["scheduled_lr"])
        elif length >= 4:
            variance = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            rate = number(hyper["lr"]) * root(variance)
        else:
            rate = float(bool(hyper["lr"] > 0) and not silent)
        if length <= 4:
            return rate, Scalar(1.0)
        return rate, Diagonal(1 / ((step.after["exp_avg_sq"] / correction).sqrt() + hyper["eps"]))

    def recursion(self, step: Any) -> Any:
        """As schedulefree has it: Schedule-Free AdamW whose rate is RAdam's; pytorch_optimizer's first rate is 1."""
        hyper, beta2, t = step.hyper, step.hyper["betas"][1], _ticks(step.hyper)
        g = -step.gradient if hyper.get("maximize") else step.gradient
        v = _second_moment(step, g) / (1 - beta2**t)
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho >= 4 and (rho > 4 or "scheduled_lr" not in hyper):
            r = step.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            rate = hyper["lr"] * r
        else:
            first = hyper["lr"] if "scheduled_lr" in hyper else 1
            rate = 0 if hyper["silent_sgd_phase"] else first
        return self.averaged(step, rate, g / (step.sqrt(v) + hyper["eps"]) if rho > 4 else g)
