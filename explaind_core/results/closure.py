"""The terms of a result, and whether they close."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

__all__ = ["TERMS", "closure_error", "summed"]

#: The terms a result may hold; prehistory only where recording began with a used optimizer or a filter starts elsewhere
#: than at zero, penalty where the loss had one, unattributed where samples leave more than rounding of a gradient,
#: statistics where buffers moved, change only where there are checkpoints and nothing else.
TERMS = ("kernel", "regularization", "prehistory", "penalty", "unattributed", "statistics", "change")


def closure_error(result: xr.Dataset) -> float:
    """``max |initial + sum(terms) + sum(residual) + sum(omitted) - final|`` over (test, output) as far as kept.

    Rounding only, for whatever axes were kept: what quadrature and training's own rounding cost is in
    ``residual``, not here.

    Args:
        result: of :func:`explaind_core.attribute`, or read by :func:`explaind_core.open_result`.

    Returns:
        The largest absolute difference, in units of the output.

    Example:
        >>> import torch
        >>> import explaind_core as explaind
        >>> from explaind_core.testing import record_example
        >>> inputs = torch.ones(1, 4, dtype=torch.float64)
        >>> result = explaind.attribute(record_example(steps=2), inputs, keep=("layer",), progress=False)
        >>> closure_error(result) < 1e-12
        True
    """
    return float(np.abs(summed(result, (*TERMS, "residual", "omitted")) - result["final"]).max())


def summed(result: xr.Dataset, names: Sequence[str]) -> xr.DataArray:
    """``initial`` plus what was added to it.

    Args:
        result: as of :func:`closure_error`.
        names: of variables; those that the result does not hold are passed over.

    Returns:
        The sum over (test, output) as far as kept, in float64.
    """
    total: xr.DataArray = result["initial"].astype(np.float64)
    for name in names:
        if name in result:
            gone = [d for d in result[name].dims if d not in total.dims]
            total = total + result[name].sum(gone, dtype=np.float64)
    return total
