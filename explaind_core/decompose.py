"""The update of every step, split into kernel, regularization and prehistory, with its distance from the truth.

For each parameter tensor, with everything on the right in float64::

    theta_s - theta_{s-1} = kernel_s + regularization_s + penalty_s + prehistory_s + error_s
    kernel_s         = - sum_{i<=s} alpha_{s,i} P_s E_i g_i
    regularization_s = - rho_s theta_{s-1} - P_s[ sum_{i<=s} alpha_{s,i} W_i theta_{i-1} ]
    penalty_s        = - sum_{i<=s} alpha_{s,i} P_s E_i d penalty / d theta_{i-1}   (zero unless the loss has one)
    prehistory_s     = - P_s[ C_s A_{s-1} ... A_1 m_0 ]     (zero unless recording began with a used optimizer)

Where the loss has a penalty, a term of the parameters alone, g_i is the fed gradient less the penalty's.
The sums over i are never formed: the filter runs once over the kernel's inputs, once over the decay's, once over the
penalty's and once over m_0. ``error_s`` is what the declaration does not explain: rounding, for a correct one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from explaind_core.coefficients import FilterState, LinearFilter, RecordedStep, StepCoefficients, UpdateRule
from explaind_core.errors import CoefficientError, RecordingError
from explaind_core.operators import OfReadout
from explaind_core.penalties import penalty_gradients
from explaind_core.recorded import FLAT, flat_step, recorded_step, split_flat, to_dense
from explaind_core.replay import Replay, ReplayedStep
from explaind_core.run import Run
from explaind_core.secant import closed

__all__ = [
    "Decomposer",
    "ParameterFilter",
    "StepDecomposition",
    "UpdateSplit",
    "by_parameter",
    "decompose",
    "relative_correction",
    "split_step",
    "split_update",
]


@dataclass(frozen=True)
class UpdateSplit:
    """One parameter's update in float64; each part is what is ADDED to theta.

    ``prehistory`` and ``penalty`` are None where zero.

    ``missed`` is what a secant had to add to the preconditioner's update, ``moved`` the update's own size (2-norms,
    0 for a rule that needs no secant).
    """

    kernel: Tensor
    regularization: Tensor
    prehistory: Tensor | None
    displacement: Tensor
    missed: float = 0.0
    moved: float = 0.0
    penalty: Tensor | None = None

    @property
    def declared(self) -> Tensor:
        """Kernel + regularization + prehistory + penalty."""
        total = self.kernel + self.regularization
        for part in (self.prehistory, self.penalty):
            total = total if part is None else total + part
        return total


@dataclass(frozen=True)
class StepDecomposition:
    """The split update of one step, by parameter name.

    Attributes:
        step: s. updates: parameter name -> :class:`UpdateSplit`.
        theta_before, theta: the recorded theta_{s-1} and theta_s.
        error: ``||declared - displacement|| / ||displacement||`` over all parameters (2-norms; 0 where both are 0).
        rounding: ``eps ||theta_s|| / ||displacement||``: what rounding theta_s to its dtype can cost, in the same unit.
        drift: largest difference between the replayed and the recorded theta_s.
        correction: the size of the rank-one secants relative to the update, for a rule that is closed by them.
        coefficients: what the rule declared, by parameter name (one entry ``FLAT`` for a flat rule).
        gradients: as they were fed, less a penalty's, in the run's dtype.
        taken_at: where they were taken: theta_before, for most.
    """

    step: int
    updates: Mapping[str, UpdateSplit]
    theta_before: Mapping[str, Tensor]
    theta: Mapping[str, Tensor]
    error: float
    rounding: float
    drift: float
    correction: float = 0.0
    coefficients: Mapping[str, StepCoefficients] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    taken_at: Mapping[str, Tensor] = field(default_factory=dict)


class ParameterFilter:
    """The four filter states of one parameter, and its clock."""

    def __init__(self, name: str, rule: UpdateRule, state: Mapping[str, object], shape: torch.Size) -> None:
        self.name, self.shape = name, shape
        clock = state.get("step", 0)
        self.clock = int(clock.item() if isinstance(clock, Tensor) else clock)  # type: ignore[call-overload]
        self.kernel: FilterState = ()
        self.decay: FilterState = ()
        self.penalty: FilterState = ()
        self.prehistory: FilterState = ()
        held = {k: to_dense(t) for k, t in state.items() if k != "step" and isinstance(t, Tensor)}
        # Some optimizers fill their state before their first step; a clock at 0 says that it is unused.
        fresh = "step" in state and self.clock == 0
        self.used = [] if fresh else sorted(k for k, t in held.items() if bool(t.any()))
        self.named = bool(rule.filter_states)
        if any(key in self.used for key in rule.filter_states):
            self.prehistory = tuple(_initial(state.get(key), shape) for key in rule.filter_states)

    def advance(self, split: _Inputs, coefficients: LinearFilter) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed one step; what the filter reads out of gradients, and of the other parts that are not zero."""
        if self.used and coefficients.order and not self.named:
            raise RecordingError(
                "recording began with a used optimizer, and its rule does not say which state is the filter's",
                where=f"parameter {self.name!r}, state entries {self.used}",
                expected="the rule's filter_states",
                remedy="record from the first step, or declare filter_states in the rule",
            )
        self.kernel = self._grown(self.kernel, coefficients)
        kernel, self.kernel = coefficients.advance(self.kernel, split.gradient)
        others: dict[str, Tensor] = {}
        for name, fed in (("decay", split.decay), ("penalty", split.penalty), ("prehistory", None)):
            state: FilterState = getattr(self, name)
            if fed is not None or state:
                fed = torch.zeros_like(split.gradient) if fed is None else fed
                others[name], state = coefficients.advance(self._grown(state, coefficients), fed)
                setattr(self, name, state)
        return kernel, others

    def _grown(self, state: FilterState, coefficients: LinearFilter) -> FilterState:
        """Filters may gain states during a run (momentum switched on), which start at zero; never lose them."""
        if len(state) > coefficients.order:
            raise CoefficientError(
                "the filter lost a state during the run",
                where=f"parameter {self.name!r}, its step {self.clock}",
                expected=f"at least {len(state)} states",
                got=coefficients.order,
                remedy="keep the state with A=1, B=0 and C=0 where the optimizer freezes it",
            )
        zeros = tuple(torch.zeros(self.shape, dtype=torch.float64) for _ in range(coefficients.order - len(state)))
        return (*state, *zeros)


def _initial(value: object, shape: torch.Size) -> Tensor:
    return to_dense(value).double() if isinstance(value, Tensor) else torch.zeros(shape, dtype=torch.float64)


@dataclass(frozen=True)
class _Inputs:
    gradient: Tensor
    decay: Tensor | None
    penalty: Tensor | None


def split_update(
    rule: UpdateRule, recorded: RecordedStep, memory: ParameterFilter, penalty: Tensor | None = None
) -> tuple[UpdateSplit, StepCoefficients]:
    """Split one parameter's update by the rule's coefficients, advancing its filter ``memory``.

    ``penalty`` is what a penalty's gradient is in the fed one.
    """
    declared = rule.coefficients(recorded)
    if not isinstance(declared, StepCoefficients):
        raise CoefficientError(
            f"{type(rule).__name__}.coefficients returned something else",
            expected="StepCoefficients",
            got=type(declared),
        )
    P, E, W, rho = (
        getattr(declared, n) for n in ("preconditioner", "gradient_operator", "coupled_decay", "decoupled_decay")
    )
    coupled = None if _zero(W) else W.apply(recorded.theta)
    gradient = recorded.gradient if penalty is None else recorded.gradient - penalty
    inputs = _Inputs(E.apply(gradient), coupled, None if penalty is None else E.apply(penalty))
    kernel, others = memory.advance(inputs, declared.filter)
    missed = moved = 0.0
    out = sum(others.values(), kernel)  # all that the filter reads out
    if isinstance(P, OfReadout):
        P = P.make(out)
        declared = replace(declared, preconditioner=P)
    if rule.closed_by_secant:
        update = -(recorded.displacement + rho.apply(recorded.theta))
        P, missed = closed(P, out, update)
        moved, declared = float(update.norm()), replace(declared, preconditioner=P)
    regularization = -P.apply(others["decay"]) if "decay" in others else torch.zeros_like(recorded.theta)
    if not _zero(rho):
        regularization = regularization - rho.apply(recorded.theta)
    split = UpdateSplit(
        kernel=-P.apply(kernel),
        regularization=regularization,
        prehistory=-P.apply(others["prehistory"]) if "prehistory" in others else None,
        displacement=recorded.displacement,
        missed=missed,
        moved=moved,
        penalty=-P.apply(others["penalty"]) if "penalty" in others else None,
    )
    if not torch.isfinite(split.declared).all():
        raise CoefficientError(
            f"{type(rule).__name__} declares an update that is not finite",
            where=f"parameter {recorded.name!r}, step {recorded.step}",
            remedy="check the rule's preconditioner for a division by zero",
        )
    return split, declared


def _zero(operator: object) -> bool:
    return getattr(operator, "factor", None) == 0


def decompose(run: Run, *, first: int = 1, last: int | None = None) -> Iterator[StepDecomposition]:
    """Split the update of each step ``first..last`` of a run, in order.

    The optimizer is replayed, and the filters run, from the start of the recording in any case, so a late
    step costs a pass over the gradients before it.

    Raises:
        InferenceError: the rule is inferred and a step's correction above its bound.
        StoreError: the run cannot be replayed here. CoefficientError: the rule's declaration is malformed.
        RecordingError: recording began with a used optimizer whose filter states the rule does not name.

    Example:
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=3)
        >>> max(step.error for step in decompose(run)) < 1e-12
        True
    """
    last = len(run.steps) if last is None else last
    for split in Decomposer(run).steps(until=last):
        if split.step >= first:
            yield split


class Decomposer:
    """Decomposes a run step by step, and can be put back to where it was after an earlier step.

    Args:
        run: the run; the optimizer is rebuilt and replayed (errors as :func:`decompose`).
    """

    def __init__(self, run: Run) -> None:
        self._run, self._replay = run, Replay(run)
        self._rule = self._replay.rule().rule
        self._memories: dict[str, ParameterFilter] = {}

    def steps(self, *, start: int = 0, until: int) -> Iterator[StepDecomposition]:
        """The steps ``start + 1 .. until``; the state after ``start`` must be the present one."""
        rule = self._rule
        for replayed in self._replay.steps(start=start, until=until):
            penalties = penalty_gradients(self._run, replayed)
            found = split_step(rule, replayed, self._memories, penalties)
            splits = {name: split for name, (split, _, _) in found.items()}
            correction = relative_correction(splits.values())
            for member, names in _by_member(rule, replayed, splits):
                member.check_correction(relative_correction(splits[n] for n in names), replayed.step)
            decomposed = _with_errors(replayed, by_parameter(rule, replayed, splits), correction)
            yield replace(
                decomposed,
                coefficients={name: declared for name, (_, declared, _) in found.items()},
                gradients=_less(replayed.gradients, penalties),
                taken_at=replayed.theta_before if replayed.gradient_point is None else replayed.gradient_point,
            )

    def state(self) -> dict[str, Any]:
        """The optimizer's and the filters' state after the last step, to be given back to :meth:`load`."""
        filters = {
            name: {entry: getattr(m, entry) for entry in ("clock", "kernel", "decay", "penalty", "prehistory")}
            for name, m in self._memories.items()
        }
        return {"optimizer": self._replay.state(), "filters": filters}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to where :meth:`state` was called, or to one of its copies from disk."""
        self._replay.load(state["optimizer"])
        # Copies: a state may be loaded more than once, and filters that appeared later must go.
        memories = {name: copy.copy(self._memories[name]) for name in state["filters"]}
        for name, kept in state["filters"].items():
            for entry, value in kept.items():
                setattr(memories[name], entry, value)
        self._memories = memories


def split_step(
    rule: UpdateRule,
    replayed: ReplayedStep,
    memories: dict[str, ParameterFilter],
    penalties: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[UpdateSplit, StepCoefficients, RecordedStep]]:
    """Split the updates of all parameters that step s updates; ``memories`` are advanced, and made where missing.

    ``penalties`` are the gradients of a penalty, by parameter name.

    For a ``flat`` rule there is one entry, over all of them: see :func:`by_parameter`.
    """
    if rule.flat:
        names, shown = list(replayed.hyper), [FLAT]
        size = sum(replayed.theta[n].numel() for n in names)
    else:
        names, shown = [], [n for n in replayed.theta if n in replayed.gradients]
    found = {}
    for name in shown:
        member = rule if rule.flat else rule.member(replayed.hyper[name])
        if name not in memories:
            shape = torch.Size([size]) if rule.flat else replayed.theta[name].shape
            memories[name] = ParameterFilter(name, member, replayed.before.get(name, {}), shape)
        memory = memories[name]
        memory.clock += 1
        step = flat_step(replayed, names, memory.clock) if rule.flat else recorded_step(replayed, name, memory.clock)
        penalty: Tensor | None = None
        if penalties is not None:
            whole = [
                penalties.get(n, torch.zeros_like(replayed.theta[n])).reshape(-1).double() for n in names or [name]
            ]
            penalty = torch.cat(whole).reshape(step.theta.shape)
        found[name] = (*split_update(member, step, memory, penalty), step)
    return found


def _by_member(rule: UpdateRule, replayed: ReplayedStep, names: Iterable[str]) -> list[tuple[UpdateRule, list[str]]]:
    """Which rule speaks for which of the parameters: more than one where several optimizers trained."""
    if rule.flat:
        return [(rule, list(names))]
    found: dict[int, tuple[UpdateRule, list[str]]] = {}
    for name in names:
        member = rule.member(replayed.hyper[name])
        found.setdefault(id(member), (member, []))[1].append(name)
    return list(found.values())


def by_parameter(rule: UpdateRule, replayed: ReplayedStep, splits: Mapping[str, UpdateSplit]) -> dict[str, UpdateSplit]:
    """The splits of :func:`split_step` by parameter name, for a ``flat`` rule too."""
    if not rule.flat:
        return dict(splits)
    whole, names = splits[FLAT], list(replayed.hyper)
    parts = [
        None if vector is None else split_flat(vector, replayed.theta, names)
        for vector in (whole.kernel, whole.regularization, whole.prehistory, whole.displacement, whole.penalty)
    ]
    kernel, regularization, prehistory, displacement, penalty = parts
    assert kernel is not None
    assert regularization is not None
    assert displacement is not None
    return {
        n: UpdateSplit(
            kernel[n],
            regularization[n],
            None if prehistory is None else prehistory[n],
            displacement[n],
            penalty=None if penalty is None else penalty[n],
        )
        for n in names
    }


def _less(gradients: Mapping[str, Tensor], penalties: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The gradients without the penalty's part; as they are where there is no penalty."""
    if penalties is None:
        return dict(gradients)
    return {n: to_dense(g) - penalties[n].to(g.dtype) if n in penalties else g for n, g in gradients.items()}


def relative_correction(splits: Iterable[UpdateSplit]) -> float:
    """``||what secants added|| / ||update||`` over all parameters of a step; 0 where nothing moved."""
    missed, moved = 0.0, 0.0
    for split in splits:
        missed, moved = missed + split.missed**2, moved + split.moved**2
    return (missed / moved) ** 0.5 if moved else 0.0


def _with_errors(replayed: ReplayedStep, updates: dict[str, UpdateSplit], correction: float) -> StepDecomposition:
    # A parameter without gradient is not updated: whatever it moved by nevertheless is error.
    still = [n for n in replayed.theta if n not in updates]
    missed = sum(float((replayed.theta[n].double() - replayed.theta_before[n].double()).square().sum()) for n in still)
    moved = missed + sum(float(u.displacement.square().sum()) for u in updates.values())
    missed += sum(float((u.declared - u.displacement).square().sum()) for u in updates.values())
    size = sum(
        (torch.finfo(replayed.theta[n].dtype).eps ** 2) * float(replayed.theta[n].double().square().sum())
        for n in updates
    )

    def relative(squares: float) -> float:
        return 0.0 if squares == 0 else (squares / moved) ** 0.5 if moved else float("inf")

    return StepDecomposition(
        step=replayed.step,
        updates=updates,
        theta_before=replayed.theta_before,
        theta=replayed.theta,
        error=relative(missed),
        rounding=relative(size),
        drift=replayed.drift,
        correction=correction,
    )
