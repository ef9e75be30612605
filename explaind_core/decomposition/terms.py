"""The terms of an update by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from explaind_core.decomposition.decompose import StepDecomposition
from explaind_core.run import Run

__all__ = ["Updates", "term_names", "updates_of"]

Updates = Mapping[str, Tensor]


def term_names(run: Run) -> tuple[str, ...]:
    """The terms of a run's updates.

    There is a prehistory only where recording began with a used optimizer, a penalty only where the loss had one.
    """
    used = any(run.optimizer_state(0).values())
    others = (("prehistory",) if used else ()) + (("penalty",) if run.penalty is not None else ())
    return ("kernel", "regularization", *others)


def updates_of(split: StepDecomposition, names: Sequence[str]) -> dict[str, Updates]:
    """Term -> parameter name -> its share of the step's update; where it is zero, a name is left out.

    Args:
        split: the step.
        names: the terms that are asked for (see :func:`term_names`).
    """
    return {
        name: {n: getattr(u, name) for n, u in split.updates.items() if getattr(u, name) is not None} for name in names
    }
