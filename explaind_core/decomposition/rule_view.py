"""What a rule is shown of a step: one parameter's part of it, or all tensors as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.rules import OptimizerState, RecordedStep
from explaind_core.run import ReplayedStep
from explaind_core.tensors import to_dense

__all__ = ["FLAT", "flat_step", "recorded_step", "split_flat"]

#: What the vector over all parameters is called where a parameter's name stands.
FLAT = "(all parameters)"


def recorded_step(replayed: ReplayedStep, name: str, clock: int) -> RecordedStep:
    """What a rule is shown of one parameter's step; ``clock`` is the parameter's own count, this step included.

    Args:
        replayed: the step.
        name: the parameter.
        clock: the parameter's own count of steps, this one included.
    """
    gradient = replayed.gradients[name]
    point = replayed.theta_before if replayed.gradient_point is None else replayed.gradient_point
    return RecordedStep(
        name=name,
        step=replayed.step,
        clock=clock,
        hyper=OptimizerState(name, replayed.hyper[name], "parameter group"),
        theta=point[name].double(),
        gradient=to_dense(gradient).double(),
        displacement=replayed.theta[name].double() - replayed.theta_before[name].double(),
        before=_state(name, replayed.before, "before"),
        after=_state(name, replayed.after, "after"),
        dtype=replayed.theta[name].dtype,
        hyper_after=OptimizerState(name, replayed.hyper_after.get(name, {}), "parameter group after the step"),
        mask=_mask(gradient) if gradient.is_sparse else None,
        point="gradient" if replayed.gradient_point is None else "evaluated",
    )


def _state(name: str, state: Mapping[str, Mapping[str, Any]], when: str) -> OptimizerState:
    return OptimizerState(name, in_float64(state.get(name, {})), f"optimizer state {when} the step")


def in_float64(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with its floating-point tensors, nested ones too, in float64."""
    converted: dict[str, Any] = trees.map_tensors(lambda t: t.double() if t.is_floating_point() else t, state)
    return converted


def _mask(gradient: Tensor) -> Tensor:
    """1 where a sparse gradient stores a value, a stored zero too, and 0 elsewhere."""
    indices = gradient.coalesce().indices()
    ones = torch.ones((indices.shape[1], *gradient.shape[gradient.sparse_dim() :]), dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, ones, gradient.shape, is_coalesced=True, check_invariants=True).to_dense()


def flat_step(replayed: ReplayedStep, names: Sequence[str], clock: int) -> RecordedStep:
    """All parameters ``names`` as one vector, in this order; a missing gradient is a zero.

    Hyper-parameters are those of the first one; optimizer states are merged, the first parameter's entries winning
    (optimizers that treat all tensors as one keep their state with the first).

    Args:
        replayed: the step.
        names: the parameters, in the order in which they are joined.
        clock: their common count of steps, this one included.
    """

    def joined(tensors: Mapping[str, Tensor]) -> Tensor:
        like = replayed.theta
        parts = [to_dense(tensors[n]) if n in tensors else torch.zeros_like(like[n]) for n in names]
        return torch.cat([part.reshape(-1).double() for part in parts])

    def merged(state: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        entries: dict[str, Any] = {}
        for name in names:
            entries = {**state.get(name, {}), **entries}
        return {FLAT: entries}

    first = names[0]
    return RecordedStep(
        name=FLAT,
        step=replayed.step,
        clock=clock,
        hyper=OptimizerState(FLAT, replayed.hyper[first], "parameter group"),
        theta=joined(replayed.theta_before),
        gradient=joined(replayed.gradients),
        displacement=joined(replayed.theta) - joined(replayed.theta_before),
        before=_state(FLAT, merged(replayed.before), "before"),
        after=_state(FLAT, merged(replayed.after), "after"),
        dtype=replayed.theta[first].dtype,
        hyper_after=OptimizerState(FLAT, replayed.hyper_after.get(first, {}), "parameter group after the step"),
    )


def split_flat(vector: Tensor, like: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The inverse of joining: a vector over all parameters, by parameter.

    Args:
        vector: over all parameters, 1-d.
        like: tensors that have the parameters' shapes.
        names: the parameters, in the order in which they were joined.
    """
    pieces = torch.split(vector, [like[name].numel() for name in names])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(names, pieces, strict=True)}
