"""The conformance kit: hypothesis looks for a training that a rule's declaration does not explain.

For each drawn training (hyper-parameters, schedules, groups, shapes, missing and zero gradients, clipping), against
the real optimizer:

- one step: theta_{s-1} + declared update == theta_s;
- rollout: the declaration alone, started at theta_0 and fed the same gradients, ends where the optimizer does;
- alphas: the filter's recurrence == the explicit sum over ``alpha_{s,i} = C_s A_{s-1} ... A_{i+1} B_i``;
- adjoints: ``<A x, y> == <x, A' y>`` for every declared operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.coefficients import LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.decompose import ParameterFilter, recorded_step, split_update
from explaind_core.errors import ExplaindError
from explaind_core.operators import LinearOperator, as_operator
from explaind_core.replay import ReplayedStep

__all__ = ["Case", "Conformance", "ConformanceError", "check_update_rule", "run_case"]

MakeOptimizer = Callable[..., torch.optim.Optimizer]
Shapes = tuple[tuple[int, ...], ...]

#: Tensors without axes, vectors, matrices and more.
SHAPES: Shapes = ((), (3,), (4, 5), (2, 3, 2))


class ConformanceError(ExplaindError):
    """A declaration does not explain its optimizer; carries the smallest case found, as code that runs."""


@dataclass(frozen=True)
class Case:
    """One small training, fully determined.

    Attributes:
        options: for ``make_optimizer``. second_group: what the second parameter group overrides.
        schedule: per step, what is set in the first group before it. gradients: per step and parameter
            ``"yes"``, ``"none"``, ``"zero"`` or ``"some zeros"``. clip: the largest gradient norm, or None.
        shapes, dtype, seed: of the parameters.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    second_group: Mapping[str, Any] = field(default_factory=dict)
    schedule: Sequence[Mapping[str, Any]] = ({},)
    gradients: Sequence[Sequence[str]] = (("yes",) * 4,)
    clip: float | None = None
    shapes: Shapes = SHAPES
    dtype: str = "float64"
    seed: int = 0


@dataclass(frozen=True)
class Conformance:
    """The largest errors of a check, in units of the size of what is compared.

    Attributes:
        one_step, rollout, alphas, adjoints: float64. one_step_float32: reported, never bounded.
        cases: how many trainings were tried.
    """

    one_step: float = 0.0
    rollout: float = 0.0
    alphas: float = 0.0
    adjoints: float = 0.0
    one_step_float32: float = 0.0
    cases: int = 0

    def merged(self, other: Conformance) -> Conformance:
        """The larger of each error, and all cases."""
        worst = {n: max(getattr(self, n), getattr(other, n)) for n in vars(self) if n != "cases"}
        return Conformance(**worst, cases=self.cases + other.cases)


def run_case(rule: UpdateRule, make_optimizer: MakeOptimizer, case: Case) -> Conformance:
    """Train one case with the real optimizer and measure how far the declaration is from it.

    Errors are relative to ``1 + max|theta| + max|kernel| + max|regularization|`` of the tensor: the two parts may be
    far larger than their sum, and no declaration can be nearer than their rounding.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> run_case(SGDRule(), torch.optim.SGD, Case(options={"lr": 0.1, "momentum": 0.9})).one_step < 1e-14
        True
    """
    trained = _train(make_optimizer, case)
    memories: dict[str, ParameterFilter] = {}
    closed: dict[str, Tensor] = {}
    pasts: dict[str, _Past] = {}
    worst = Conformance(cases=1)
    single = case.dtype != "float64"
    for step in trained:
        rule.check_options(step.hyper[next(iter(step.hyper))], _options(step))
        for name in step.gradients:
            memory = memories.setdefault(name, ParameterFilter(name, rule, {}, step.theta[name].shape))
            past = pasts.setdefault(name, _Past())
            recorded = recorded_step(step, name, memory)
            split, declared = split_update(rule, recorded, memory)
            own = closed.setdefault(name, recorded.theta)
            parts = (recorded.theta, split.kernel, split.regularization)
            size = 1 + sum(float(part.abs().max()) for part in parts if part.numel())
            one_step = _largest(recorded.theta + split.declared - step.theta[name].double()) / size
            if single:
                worst = worst.merged(Conformance(one_step_float32=one_step))
                continue
            closed[name] = past.roll(declared, recorded, own)
            past.size = max(past.size, size)
            worst = worst.merged(
                Conformance(
                    one_step=one_step,
                    rollout=_largest(closed[name] - step.theta[name].double()) / (past.size * len(past.filters)),
                    alphas=past.alpha_error(),
                    adjoints=_adjoint_error(declared, recorded.theta),
                )
            )
    return worst


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


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

    def roll(self, declared: StepCoefficients, recorded: RecordedStep, theta: Tensor) -> Tensor:
        """The declared step from the declaration's own theta and filter state."""
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
        return theta - P.apply(self.out) - rho.apply(theta)

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


def _clone(tree: Any) -> Any:
    return trees.map_tensors(lambda t: t.detach().clone(), tree)


def _train(make_optimizer: MakeOptimizer, case: Case) -> list[ReplayedStep]:
    """The real training, with everything that a recorder would see."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = getattr(torch, case.dtype)

    def draw(shape: Sequence[int]) -> Tensor:
        drawn: Tensor = torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)
        return drawn

    parameters = {f"p{i}": nn.Parameter(draw(shape)) for i, shape in enumerate(case.shapes)}
    names = {id(p): n for n, p in parameters.items()}
    even, odd = list(parameters.values())[::2], list(parameters.values())[1::2]
    groups = [{"params": even}, {"params": odd, **case.second_group}] if odd else [{"params": even}]
    optimizer = make_optimizer(groups, **case.options)
    steps = []
    for s, (scheduled, presence) in enumerate(zip(case.schedule, case.gradients, strict=True), 1):
        optimizer.param_groups[0].update(scheduled)
        for parameter, what in zip(parameters.values(), presence, strict=False):
            gradient = draw(parameter.shape)
            if what == "some zeros" and parameter.ndim:
                gradient.view(-1)[::2] = 0
            parameter.grad = None if what == "none" else gradient * (what != "zero")
        if case.clip is not None:
            nn.utils.clip_grad_norm_(list(parameters.values()), case.clip)
        gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        hyper = {
            names[id(p)]: {k: v for k, v in g.items() if k != "params"}
            for g in optimizer.param_groups
            for p in g["params"]
        }
        before = {n: _clone(dict(optimizer.state.get(p, {}))) for n, p in parameters.items()}
        theta_before = _clone(parameters)
        optimizer.step()
        after = {n: _clone(dict(optimizer.state.get(p, {}))) for n, p in parameters.items()}
        steps.append(ReplayedStep(s, theta_before, _clone(parameters), gradients, hyper, before, after, 0.0))
    return steps


@st.composite
def _cases(
    draw: st.DrawFn,
    hyper: Mapping[str, st.SearchStrategy[Any]],
    scheduled: Mapping[str, st.SearchStrategy[Any]],
    shapes: Shapes,
    presence: Sequence[str],
    dtype: str,
) -> Case:
    count = draw(st.integers(1, 6))
    several = st.lists(st.sampled_from(presence), min_size=len(shapes), max_size=len(shapes))
    return Case(
        options=draw(st.fixed_dictionaries(dict(hyper))),
        second_group=draw(st.fixed_dictionaries({}, optional=dict(scheduled))),
        schedule=draw(st.lists(st.fixed_dictionaries({}, optional=dict(scheduled)), min_size=count, max_size=count)),
        gradients=draw(st.lists(several, min_size=count, max_size=count)),
        clip=draw(st.sampled_from([None, 0.5])),
        shapes=shapes,
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
    )


def check_update_rule(
    rule: UpdateRule | type[UpdateRule],
    make_optimizer: MakeOptimizer,
    *,
    hyper: Mapping[str, st.SearchStrategy[Any]] | None = None,
    scheduled: Mapping[str, st.SearchStrategy[Any]] | None = None,
    shapes: Shapes = SHAPES,
    presence: Sequence[str] = ("yes", "yes", "none", "zero", "some zeros"),
    tolerance: float = 1e-14,
    max_examples: int = 100,
) -> Conformance:
    """Prove (or refute) by drawn examples that a rule's declaration is exact in float64.

    Args:
        rule: the rule. make_optimizer: called with parameter groups and the options drawn from ``hyper``.
        hyper: constructor option -> hypothesis strategy.
        scheduled: hyper-parameter -> strategy, for values set anew in a group before a step (``lr`` between 1e-4
            and 1 by default).
        shapes: of the parameters. presence: which kinds of gradient occur; leave out ``"none"`` where the optimizer
            itself cannot do without.
        tolerance: of one step (see :func:`run_case` for its unit). Rollout, alphas and adjoints get 100 times that.
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
    checked = rule() if isinstance(rule, type) else rule
    hyper = hyper or {}
    scheduled = {"lr": st.floats(1e-4, 1.0)} if scheduled is None else scheduled
    total = Conformance()
    bounds = {"one_step": tolerance, "rollout": 100 * tolerance, "alphas": 100 * tolerance, "adjoints": 100 * tolerance}

    def check(case: Case) -> None:
        nonlocal total
        try:
            found = run_case(checked, make_optimizer, case)
        except ExplaindError as error:
            raise _refuted(checked, make_optimizer, case, f"{type(error).__name__}: {error.what}") from error
        for name, bound in bounds.items():
            if not getattr(found, name) <= bound:  # a NaN must fail
                raise _refuted(checked, make_optimizer, case, f"{name} error {getattr(found, name):.1e} > {bound:.0e}")
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
        search(given(_cases(hyper, scheduled, shapes, presence, dtype))(check))()
    return total


def _refuted(rule: UpdateRule, make_optimizer: MakeOptimizer, case: Case, what: str) -> ConformanceError:
    kind, maker = type(rule), getattr(make_optimizer, "__qualname__", repr(make_optimizer))
    module = getattr(make_optimizer, "__module__", "?")
    return ConformanceError(
        f"{kind.__name__} does not explain {maker}: {what}",
        where="the smallest case found; this runs:\n"
        f"from explaind_core.conformance import Case, run_case\n"
        f"from {kind.__module__} import {kind.__qualname__}\n"
        f"from {module} import {maker}\n"
        f"print(run_case({kind.__qualname__}(), {maker}, {case!r}))",
        remedy="compare the rule's coefficients with the optimizer's step()",
    )
