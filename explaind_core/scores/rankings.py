"""The training samples that matter most to a prediction, and the parameters that matter most to all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import numpy as np
import xarray as xr

from explaind_core.attribution import Frame, answer
from explaind_core.errors import QuestionError
from explaind_core.progress import track
from explaind_core.questions import PathArguments, Question, spelled_out
from explaind_core.results import TERMS, closure_error
from explaind_core.run import Run
from explaind_core.training_step import ParameterInfo

__all__ = ["by_parameter", "parameter_importance", "top_samples"]

#: What is told of the nodes and steps of a block of test samples.
_COUNTED = ("nodes_used", "nodes_evaluated", "steps_not_converged", "update_error", "correction", "closure")
_ORDERS: dict[str, Callable[[Any], Any]] = {"absolute": np.abs, "positive": np.asarray, "negative": np.negative}


def top_samples(result: xr.Dataset, k: int = 10, *, by: str = "absolute") -> xr.Dataset:
    """The k entries of the train axis that added most, for everything else that the result keeps.

    Args:
        result: of :func:`explaind_core.attribute`, with ``train`` kept.
        k: how many.
        by: ``"absolute"`` size, or the most ``"positive"`` or ``"negative"`` contributions.

    Returns:
        ``sample`` (the label) and ``influence`` (what it added, in units of the output) over (..., rank); ties go
        to the entry that comes first. Where fewer than k entries are positive (or negative), the others follow.

    Raises:
        QuestionError: the result does not keep ``train``, has fewer than k entries, or there is no such order.

    Example:
        >>> kernel = xr.DataArray([[0.5, -2.0, 1.0]], dims=("test", "train"), coords={"train": [7, 8, 9]})
        >>> top_samples(xr.Dataset({"kernel": kernel}), 2).sample.values
        array([[8, 9]])
    """
    dims = result["kernel"].dims if "kernel" in result else ()
    if "train" not in dims:
        raise QuestionError(
            "the result does not tell training samples apart",
            where="keep",
            expected="'train' among the kept axes",
            got=dims,
        )
    if by not in _ORDERS or not isinstance(k, int | np.integer) or not 1 <= k <= result.sizes["train"]:
        raise QuestionError(
            "there is no such ranking",
            where="by, k",
            expected=f"by one of {list(_ORDERS)}, k within 1..{result.sizes['train']}",
            got=(by, k),
        )
    values = result.kernel.transpose(..., "train")
    order = np.argsort(-_ORDERS[by](values.values), axis=-1, kind="stable")[..., :k]
    dims = (*values.dims[:-1], "rank")
    return xr.Dataset(
        {
            "sample": (dims, values.train.values[order]),
            "influence": (dims, np.take_along_axis(values.values, order, -1)),
        },
        coords={name: along for name, along in values.coords.items() if "train" not in along.dims},
        attrs={"ranked_by": by},
    )


@spelled_out
def parameter_importance(
    run: Run,
    inputs: Any,
    *,
    keep: None = None,
    at_once: int | None = None,
    progress: bool = True,
    **question: Unpack[PathArguments],
) -> xr.Dataset:
    """How much every single parameter mattered: ``sum over x, j | sum over s of its influence on f(x)_j |``.

    Accumulated importance (paper, Definition 4.2) at the finest granularity: the score by which section 4.2 prunes.
    Test samples are worked off in blocks, so that nothing larger than the memory budget is held; each block has its own
    nodes, where these are adaptive.

    Args:
        run: a run opened with its model.
        inputs: the n test samples, as for :func:`explaind_core.attribute`.
        keep: cannot be said: single parameters are what is kept.
        at_once: test samples in a block at most; by default as many as the memory holds the influences of.
        progress: show a bar over the blocks.
        **question: what is asked, see :class:`explaind_core.questions.PathArguments`.

    Returns:
        ``kernel`` and ``regularization`` over ``parameter``, float64; see :func:`by_parameter`. Beside them, over
        (test, output), what tells how exact they are: ``initial``, ``final``, ``residual``, and ``omitted`` where
        something was not asked for; ``attrs["closure"]`` is the largest closure error of a block.

    Raises:
        QuestionError: as ``attribute``, or ``keep`` is given; a single test sample does not fit into ``memory``;
            ``at_once`` is no positive number.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> scores = parameter_importance(record_example(2), torch.ones(2, 4, dtype=torch.float64), progress=False)
        >>> dict(scores.kernel.sizes), bool((scores.kernel >= 0).all()), dict(scores.residual.sizes)
        ({'parameter': 43}, True, {'test': 2, 'output': 3})
    """
    if keep is not None:
        raise QuestionError("the importance of parameters keeps the parameter axis", where="keep", got=keep)
    if at_once is not None and (not isinstance(at_once, int | np.integer) or at_once < 1):
        raise QuestionError("no samples make no block", where="at_once", expected="1 or more, or None", got=at_once)
    kept = ("parameter", "test", "output")
    asked = Question.ask(run, inputs, keep=kept, **question)
    frame = Frame(asked)
    samples = asked.function.samples
    # A block's influences, and their absolute values.
    size = max(1, min(samples, asked.memory * samples // (4 * asked.result_bytes(frame.outputs))))
    size = size if at_once is None else min(size, int(at_once))
    rows = asked.function.rows.tolist()
    blocks = [rows[a : a + size] for a in range(0, samples, size)]
    total: xr.Dataset | None = None
    edges: list[xr.Dataset] = []
    parts: list[dict[str, Any]] = []
    for block in track(blocks, len(blocks), "importance of parameters", enabled=progress):
        question["test"] = block
        result = answer(Question.ask(run, inputs, keep=kept, **question), progress=False)
        scores = abs(result[[name for name in TERMS if name in result]]).sum(("test", "output"))
        total = scores if total is None else total + scores
        edges.append(result[[name for name in ("initial", "final", *frame.edges) if name in result]])
        parts.append(result.attrs | {"closure": closure_error(result)})
    assert total is not None
    # What is told of the whole question, and of the block that took most.
    attributes = parts[-1] | frame.attributes()
    attributes |= {name: max(part[name] for part in parts) for name in _COUNTED if name in attributes}
    attributes |= {"score": "accumulated importance (Definition 4.2) of single parameters"}
    attributes |= {"strategy": parts[-1]["strategy"], "blocks": len(blocks)}
    del attributes["closes"]
    joined = xr.concat(edges, "test", coords="minimal", compat="override", join="exact")
    found: xr.Dataset = total.assign(joined.data_vars)
    found.attrs = attributes
    return found


def by_parameter(values: xr.DataArray, parameters: Mapping[str, ParameterInfo]) -> dict[str, np.ndarray[Any, Any]]:
    """Values along the parameter axis, put back into tensors of the parameters' shapes.

    Args:
        values: with a ``parameter`` axis.
        parameters: ``run.parameters``.

    Returns:
        Parameter name -> ``[*other axes, *shape]``, NaN where a restriction left entries out; a tensor of which nothing
        was asked for has no entry.

    Raises:
        QuestionError: there is no parameter axis, or it is one of other parameters.

    Example:
        >>> import torch
        >>> info = {"w": ParameterInfo(torch.Size([2, 2]), torch.float32, True)}
        >>> by_parameter(xr.DataArray([1.0, 2.0], dims="parameter", coords={"parameter": [0, 3]}), info)["w"]
        array([[ 1., nan],
               [nan,  2.]])
    """
    if "parameter" not in values.dims:
        raise QuestionError("there is no parameter axis", expected="'parameter' among the axes", got=values.dims)
    last = values.transpose(..., "parameter")
    positions, flat = last.parameter.values, last.values
    found, start = {}, 0
    for name, info in parameters.items():
        size = info.shape.numel()
        inside = (positions >= start) & (positions < start + size)
        if inside.any():
            tensor = np.full((*flat.shape[:-1], size), np.nan)
            tensor[..., positions[inside] - start] = flat[..., inside]
            found[name] = tensor.reshape(*flat.shape[:-1], *info.shape)
        start += size
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < start:
        raise QuestionError(
            "the parameter axis is one of other parameters",
            expected=f"positions within 0..{start - 1}",
            got=f"{positions.min()}..{positions.max()}",
        )
    return found
