"""One training, and whether a rule explains it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.conformance.cases import Case, observed, replayed
from explaind_core.decomposition import ParameterFilter, split_step
from explaind_core.rules import (
    LinearFilter,
    LinearOperator,
    MakeOptimizer,
    RecordedStep,
    StepCoefficients,
    UpdateRule,
    as_operator,
    started_states,
)
from explaind_core.run import ReplayedStep
from explaind_core.tensors import to_dense

__all__ = ["Conformance", "run_case"]


@dataclass(frozen=True)
class Conformance:
    """The largest errors of a check, in units of the size of what is compared.

    Attributes:
        one_step: of one update, in float64, as the next three.
        rollout: of the parameters on the trajectory that the declaration makes by itself, per step.
        alphas: of what the filter reads out last, against the explicit sum over ``alpha_{s,i} u_i``.
        adjoints: of ``<A x, y> == <x, A' y>`` for the declared operators.
        store: the largest difference between the training as observed and as it came back from the store; NaN if they
            do not even have the same entries.
        one_step_float32: of one update in float32; reported, never bounded.
        cases: how many trainings were tried.
        refused: how many drawn ones the optimizer's constructor refused.
    """

    one_step: float = 0.0
    rollout: float = 0.0
    alphas: float = 0.0
    adjoints: float = 0.0
    store: float = 0.0
    one_step_float32: float = 0.0
    cases: int = 0
    refused: int = 0

    def merged(self, other: Conformance) -> Conformance:
        """The larger of each error, and all cases."""
        counts = {n: getattr(self, n) + getattr(other, n) for n in ("cases", "refused")}
        worst: dict[str, Any] = {n: _larger(getattr(self, n), getattr(other, n)) for n in vars(self) if n not in counts}
        return Conformance(**worst, **counts)


def run_case(rule: UpdateRule, make_optimizer: MakeOptimizer, case: Case) -> Conformance:
    """Train one case with the real optimizer and measure how far the declaration is from it.

    Errors are relative to ``1 + max|theta| + max|kernel| + max|regularization|`` of the tensor: the two parts may be
    far larger than their sum, and no declaration can be nearer than their rounding.

    Args:
        rule: of the optimizer.
        make_optimizer: called with parameter groups and the case's options.
        case: the training.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> run_case(SGDRule(), torch.optim.SGD, Case(options={"lr": 0.1, "momentum": 0.9})).one_step < 1e-14
        True
    """
    through = replayed(rule, make_optimizer, case) if case.stored or case.closure else []
    trained = through if case.closure else observed(rule, make_optimizer, case)
    memories: dict[str, ParameterFilter] = {}
    pasts: dict[str, _Past] = {}
    worst = Conformance(cases=1)
    if case.stored and not case.closure:
        worst = worst.merged(Conformance(store=_store_error(trained, through)))
    for step in trained:
        worst = worst.merged(Conformance(store=step.drift))
        rule.check_options(step.hyper[next(iter(step.hyper))], _options(step))
        for name, (split, declared, recorded) in split_step(rule, step, memories).items():
            past = pasts.setdefault(name, _Past())
            parts = (recorded.theta, split.kernel, split.regularization)
            size = 1 + sum(float(part.abs().max()) for part in parts if part.numel())
            one_step = _largest(split.declared - recorded.displacement) / size
            if case.dtype != "float64":
                worst = worst.merged(Conformance(one_step_float32=one_step))
                continue
            past.size = max(past.size, size)
            worst = worst.merged(
                Conformance(
                    one_step=one_step,
                    rollout=past.roll(rule, declared, recorded) / (past.size * len(past.filters)),
                    alphas=past.alpha_error(),
                    adjoints=_adjoint_error(declared, recorded.theta),
                )
            )
    return worst


def _store_error(seen: Sequence[ReplayedStep], through: Sequence[ReplayedStep]) -> float:
    """The largest difference between what was observed and what came back from the store; NaN if the kinds differ."""
    if len(seen) != len(through):
        return math.nan
    worst = 0.0
    for a, b in zip(seen, through, strict=True):
        for what in ("theta_before", "theta", "gradients", "before", "after", "hyper", "hyper_after"):
            x, y = getattr(a, what), getattr(b, what)
            if x.keys() != y.keys():
                return math.nan
            left, right = (trees.leaves([tree[name] for name in x]) for tree in (x, y))
            if [t.shape for t in left] != [t.shape for t in right]:
                return math.nan
            if any(_plain(x[name]) != _plain(y[name]) for name in x):
                return math.nan
            differences = [_largest(to_dense(t) - to_dense(u)) for t, u in zip(left, right, strict=True)]
            worst = max([worst, *differences])
    return worst


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _plain(tree: Any) -> Any:
    """What is not a tensor and can be stored; the rest is compared elsewhere, or cannot be."""
    if isinstance(tree, Mapping):
        return {key: _plain(value) for key, value in tree.items()}
    return tree if tree is None or isinstance(tree, bool | int | float | str | tuple) else "..."


def _options(step: ReplayedStep) -> list[str]:
    hyper = step.hyper[next(iter(step.hyper))]
    return [name for name in hyper if name not in ("initial_lr", "param_names")]


class _Past:
    """What a parameter was declared and fed so far: for the rollout and the explicit sum."""

    def __init__(self) -> None:
        self.filters: list[LinearFilter] = []
        self.inputs: list[Tensor] = []
        self.starts: list[tuple[Tensor | None, ...]] = []  # of the states that each step created
        self.state: tuple[Tensor, ...] = ()
        self.out: Tensor | None = None
        self.size = 1.0
        self.off: Tensor | None = None  # how far the declaration's own trajectory is from the real one

    def roll(self, rule: UpdateRule, declared: StepCoefficients, recorded: RecordedStep) -> float:
        """Make the declared step from the declaration's own theta and filter state; the distance from the real theta.

        Where the model is evaluated elsewhere, decay acts on the real gradient point.
        """
        off = torch.zeros_like(recorded.theta) if self.off is None else self.off
        theta = recorded.theta + off if recorded.point == "gradient" else recorded.theta
        E, W, P, rho = (
            as_operator(getattr(declared, n), n)
            for n in ("gradient_operator", "coupled_decay", "preconditioner", "decoupled_decay")
        )
        u = E.apply(recorded.gradient) + W.apply(theta)
        born = len(self.state)
        starts = started_states(rule, recorded, declared.filter.order)[born:] if declared.filter.order > born else ()
        self.state = (*self.state, *(torch.zeros_like(theta) if m is None else m for m in starts))
        self.starts.append(tuple(starts))
        self.out, self.state = declared.filter.advance(self.state, u)
        self.filters.append(declared.filter)
        self.inputs.append(u)
        moved = P.apply(self.out) + rho.apply(theta)
        self.off = off - moved - recorded.displacement
        return _largest(self.off)

    def alpha_error(self) -> float:
        """The recurrence's last output against the explicit sum over alpha_{s,i} u_i."""
        assert self.out is not None
        last = self.filters[-1]
        total = _apply(last.D, self.inputs[-1])
        scale = _largest(total)
        for i in range(len(self.filters) - 1):
            # alpha_{s,i} u_i, applied factor by factor: B_i, then A_{i+1} ... A_{s-1}, then C_s.
            states = [_apply(b, self.inputs[i]) for b in self.filters[i].B]
            for between in self.filters[i + 1 : -1]:
                grown = [*states, *(torch.zeros_like(total) for _ in range(between.order - len(states)))]
                states = [_sum(_apply(a, m) for a, m in zip(row, grown, strict=True)) for row in between.A]
            term = _sum(_apply(c, m) for c, m in zip(last.C, states, strict=False))
            if isinstance(term, Tensor):
                total, scale = total + term, max(scale, _largest(term))
        for term in self._started(total):
            total, scale = total + term, max(scale, _largest(term))
        return _largest(self.out - total) / (scale or 1.0)

    def _started(self, like: Tensor) -> Iterator[Tensor]:
        """What the starts of the states give to the last output: ``C_s A_{s-1} ... A_b m_0``, created in step b."""
        for b, starts in enumerate(self.starts):
            if all(m is None for m in starts):
                continue
            older = [torch.zeros_like(like)] * (self.filters[b].order - len(starts))
            states = [*older, *(torch.zeros_like(like) if m is None else m for m in starts)]
            for between in self.filters[b:-1]:
                grown = [*states, *(torch.zeros_like(like) for _ in range(between.order - len(states)))]
                states = [_sum(_apply(a, m) for a, m in zip(row, grown, strict=True)) for row in between.A]
            yield _sum(_apply(c, m) for c, m in zip(self.filters[-1].C, states, strict=False))


def _apply(coefficient: LinearOperator | float, x: Tensor) -> Tensor:
    return coefficient.apply(x) if isinstance(coefficient, LinearOperator) else coefficient * x


def _sum(terms: Any) -> Any:
    return sum(terms)


def _adjoint_error(declared: StepCoefficients, like: Tensor) -> float:
    generator = torch.Generator().manual_seed(like.numel())
    x, y = (torch.randn(like.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    named = (declared.preconditioner, declared.gradient_operator, declared.coupled_decay, declared.decoupled_decay)
    inside = [c for row in declared.filter.A for c in row] + [*declared.filter.B, *declared.filter.C, declared.filter.D]
    worst = 0.0
    for operator in (*named, *inside):
        if isinstance(operator, LinearOperator):
            forth, back = operator.apply(x) * y, x * operator.adjoint.apply(y)
            size = float(forth.abs().sum() + back.abs().sum())
            worst = max(worst, float((forth.sum() - back.sum()).abs()) / max(size, 1e-290))  # denormals round
    return worst
