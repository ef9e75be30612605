"""One update, split by its rule into kernel, regularization and prehistory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from explaind_core.decomposition.rule_view import FLAT, flat_step, recorded_step, split_flat
from explaind_core.errors import CoefficientError, RecordingError, StoreError
from explaind_core.rules import (
    FilterState,
    LinearFilter,
    LinearOperator,
    OfReadout,
    RecordedStep,
    StepCoefficients,
    UpdateRule,
    closed,
    started_states,
)
from explaind_core.run import ReplayedStep
from explaind_core.tensors import to_dense

__all__ = ["ParameterFilter", "UpdateSplit", "by_parameter", "relative_correction", "split_step", "split_update"]

#: So many roundings of its terms a readout may be off by: its states were rounded at every step.
_ROUNDINGS = 16


@dataclass(frozen=True)
class UpdateSplit:
    """One parameter's update in float64; each part is what is ADDED to theta.

    Attributes:
        kernel: what gradients moved.
        regularization: what weight decay moved.
        prehistory: what the optimizer's state at the start of the recording moved; None where zero.
        displacement: the observed theta_s - theta_{s-1}.
        missed: the 2-norm of what a secant had to add to the preconditioner's update; 0 for a rule that needs no
            secant.
        moved: the 2-norm of that update; 0 for a rule that needs no secant.
        penalty: what a penalty's gradient moved; None where zero.
        unsure: the 2-norm of what rounding may make of the preconditioner, where it is made from the readout: a sign of
            what is zero but for rounding is either one.
    """

    kernel: Tensor
    regularization: Tensor
    prehistory: Tensor | None
    displacement: Tensor
    missed: float = 0.0
    moved: float = 0.0
    penalty: Tensor | None = None
    unsure: float = 0.0

    @property
    def declared(self) -> Tensor:
        """Kernel + regularization + prehistory + penalty."""
        total = self.kernel + self.regularization
        for part in (self.prehistory, self.penalty):
            total = total if part is None else total + part
        return total


class ParameterFilter:
    """The four filter states of one parameter, and its clock.

    Args:
        name: the parameter's name.
        rule: what speaks for it.
        state: its entries in the optimizer's state where recording began.
        shape: of the parameter.
    """

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
        # What the optimizer holds is what the filter starts at; an unused one may hold zeros that it will overwrite.
        filled = [k for k in rule.filter_states if k in held and bool(held[k].any())]
        self.found = frozenset(j for j, k in enumerate(rule.filter_states) if k in held and (not fresh or k in filled))
        if filled:
            self.prehistory = tuple(_initial(state.get(key), shape) for key in rule.filter_states)

    def start(self, rule: UpdateRule, recorded: RecordedStep, order: int) -> None:
        """States that ``recorded`` creates start at what the rule declares, unless recording found them."""
        born = range(len(self.kernel), order)
        if not born or not rule.starts_elsewhere:
            return
        starts = started_states(rule, recorded, order)
        for j in born:
            start = starts[j]
            if start is not None and j not in self.found:
                missing = j + 1 - len(self.prehistory)
                zeros = (torch.zeros(self.shape, dtype=torch.float64) for _ in range(missing))
                state = [*self.prehistory, *zeros]
                state[j] = start
                self.prehistory = tuple(state)

    def advance(self, split: _Inputs, coefficients: LinearFilter) -> tuple[Tensor, dict[str, Tensor]]:
        """Feed one step; what the filter reads out of gradients, and of the other parts that are not zero.

        Args:
            split: the inputs of the filter, by the part of the update that each belongs to.
            coefficients: (A, B, C, D) of this step.

        Raises:
            RecordingError: recording began with a used optimizer, and the rule does not say which state is the
                filter's.
            CoefficientError: the filter lost a state during the run.
        """
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
    rule: UpdateRule,
    recorded: RecordedStep,
    memory: ParameterFilter,
    penalty: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[UpdateSplit, StepCoefficients]:
    """Split one parameter's update by the rule's coefficients, advancing its filter ``memory``.

    Args:
        rule: what speaks for the parameter.
        recorded: what it is shown of the step.
        memory: the parameter's filter, which is advanced.
        penalty: what a penalty's gradient is in the fed one, of the parameter's shape; None for zero.
        dtype: what the optimizer computed in.

    Raises:
        CoefficientError: the rule's declaration is malformed, or its update is not finite.
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
    memory.start(rule, recorded, declared.filter.order)
    kernel, others = memory.advance(inputs, declared.filter)
    missed = moved = unsure = 0.0
    out = sum(others.values(), kernel)  # all that the filter reads out
    if isinstance(P, OfReadout):
        unsure = _unsure(P, out, _terms(declared.filter, memory, recorded.gradient), torch.finfo(dtype))
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
        unsure=unsure,
    )
    if not torch.isfinite(split.declared).all():
        raise CoefficientError(
            f"{type(rule).__name__} declares an update that is not finite",
            where=f"parameter {recorded.name!r}, step {recorded.step}",
            remedy="check the rule's preconditioner for a division by zero",
        )
    return split, declared


def _terms(coefficients: LinearFilter, memory: ParameterFilter, gradient: Tensor) -> Tensor:
    """How large what the filter adds up is, entry by entry; zero where all of it is."""
    terms = [(coefficients.D, gradient)]
    for states in (memory.kernel, memory.decay, memory.penalty, memory.prehistory):
        terms += zip(coefficients.C, states, strict=False)  # a part that nothing was ever fed has no states
    sizes = ((c.apply(t) if isinstance(c, LinearOperator) else c * t).abs() for c, t in terms)
    return sum(sizes, torch.zeros_like(gradient))


def _unsure(made: OfReadout, out: Tensor, terms: Tensor, numbers: torch.finfo) -> float:
    """What the update may differ by where the readout is rounded: with its terms, or away below the normal numbers."""
    off = (_ROUNDINGS * numbers.eps * terms + numbers.tiny).where(terms > 0, 0.0)
    above, below = (made.make(near).apply(near) for near in (out + off, out - off))
    return float((above - below).norm())


def _zero(operator: object) -> bool:
    return getattr(operator, "factor", None) == 0


def split_step(
    rule: UpdateRule,
    replayed: ReplayedStep,
    memories: dict[str, ParameterFilter],
    penalties: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[UpdateSplit, StepCoefficients, RecordedStep]]:
    """Split the updates of all parameters that step s updates; ``memories`` are advanced, and made where missing.

    For a ``flat`` rule there is one entry, over all of them: see :func:`by_parameter`.

    Args:
        rule: of the run.
        replayed: the step.
        memories: parameter name -> its filter; they are advanced, and made where missing.
        penalties: parameter name -> the gradient of a penalty; None where the loss has none.

    Raises:
        StoreError: there is a gradient of a parameter without hyper-parameters.
    """
    if rule.flat:
        names, shown = list(replayed.hyper), [FLAT]
        size = sum(replayed.theta[n].numel() for n in names)
    else:
        names, shown = [], [n for n in replayed.theta if n in replayed.gradients]
    found = {}
    for name in shown:
        if not rule.flat and name not in replayed.hyper:
            raise StoreError(
                "a step has a gradient of a parameter that is in none of its groups",
                where=f"step {replayed.step}, parameter {name!r}",
                remedy="do not use this store: it was not written by explaind",
            )
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
        dtype = replayed.theta[names[0] if names else name].dtype
        found[name] = (*split_update(member, step, memory, penalty, dtype=dtype), step)
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
    """The splits of :func:`split_step` by parameter name, for a ``flat`` rule too.

    Args:
        rule: of the run.
        replayed: the step.
        splits: by parameter name, or one entry ``FLAT``.
    """
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
