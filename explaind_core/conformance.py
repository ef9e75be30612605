"""The conformance kit: hypothesis looks for a training that a rule's declaration does not explain.

For each drawn training (hyper-parameters, schedules, groups, shapes, missing and zero gradients, clipping), against
the real optimizer:

- one step: theta_{s-1} + declared update == theta_s;
- rollout: the declaration alone, started at theta_0 and fed the same gradients, ends where the optimizer does;
- alphas: the filter's recurrence == the explicit sum over ``alpha_{s,i} = C_s A_{s-1} ... A_{i+1} B_i``;
- adjoints: ``<A x, y> == <x, A' y>`` for every declared operator;
- store: recorded, written, opened and replayed, the training is what was observed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from explaind_core import trees
from explaind_core.cases import SHAPES, Case, MakeOptimizer, Shapes, observed, replayed
from explaind_core.coefficients import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.decompose import ParameterFilter, split_step
from explaind_core.errors import ConformanceError, ExplaindError
from explaind_core.operators import LinearOperator, as_operator
from explaind_core.recorded import to_dense
from explaind_core.replay import ReplayedStep
from explaind_core.trials import PRESENCE, Trials

__all__ = ["Case", "Conformance", "ConformanceError", "check_trials", "check_update_rule", "run_case"]


@dataclass(frozen=True)
class Conformance:
    """The largest errors of a check, in units of the size of what is compared.

    Attributes:
        one_step, rollout, alphas, adjoints: float64. one_step_float32: reported, never bounded.
        store: the largest difference between the training as observed and as it came back from the store; NaN if they
            do not even have the same entries.
        cases: how many trainings were tried. refused: how many drawn ones the optimizer's constructor refused.
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
                    rollout=past.roll(declared, recorded) / (past.size * len(past.filters)),
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
        self.state: tuple[Tensor, ...] = ()
        self.out: Tensor | None = None
        self.size = 1.0
        self.off: Tensor | None = None  # how far the declaration's own trajectory is from the real one

    def roll(self, declared: StepCoefficients, recorded: RecordedStep) -> float:
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
        missing = declared.filter.order - len(self.state)
        self.state = (*self.state, *(torch.zeros_like(theta) for _ in range(missing)))
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
        return _largest(self.out - total) / (scale or 1.0)


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


@st.composite
def _cases(draw: st.DrawFn, trials: Trials, dtype: str) -> Case:
    count, scheduled = draw(st.integers(1, 6)), dict(trials.scheduled)
    several = st.lists(st.sampled_from(trials.presence), min_size=len(trials.shapes), max_size=len(trials.shapes))
    return Case(
        options=_options_together(draw(st.fixed_dictionaries(dict(trials.hyper)))),
        second_group=draw(st.fixed_dictionaries({}, optional=scheduled)) if trials.groups > 1 else None,
        schedule=draw(st.lists(st.fixed_dictionaries({}, optional=scheduled), min_size=count, max_size=count)),
        gradients=draw(st.lists(several, min_size=count, max_size=count)),
        clip=None if trials.closure else draw(st.sampled_from([None, 0.5])),
        closure=trials.closure,
        stored=draw(st.sampled_from([False, False, True])),
        point=trials.point,
        shapes=trials.shapes,
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
    )


def _options_together(drawn: Mapping[str, Any]) -> dict[str, Any]:
    together = {k: v for name, values in drawn.items() if name.startswith("*") for k, v in values.items()}
    return {**{name: value for name, value in drawn.items() if not name.startswith("*")}, **together}


def check_update_rule(
    rule: UpdateRule | type[UpdateRule],
    make_optimizer: MakeOptimizer,
    *,
    hyper: Mapping[str, st.SearchStrategy[Any]] | None = None,
    scheduled: Mapping[str, st.SearchStrategy[Any]] | None = None,
    shapes: Shapes = SHAPES,
    presence: Sequence[str] = PRESENCE,
    groups: int = 2,
    closure: bool = False,
    point: str = "gradient",
    tolerance: float = 1e-14,
    max_examples: int = 100,
) -> Conformance:
    """Prove (or refute) by drawn examples that a rule's declaration is exact in float64.

    Args:
        rule: the rule. make_optimizer: called with parameter groups and the options drawn from ``hyper``.
        hyper: constructor option -> hypothesis strategy. Under a key that starts with ``*``, a strategy of
            dictionaries: options that are drawn together, since they exclude or need each other.
        scheduled: hyper-parameter -> strategy, for values set anew in a group before a step (``lr`` between 1e-4
            and 1 by default).
        shapes: of the parameters. presence: which kinds of gradient occur; leave out ``"none"`` where the optimizer
            itself cannot do without; ``"sparse"`` draws sparse gradients (see :class:`~explaind_core.cases.Case`).
        groups: how many parameter groups, 1 or 2. closure: train by ``step(closure)`` on a smooth loss.
        point: ``"evaluated"`` to check the point where the model is evaluated, for a rule that has one.
        tolerance: of one step (see :func:`run_case` for its unit), and of the store. Rollout, alphas and adjoints get
            100 times that.
        max_examples: drawn trainings in float64; a quarter as many are drawn in float32 and reported.

    Returns:
        The largest errors found.

    Raises:
        ConformanceError: with the smallest failing case, as code that runs.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> hyper = {"momentum": st.sampled_from([0.0, 0.9])}
        >>> report = check_update_rule(SGDRule(), torch.optim.SGD, hyper=hyper, max_examples=5)
        >>> report.one_step < 1e-14
        True
    """
    drawn: dict[str, Any] = {"scheduled": scheduled} if scheduled is not None else {}
    trials = Trials(
        make_optimizer, hyper or {}, shapes=shapes, presence=presence, groups=groups, closure=closure, point=point,
        tolerance=tolerance, **drawn,
    )  # fmt: skip
    return check_trials(rule() if isinstance(rule, type) else rule, trials, max_examples=max_examples)


def check_trials(rule: UpdateRule, trials: Trials, *, max_examples: int = 100) -> Conformance:
    """:func:`check_update_rule` for a family of trainings (see there).

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> from explaind_core.trials import default_trials
        >>> check_trials(SGDRule(), default_trials(SGDRule()), max_examples=5).cases > 5
        True
    """
    total, tolerance = Conformance(), trials.tolerance
    bounds = {"one_step": tolerance, "rollout": 100 * tolerance, "alphas": 100 * tolerance, "adjoints": 100 * tolerance}
    bounds["store"] = tolerance

    def check(case: Case) -> None:
        nonlocal total
        if trials.may_refuse and not _accepted(trials.make_optimizer, case):
            total = total.merged(Conformance(refused=1))
            reject()
        try:
            found = run_case(rule, trials.make_optimizer, case)
        except ExplaindError as error:
            raise _refuted(rule, trials.make_optimizer, case, f"{type(error).__name__}: {error.what}") from error
        for name, bound in bounds.items():
            if not getattr(found, name) <= bound:  # a NaN must fail
                what = f"{name} error {getattr(found, name):.1e} > {bound:.0e}"
                raise _refuted(rule, trials.make_optimizer, case, what)
        total = total.merged(found)

    for dtype, examples in (("float64", max_examples), ("float32", max(1, max_examples // 4))):
        search = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            print_blob=False,
        )
        search(given(_cases(trials, dtype))(check))()
    return total


def _accepted(make_optimizer: MakeOptimizer, case: Case) -> bool:
    """Whether the constructor takes a combination of guessed options."""
    try:
        make_optimizer([{"params": [torch.nn.Parameter(torch.ones(2))]}], **case.options)
    except (ValueError, RuntimeError):
        return False
    return True


def _code(case: Case) -> str:
    """The case as a call, without what has its default value."""
    given = ((f.name, getattr(case, f.name), getattr(Case(), f.name)) for f in fields(case))
    return f"Case({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"


def _refuted(rule: UpdateRule, make_optimizer: MakeOptimizer, case: Case, what: str) -> ConformanceError:
    kind, maker = type(rule), getattr(make_optimizer, "__qualname__", repr(make_optimizer))
    module = getattr(make_optimizer, "__module__", "?")
    return ConformanceError(
        f"{kind.__name__} does not explain {maker}: {what}",
        where="the smallest case found; this runs:\n"
        f"from explaind_core.testing import Case, run_case\n"
        f"from {kind.__module__} import {kind.__qualname__}\n"
        f"from {module} import {maker}\n"
        f"print(run_case({kind.__qualname__}(), {maker}, {_code(case)}))",
        remedy="compare the rule's coefficients with the optimizer's step()",
    )
