"""The update of every step, split into kernel, regularization and prehistory, with its distance from the truth.

For each parameter tensor, with everything on the right in float64::

    theta_s - theta_{s-1} = kernel_s + regularization_s + penalty_s + prehistory_s + error_s
    kernel_s         = - sum_{i<=s} alpha_{s,i} P_s E_i g_i
    regularization_s = - rho_s theta_{s-1} - P_s[ sum_{i<=s} alpha_{s,i} W_i theta_{i-1} ]
    penalty_s        = - sum_{i<=s} alpha_{s,i} P_s E_i d penalty / d theta_{i-1}   (zero unless the loss has one)
    prehistory_s     = - P_s[ C_s A_{s-1} ... A_1 m_0 ]     (zero unless the filter started elsewhere than at zero)

A filter starts elsewhere where recording began with a used optimizer, or where its rule says so (``filter_start``).
Where the loss has a penalty, a term of the parameters alone, g_i is the fed gradient less the penalty's.
The sums over i are never formed: the filter runs once over the kernel's inputs, once over the decay's, once over the
penalty's and once over m_0. ``error_s`` is what the declaration does not explain: rounding, for a correct one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from explaind_core.decomposition.penalty import penalty_gradients
from explaind_core.decomposition.split import (
    ParameterFilter,
    UpdateSplit,
    _by_member,
    _less,
    by_parameter,
    relative_correction,
    split_step,
)
from explaind_core.decomposition.update_error import UpdateError, distance, update_errors
from explaind_core.rules import StepCoefficients
from explaind_core.run import Replay, ReplayedStep, Run

__all__ = ["Decomposer", "StepDecomposition", "decompose"]


@dataclass(frozen=True)
class StepDecomposition:
    """The split update of one step, by parameter name.

    Attributes:
        step: s, counted from 1.
        updates: parameter name -> :class:`UpdateSplit`.
        theta_before: the recorded theta_{s-1}.
        theta: the recorded theta_s.
        error: ``||declared - displacement|| / max(||displacement||, 4096 eps ||theta_s||)`` over all parameters
            (2-norms; 0 where nothing is missed): what an update below the rounding of the parameters loses is no error.
        rounding: ``eps ||theta_s||`` in the same unit: what rounding theta_s to its dtype can cost.
        drift: largest difference between the replayed and the recorded theta_s.
        correction: the size of the rank-one secants relative to the update, for a rule that is closed by them.
        coefficients: what the rule declared, by parameter name (one entry ``FLAT`` for a flat rule).
        gradients: as they were fed, less a penalty's, in the run's dtype.
        taken_at: where they were taken: theta_before, for most.
        errors: how well the update of every parameter is explained.
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
    errors: tuple[UpdateError, ...] = ()


def decompose(run: Run, *, first: int = 1, last: int | None = None) -> Iterator[StepDecomposition]:
    """Split the update of each step ``first..last`` of a run, in order.

    The optimizer is replayed, and the filters run, from the start of the recording in any case, so a late
    step costs a pass over the gradients before it.

    Args:
        run: the recorded run.
        first: the first step to return.
        last: the last step to return, the run's last by default.

    Raises:
        InferenceError: the rule is inferred and a step's correction above its bound.
        StoreError: the run cannot be replayed here.
        CoefficientError: the rule's declaration is malformed.
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
        """The steps ``start + 1 .. until``; the state after ``start`` must be the present one.

        Args:
            start: where the present state stands, 0 for the beginning.
            until: the last step.
        """
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
        # Filters that appeared later must go. Their entries are never written to, so a state may be loaded again.
        memories = {name: self._memories[name] for name in state["filters"]}
        for name, kept in state["filters"].items():
            for entry, value in kept.items():
                setattr(memories[name], entry, value)
        self._memories = memories


def _with_errors(replayed: ReplayedStep, updates: dict[str, UpdateSplit], correction: float) -> StepDecomposition:
    errors = update_errors(replayed.theta_before, replayed.theta, updates)
    error, rounding = distance(errors)
    return StepDecomposition(
        step=replayed.step,
        updates=updates,
        theta_before=replayed.theta_before,
        theta=replayed.theta,
        error=error,
        rounding=rounding,
        drift=replayed.drift,
        correction=correction,
        errors=tuple(errors),
    )
