"""How far a declared update is from the recorded one, and what of that rounding makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind_core.decomposition.split import UpdateSplit

__all__ = ["UpdateError", "distance", "update_errors"]

#: Updates are measured by themselves, or by so many roundings of the parameters where they are less: what is rounded
#: away of a step as small as that is no error of the rule, and is at most 1 / 4096 in this unit.
ROUNDINGS = 4096
#: So many roundings of the parameters may be missed by a correct rule: an optimizer writes to them more than once.
_MISSED = 8


@dataclass(frozen=True)
class UpdateError:
    """The 2-norms, over one parameter, that tell how well its update is explained.

    Attributes:
        name: the parameter.
        missed: of declared update - recorded update.
        moved: of the recorded update.
        size: of the parameter.
        eps: of its dtype.
        updated: False where no optimizer updated it, so that all it moved by is missed.
        unsure: what a discontinuous update (a sign) may differ by where its argument is rounded.
    """

    name: str
    missed: float
    moved: float
    size: float
    eps: float
    updated: bool = True
    unsure: float = 0.0

    @property
    def allowed(self) -> float:
        """What rounding may make of ``missed``: ``sqrt(eps) moved + 8 eps size + unsure``.

        The optimizer computes its update, and the states behind it, in the parameter's precision, where an error of
        eps may grow in differences of almost equal numbers, and adds it to numbers that are off by eps themselves.
        """
        return math.sqrt(self.eps) * self.moved + _MISSED * self.eps * self.size + self.unsure


def update_errors(
    theta_before: Mapping[str, Tensor], theta: Mapping[str, Tensor], updates: Mapping[str, UpdateSplit]
) -> list[UpdateError]:
    """How well the update of every parameter is explained.

    Args:
        theta_before: theta_{s-1}.
        theta: theta_s.
        updates: of those that were updated.
    """
    found = []
    for name, after in theta.items():
        update, eps = updates.get(name), torch.finfo(after.dtype).eps
        displacement = after.double() - theta_before[name].double() if update is None else update.displacement
        moved = float(displacement.norm())
        missed = moved if update is None else float((update.declared - displacement).norm())
        size = float(after.double().norm()) if moved or missed else 0.0
        unsure = 0.0 if update is None else update.unsure
        found.append(UpdateError(name, missed, moved, size, eps, update is not None, unsure))
    return found


def distance(errors: Iterable[UpdateError]) -> tuple[float, float]:
    """The error of a step and what rounding can make of it, both in the unit in which updates are measured.

    The unit is ``max(||update||, 4096 eps ||theta||)`` over all parameters.

    Args:
        errors: of all parameters.

    Returns:
        ``||missed||`` and ``eps ||theta||``, in that unit; 0 where nothing was missed.
    """
    listed = list(errors)
    missed, moved = (math.sqrt(sum(getattr(e, n) ** 2 for e in listed)) for n in ("missed", "moved"))
    rounding = math.sqrt(sum((e.eps * e.size) ** 2 for e in listed if e.updated))
    unit = max(moved, ROUNDINGS * rounding)

    def relative(norm: float) -> float:
        return 0.0 if norm == 0 else norm / unit if unit else math.inf

    return relative(missed), relative(rounding)
