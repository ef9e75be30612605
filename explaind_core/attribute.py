"""attribute(): the one question, and the labelled result that closes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from torch import Tensor

from explaind_core import trees
from explaind_core.contract import StepContribution, contribute, term_names
from explaind_core.errors import QuestionError
from explaind_core.plan import AXES, Question, readable_size
from explaind_core.progress import track
from explaind_core.run import Run

__all__ = ["TERMS", "attribute", "closure_error"]

#: The terms a result may hold; prehistory only where recording began with a used optimizer.
TERMS = ("kernel", "regularization", "prehistory")
#: Steps computed before they are appended to a result on disk.
_BLOCK = 50


def attribute(
    run: Run,
    inputs: Any,
    *,
    keep: Sequence[str] = AXES,
    output: Any = None,
    steps: Any = None,
    train: Any = None,
    layers: Any = None,
    nodes: int | str = "adaptive",
    tolerance: float = 1e-3,
    max_nodes: int = 32,
    memory: str | int = "4GiB",
    engine: str = "local",
    progress: bool = True,
    out: str | os.PathLike[str] | None = None,
) -> xr.Dataset:
    """Split predictions into what each step, layer and term added to them (paper, Theorem 3.1, Definition 4.2).

    ``f(theta_N; x) = f(theta_0; x) + sum_s (kernel_s(x) + regularization_s(x) + residual_s(x))``, every
    contribution being what is ADDED to the output (the negative of the paper's psi).

    Args:
        run: a run opened with its model.
        inputs: the n test samples: a tensor, or a tuple (positional arguments) or dict (keywords) of tensors.
        keep: the axes to keep, any subset of step, layer, test, output; all others, and the training samples,
            are summed as early as possible.
        output: what is explained: None or ``Outputs()``, ``Loss(targets)``, ``Activation(name)``, or any
            callable ``(call, inputs) -> [n, ...]``.
        steps: a slice over step numbers (``slice(1850, 1900)`` is 1850..1899), a range or a list; all by default.
        train: must be None in this version.
        layers: None for a layer per module that owns parameters, a list of module prefixes, or a mapping
            ``{name: prefix, pattern, list of them, or {pattern: slices}}``.
        nodes: quadrature nodes per step, or ``"adaptive"``.
        tolerance: adaptive only: the largest residual of a step, as a fraction of the largest change of an output
            over all steps asked for.
        max_nodes: adaptive only: the most nodes a step may get; one that misses the tolerance is marked.
        memory: the most that the result may take.
        engine: ``"local"``.
        progress: show a bar with the remaining time.
        out: a zarr folder to write to while computing, in blocks of 50 steps (``step`` must be kept). The result
            is then read from there lazily, may exceed ``memory``, and an interrupted call resumes.

    Returns:
        A Dataset over the kept axes: ``kernel``, ``regularization`` (and ``prehistory``, where recording began
        with a used optimizer); ``residual`` and ``omitted`` over (step, test, output) as far as kept;
        ``initial`` and ``final`` over (test, output) as far as kept; ``nodes``, ``converged`` and ``update_error``
        over step. ``omitted`` is what restrictions left out: other layers, and steps between those asked for.

    Raises:
        QuestionError, LayerError: an argument makes no sense; the result does not fit into ``memory``.
        NonFiniteError: the explained function is not finite somewhere on the way.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=3)
        >>> result = attribute(run, torch.ones(2, 4, dtype=torch.float64), progress=False)
        >>> dict(result.kernel.sizes), result.layer.values.tolist()
        ({'step': 3, 'layer': 2, 'test': 2, 'output': 3}, ['0', '2'])
        >>> closure_error(result) < 1e-12
        True
    """
    if engine != "local":
        raise QuestionError("there is no such engine", where="engine", expected="'local'", got=engine)
    question = Question.ask(
        run,
        inputs,
        keep=keep,
        output=output,
        steps=steps,
        train=train,
        layers=layers,
        nodes=nodes,
        tolerance=tolerance,
        max_nodes=max_nodes,
        memory=memory,
    )
    frame = _Frame(question)
    if out is None:
        needed = question.result_bytes(frame.outputs)
        if needed > question.memory:
            raise QuestionError(
                "the result does not fit into the memory budget",
                where=f"{frame.question.shape(frame.outputs)}",
                expected=f"at most {readable_size(question.memory)}",
                got=readable_size(needed),
                remedy="keep fewer axes, ask for fewer test samples or steps, raise memory=, or write it with out=",
            )
        return frame.collect(frame.compute(question.steps, progress=progress))
    return _to_zarr(frame, Path(out), progress)


class _Frame:
    """The labels of a result, and how step contributions become one."""

    def __init__(self, question: Question) -> None:
        self.question = question
        run, function = question.run, question.function
        self.initial = function.values(run.theta(question.steps[0] - 1))
        self.final = function.values(run.theta(question.steps[-1]))
        self.outputs = self.initial.shape[1]
        self.terms = term_names(run)
        self.dims = question.keep
        self.plain_dims = tuple(axis for axis in question.keep if axis != "layer")
        self.edge_dims = tuple(axis for axis in self.plain_dims if axis != "step")
        self.dtype = np.dtype("float32") if question.value_bytes == 4 else np.dtype("float64")

    # ------------------------------------------------------------------ computing
    def compute(self, steps: Sequence[int], *, progress: bool) -> Iterator[tuple[StepContribution, Tensor]]:
        """Step contributions with what was omitted at and before each."""
        question = self.question
        contributions = contribute(
            question.run,
            question.function,
            steps,
            question.layers,
            question.rest,
            question.quadrature,
            float((self.final - self.initial).abs().max()),
            _BLOCK,
        )
        position = question.steps.index(steps[0])
        last = (
            self.initial
            if position == 0
            else question.function.values(question.run.theta(question.steps[position - 1]))
        )
        for part in track(contributions, len(steps), "attributing", enabled=progress):
            gap = part.before - last
            omitted = gap if part.rest is None else gap + part.rest
            last = part.after
            yield part, omitted

    def collect(self, parts: Iterator[tuple[StepContribution, Tensor]]) -> xr.Dataset:
        """One Dataset of some steps; sums over axes that are not kept are taken step by step, in float64."""
        rows: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in (*self.terms, "residual", "omitted")}
        steps, nodes, evaluations, converged, errors, corrections = [], [], [], [], [], []
        for part, omitted in parts:
            stored = {name: self._reduce(part.terms[name], AXES[1:]) for name in self.terms}
            if "step" in self.dims:
                stored = {name: value.astype(self.dtype) for name, value in stored.items()}
            # The residual is taken against the influences as stored, so that the result closes as it stands.
            exact = {name: self._reduce(part.terms[name].sum(0), AXES[2:]) for name in self.terms}
            residual = self._reduce(part.residual, AXES[2:])
            for name, value in stored.items():
                plain = value.astype(np.float64)
                # In one step's array, layer always comes first.
                residual = residual + (exact[name] - (plain.sum(0) if "layer" in self.dims else plain))
                rows[name].append(value)
            rows["residual"].append(residual)
            rows["omitted"].append(self._reduce(omitted, AXES[2:]))
            steps.append(part.step)
            nodes.append(part.nodes)
            evaluations.append(part.evaluations)
            converged.append(part.converged)
            errors.append(part.update_error)
            corrections.append(part.correction)
        variables: dict[str, Any] = {}
        for name, values in rows.items():
            dims = self.dims if name in self.terms else self.plain_dims
            variables[name] = (dims, np.stack(values) if "step" in self.dims else np.sum(values, axis=0))
        variables["initial"] = (self.edge_dims, self._reduce(self.initial, AXES[2:]))
        variables["final"] = (self.edge_dims, self._reduce(self.final, AXES[2:]))
        if "step" in self.dims:
            variables["nodes"] = ("step", np.array(nodes))
            variables["evaluations"] = ("step", np.array(evaluations))
            variables["converged"] = ("step", np.array(converged))
            variables["update_error"] = ("step", np.array(errors))
            if self.question.run.closed_by_secant:
                variables["correction"] = ("step", np.array(corrections))
        attributes = self.attributes()
        if "step" not in self.dims:
            attributes |= {
                "nodes_used": int(np.sum(nodes)),
                "nodes_evaluated": int(np.sum(evaluations)),
                "steps_not_converged": int(np.sum(~np.array(converged))),
                "update_error": float(np.max(errors)),
            }
            attributes |= {"correction": float(np.max(corrections))} if self.question.run.closed_by_secant else {}
        return xr.Dataset(variables, coords=self.coordinates(steps), attrs=attributes)

    def _reduce(self, values: Tensor, axes: Sequence[str]) -> np.ndarray[Any, Any]:
        """Sum over the axes that are not kept. The one place where a torch tensor becomes numpy."""
        gone = tuple(index for index, axis in enumerate(axes) if axis not in self.dims)
        result: np.ndarray[Any, Any] = (values.sum(gone) if gone else values).numpy()
        return result

    # ------------------------------------------------------------------ labels
    def coordinates(self, steps: Sequence[int]) -> dict[str, Any]:
        """The labels of the kept axes."""
        labels: dict[str, Any] = {
            "step": list(steps),
            "layer": [layer.name for layer in self.question.layers],
            "test": np.arange(self.question.function.samples),
            "output": np.arange(self.outputs),
        }
        return {axis: labels[axis] for axis in self.dims}

    def attributes(self) -> dict[str, Any]:
        """What a reader of the result must know: the question and the conventions."""
        question = self.question
        quadrature = question.quadrature
        return {
            "sign": "a contribution is what is added to the output (the negative of the paper's psi)",
            "closes": "initial + sum(terms) + sum(residual) + sum(omitted) == final",
            "optimizer": question.run.manifest["optimizer"],
            "rule": str(question.run.rule) if question.run.inferred else question.run.rule_name,
            "inferred": int(question.run.inferred),
            "dtype": str(question.function.dtype),
            "output": type(question.function.output).__name__,
            "first_step": question.steps[0],
            "last_step": question.steps[-1],
            "steps_asked": len(question.steps),
            "layers_restricted": int(question.rest is not None),
            "nodes_asked": str(quadrature.nodes),
            "tolerance": quadrature.tolerance if quadrature.adaptive else float("nan"),
        }

    def fingerprint(self) -> str:
        """A hash of everything that the result depends on, by which an interrupted question knows itself again."""
        question, function = self.question, self.question.function
        digest = blake2b(
            json.dumps([self.attributes(), question.steps, self.dims], default=str).encode(), digest_size=16
        )
        digest.update(repr([(layer.name, sorted(layer.masks)) for layer in question.layers]).encode())
        digest.update(str(question.quadrature).encode())
        masks = [m for layer in question.layers for m in layer.masks.values() if m is not None]
        # initial and final stand for the explained function and for the run's own parameters.
        for tensor in [*masks, *trees.leaves(function.inputs), self.initial, self.final]:
            digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
        return digest.hexdigest()


def _to_zarr(frame: _Frame, path: Path, progress: bool) -> xr.Dataset:
    """Compute block by block of steps, appending each; continue where an interrupted call stopped."""
    question = frame.question
    if "step" not in question.keep:
        raise QuestionError(
            "out= needs the step axis", where="keep", expected="'step' among the kept axes", got=question.keep,
            remedy="the result without it is small: leave out= away and call .to_zarr() on it",
        )  # fmt: skip
    identity = frame.fingerprint()
    done = _steps_done(path, identity)
    remaining = question.steps[done:]
    if remaining:
        if done:
            _cut(path, done)
        parts = frame.compute(remaining, progress=progress)
        for start in range(0, len(remaining), _BLOCK):
            size = min(_BLOCK, len(remaining) - start)
            block = frame.collect(next(parts) for _ in range(size))
            block.attrs |= {"question": identity, "steps_done": done + start}
            if done or start:
                stepwise = block.drop_vars([n for n, v in block.variables.items() if "step" not in v.dims])
                stepwise.to_zarr(path, append_dim="step", zarr_format=2, consolidated=False)
            else:
                chunks = {n: _chunk_sizes(v) for n, v in block.data_vars.items()}
                block.to_zarr(
                    path,
                    mode="w",
                    zarr_format=2,
                    consolidated=False,
                    encoding={n: {"chunks": c} for n, c in chunks.items() if c},
                )
            # Only now does the block count: one that a kill cuts short is computed again.
            zarr.open_group(path, mode="r+").attrs["steps_done"] = done + start + size
        for _ in parts:  # lets the progress bar close
            pass
    stored: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
    return stored


def _chunk_sizes(variable: xr.DataArray) -> tuple[int, ...]:
    """A chunk is a block of steps of everything else, so that appending never rewrites one."""
    return tuple(_BLOCK if dim == "step" else size for dim, size in variable.sizes.items())


def _steps_done(path: Path, identity: str) -> int:
    """How many steps of this very question a result at ``path`` holds; whole blocks only."""
    if not path.exists() or not any(path.iterdir()):
        return 0
    try:
        attributes: dict[str, Any] = zarr.open_group(path, mode="r").attrs.asdict()
    except (OSError, KeyError, ValueError) as error:
        raise QuestionError(
            f"there is something at out= that is no result: {error}",
            where=path,
            remedy="choose another path, or delete it",
        ) from error
    known = attributes.get("question")
    if known != identity:
        raise QuestionError(
            "out= holds the result of another question",
            where=path,
            expected=f"an unfinished or finished result of this question ({identity})",
            got=known or "no result of explaind",
            remedy="choose another path, or delete it",
        )
    return int(attributes["steps_done"])


def _cut(path: Path, done: int) -> None:
    """Drop what an append that was cut short left behind the first ``done`` steps."""
    for _, array in zarr.open_group(path, mode="r+").arrays():
        dims: Any = array.attrs["_ARRAY_DIMENSIONS"]
        if "step" in dims and array.shape[0] > done:
            array.resize((done, *array.shape[1:]))


def closure_error(result: xr.Dataset) -> float:
    """``max |initial + sum(terms) + sum(residual) + sum(omitted) - final|`` over (test, output) as far as kept.

    Rounding only, for whatever axes were kept: what quadrature and training's own rounding cost is in
    ``residual``, not here.

    Example:
        >>> import torch
        >>> from explaind_core.testing import record_example
        >>> inputs = torch.ones(1, 4, dtype=torch.float64)
        >>> result = attribute(record_example(steps=2), inputs, keep=("layer",), progress=False)
        >>> closure_error(result) < 1e-12
        True
    """
    return float(np.abs(summed(result, (*TERMS, "residual", "omitted")) - result["final"]).max())


def summed(result: xr.Dataset, names: Sequence[str]) -> xr.DataArray:
    """``initial`` plus the sums of those of ``names`` that the result holds, in float64, over (test, output)."""
    total: xr.DataArray = result["initial"].astype(np.float64)
    for name in names:
        if name in result:
            gone = [d for d in result[name].dims if d not in total.dims]
            total = total + result[name].sum(gone, dtype=np.float64)
    return total
