"""The paper's derived scores (Definitions 4.2 and 4.3), and the residual spread over its components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from explaind_core.errors import QuestionError
from explaind_core.results import TERMS

__all__ = ["importance", "relative_regularization", "spread_residual"]


def _terms(result: xr.Dataset) -> list[str]:
    found = [name for name in TERMS if name in result]
    if not found:
        raise QuestionError(
            "this is no attribution result", expected=f"variables among {list(TERMS)}", got=list(result)
        )
    return found


def _axes(
    result: xr.Dataset, names: Sequence[str], accumulate: Sequence[str], over: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Both lists of axes, checked: the terms have them, and none is in both."""
    kept = list(dict.fromkeys(str(dim) for name in names for dim in result[name].dims))
    first, then = ([axes] if isinstance(axes, str) else list(axes) for axes in (accumulate, over))
    for where, axes in (("accumulate", first), ("over", then)):
        missing = [axis for axis in axes if axis not in kept]
        if missing:
            raise QuestionError(
                f"the result does not keep the axis {missing[0]!r}",
                where=where,
                expected=f"axes among {kept}",
                got=axes,
                remedy=f"ask attribute(..., keep=...) to keep {missing}: absolute values must be taken before summing",
            )
    if len({*first, *then}) < len(first) + len(then):
        raise QuestionError("an axis is named twice", where="over, accumulate", got=(then, first))
    return first, then


def _summed(values: xr.DataArray, axes: Sequence[str]) -> xr.DataArray:
    """In float64, whatever the influences are stored in, over those of the axes that a term has.

    A term without an axis, as the regularization has no train axis, is the sum over it already.
    """
    return values.sum([axis for axis in axes if axis in values.dims], dtype=np.float64)


def importance(
    result: xr.Dataset, over: Sequence[str] = ("test", "output"), *, accumulate: Sequence[str] = ()
) -> xr.Dataset:
    """Accumulated importance: ``sum over test and output of | influence accumulated over everything else |``.

    The order is the definition's: accumulate, then absolute value, then sum (paper, Definition 4.2, equation 6). Only
    the kernel has a gradient_step and a train axis: a term without an axis stays as it is where others are summed over
    it, and one value where it is kept.

    Args:
        result: of :func:`explaind_core.attribute` or :func:`explaind_core.attribute_checkpoints`, with the axes of
            ``over`` kept.
        over: the axes to sum absolute values over.
        accumulate: kept axes to be summed first, signs and all: ``("layer",)`` gives the whole model's importance.

    Returns:
        One variable a term, over the remaining axes; the signless unit is that of the output.

    Raises:
        QuestionError: the result does not keep one of the axes.

    Example:
        >>> values = xr.DataArray([[1.0, -1.0]], dims=("layer", "test"))
        >>> result = xr.Dataset({"kernel": values, "regularization": values})
        >>> float(importance(result, over=["test"]).kernel[0])
        2.0
    """
    names = _terms(result)
    first, then = _axes(result, names, accumulate, over)
    scores = {name: _summed(abs(_summed(result[name], first)), then) for name in names}
    return xr.Dataset(scores, attrs={"score": "accumulated importance (Definition 4.2)", "over": list(then)})


def relative_regularization(
    result: xr.Dataset,
    *,
    form: str = "signed",
    over: Sequence[str] = ("test", "output"),
    accumulate: Sequence[str] = (),
) -> xr.DataArray:
    """Relative influence of the regularization.

    ``form="signed"``: the sum of (kernel - regularization) over the axes of ``over``, as Definition 4.3 (equation 7)
    writes it, in this project's sign (the paper's is the negative). ``form="absolute"``: importance of the
    kernel minus importance of the regularization, as its prose has it: negative where regularization dominates.
    Axes of the kernel alone (gradient_step, train) must be summed: regularization is not due to any one sample.

    Raises:
        QuestionError: another form, an axis that the result does not keep, or an axis of the kernel alone that is kept;
            a result without kernel and regularization, such as that of checkpoints.

    Example:
        >>> result = xr.Dataset({"kernel": ("test", [3.0, -1.0]), "regularization": ("test", [1.0, 1.0])})
        >>> float(relative_regularization(result, over=["test"])), float(
        ...     relative_regularization(result, over=["test"], form="absolute"))
        (0.0, 2.0)
    """
    if form not in ("signed", "absolute"):
        raise QuestionError("there is no such form", where="form", expected="'signed' or 'absolute'", got=form)
    names = ["kernel", "regularization"]
    if missing := [name for name in names if name not in _terms(result)]:
        raise QuestionError(
            f"the result does not tell the {missing[0]} apart", expected=f"variables {names}", got=_terms(result)
        )
    first, then = _axes(result, names, accumulate, over)
    gone = [*first, *then]
    alone = [dim for dim in result["kernel"].dims if dim not in (*result["regularization"].dims, *gone)]
    if alone:
        raise QuestionError(
            f"regularization has no share of the axis {alone[0]!r}",
            where="over, accumulate",
            expected=f"{alone} among them",
            got=gone,
            remedy=f"say accumulate={alone}, or ask attribute(...) without",
        )
    if form == "absolute":
        scores = importance(result, over, accumulate=accumulate)
        relative: xr.DataArray = scores.kernel - scores.regularization
    else:
        relative = _summed(result["kernel"], gone) - _summed(result["regularization"], gone)
    return relative.rename("relative_regularization")


def spread_residual(result: xr.Dataset) -> xr.Dataset:
    """The result with its residual spread over the components, in proportion to their absolute contributions.

    In every cell of (step, test, output) as far as kept, ``residual * |c| / sum |c|`` is added to each component c:
    an entry of a term along all other axes that are kept. This lowers the quadrature error of sums, and it is a guess
    about where the error lies: the result says so in ``attrs["residual_spread"]``, keeps what was spread in
    ``spread``, and still closes. Cells without any contribution keep their residual.

    Raises:
        QuestionError: not an attribution result.

    Example:
        >>> cell = xr.Dataset({name: ("test", [x]) for name, x in
        ...                    {"kernel": 3.0, "regularization": -1.0, "residual": 0.4}.items()})
        >>> spread_residual(cell).kernel.values, spread_residual(cell).regularization.values
        (array([3.3]), array([-0.9]))
    """
    names = _terms(result)
    sizes = [abs(result[n].astype(np.float64)) for n in names]
    weight: Any = sum(s.sum([d for d in s.dims if d not in result.residual.dims]) for s in sizes)
    share = (result.residual / weight.where(weight > 0, 1.0)).where(weight > 0, 0.0)
    changed = {n: (result[n] + s * share).transpose(*result[n].dims) for n, s in zip(names, sizes, strict=True)}
    left = result.residual.where(weight == 0, 0.0)
    return result.assign(**changed, residual=left, spread=result.residual - left).assign_attrs(residual_spread=1)
