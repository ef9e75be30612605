"""The accumulated kernel importance of every single parameter (Definition 4.2), and how exact it is."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import explaind_core as explaind

__all__ = ["parameter_importance"]


def parameter_importance(
    run: explaind.Run, images: Tensor, *, nodes: int, at_once: int, memory: str = "4GiB", progress: bool = True
) -> xr.Dataset:
    r"""``Psi-bar(theta) = sum_{x, j} | sum_{s, k} kernel[s, k](theta, x)_j |`` of every entry of every parameter.

    Steps and training samples are summed first, then the absolute value is taken, then it is summed over scored
    samples and outputs, in float64, some samples at a time: what is held besides does not grow with their number.

    Args:
        run: a run opened with its model. images: the scored samples. nodes: of the quadrature, per step.
        at_once: samples decomposed in one pass over the run. memory: for that.

    Returns:
        ``importance`` over ``parameter``, the entries of all tensors one behind the other, in the order of
        ``run.parameters``; ``initial``, ``final`` and ``residual`` over (test, output), those of
        :func:`explaind_core.attribute`; attributes ``nodes_per_step``, ``update_error``, and ``closure``, the largest
        closure error.

    Example:
        >>> from explaind_core.testing import record_example
        >>> run, images = record_example(steps=3), torch.ones(3, 4, dtype=torch.float64)
        >>> scores = parameter_importance(run, images, nodes=2, at_once=2, progress=False)
        >>> dict(scores.importance.sizes), scores.attrs["closure"] < 1e-12
        ({'parameter': 43}, True)
    """
    total: xr.DataArray | None = None
    edges, closure, found = [], 0.0, {}
    for piece in torch.split(images, at_once):
        result = explaind.attribute(
            run, piece, keep=("parameter", "test", "output"), nodes=nodes, memory=memory, progress=progress
        )
        part = explaind.importance(result[["kernel"]]).kernel
        total = part if total is None else total + part
        closure = max(closure, explaind.closure_error(result))
        edges.append(result[["initial", "final", "residual"]].drop_vars("test"))
        found = {
            "nodes_per_step": result.attrs["nodes_used"] / len(run.steps),
            "update_error": float(result.attrs["update_error"]),
        }
    assert total is not None
    whole = [values.reshape(-1) for values in explaind.by_parameter(total, run.parameters).values()]
    joined = xr.concat(edges, "test").drop_vars("output", errors="ignore")
    importance = xr.DataArray(np.concatenate(whole), dims="parameter")
    return joined.assign(importance=importance).assign_attrs({"closure": closure, **found})
