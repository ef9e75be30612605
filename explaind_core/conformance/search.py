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

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from explaind_core.conformance.cases import Case
from explaind_core.conformance.one_case import Conformance, run_case
from explaind_core.errors import ConformanceError, ExplaindError
from explaind_core.rules import PRESENCE, SHAPES, MakeOptimizer, Shapes, Trials, UpdateRule

__all__ = ["Case", "ConformanceError", "check_trials", "check_update_rule"]


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
        rule: the rule, or its class.
        make_optimizer: called with parameter groups and the options drawn from ``hyper``.
        hyper: constructor option -> hypothesis strategy. Under a key that starts with ``*``, a strategy of
            dictionaries: options that are drawn together, since they exclude or need each other.
        scheduled: hyper-parameter -> strategy, for values set anew in a group before a step (``lr`` between 1e-4
            and 1 by default).
        shapes: of the parameters, a tuple for each.
        presence: which kinds of gradient occur; leave out ``"none"`` where the optimizer itself cannot do without;
            ``"sparse"`` draws sparse gradients (see :class:`~explaind_core.testing.Case`).
        groups: how many parameter groups, 1 or 2.
        closure: train by ``step(closure)`` on a smooth loss.
        point: ``"evaluated"`` to check the point where the model is evaluated, for a rule that has one.
        tolerance: the largest error of one step (see :func:`run_case` for its unit), and of the store. Rollout, alphas
            and adjoints get 100 times that.
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

    Args:
        rule: the rule.
        trials: how trainings are drawn.
        max_examples: drawn trainings in float64; a quarter as many are drawn in float32 and reported.

    Example:
        >>> from explaind_optimizers import SGDRule
        >>> from explaind_core.rules.trials import default_trials
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
