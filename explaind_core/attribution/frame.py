"""The labelled result: windows' contributions as one Dataset that closes as it stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property, reduce
from hashlib import blake2b
from operator import or_
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind_core import trees
from explaind_core.questions import AXES, GRADIENT_AXES, Contribution, Ends, Findings, Places, Question, reduced
from explaind_core.results import COUNTS, totals

__all__ = ["Frame"]


class Frame:
    """The labels of a result, and how contributions become one.

    Args:
        question: the question.
        strategy: the name of how it is answered.
    """

    def __init__(self, question: Question, strategy: str = "") -> None:
        self.question, self.strategy = question, strategy
        function = question.function
        last = question.steps[-1]
        self.outputs = function.at(last).count_outputs(question.run.theta(last))
        self.terms = question.terms
        #: What has no axis but step, test and output.
        self.edges = ("residual", "omitted", *(("statistics",) if function.moves else ()))
        self.dims = question.keep
        self.plain_dims = tuple(axis for axis in question.keep if axis not in GRADIENT_AXES)
        self.edge_dims = tuple(axis for axis in question.keep if axis in AXES[-2:])
        self.residual_dims = tuple(axis for axis in question.keep if axis in ("step", *AXES[-2:]))
        self.dtype = np.dtype("float32") if question.value_bytes == 4 else np.dtype("float64")

    @cached_property
    def ends(self) -> Ends:
        """The explained function at both ends: evaluated when it is clear that the answer will fit."""
        return Ends.of(self.question)

    def examined(self) -> int:
        """J, once it is known what kind of function f is, which decides what an answer costs."""
        return self.ends.outputs

    # ------------------------------------------------------------------ a Dataset
    def collect(
        self, parts: Iterable[Contribution], block: slice | None = None, *, unfinished: bool = False
    ) -> xr.Dataset:
        """One Dataset of some windows, of all test samples or a block of them.

        Args:
            parts: the windows' contributions.
            block: of the test samples, all by default.
            unfinished: whether other blocks follow, which may hold terms that this one has nothing of.
        """
        keeps_step = "step" in self.dims
        rows: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in (*self.terms, *self.edges)}
        windows: list[int] = []
        counts: dict[str, list[Any]] = {name: [] for name in COUNTS}
        findings = Findings()
        for part in parts:
            residual = part.residual.numpy().copy()
            for name in self.terms:
                value = part.terms[name].numpy()
                stored = value.astype(self.dtype) if keeps_step else value
                # The residual is taken against the influences as stored, so that the result closes as it stands.
                dims = self._inner(self.dims if name == "kernel" else self.plain_dims)
                gone = tuple(i for i, dim in enumerate(dims) if dim not in self.edge_dims)
                residual += value.sum(gone) - stored.sum(gone, dtype=np.float64)
                rows[name].append(stored)
            rows["residual"].append(residual)
            rows["omitted"].append(part.omitted.numpy())
            if "statistics" in rows:
                rows["statistics"].append(part.statistics.numpy())
            windows.append(part.window)
            findings |= part.findings
            for name, values in counts.items():
                values.append(getattr(part, name))
        variables: dict[str, Any] = {}
        for name, values in rows.items():
            dims = self.dims if name == "kernel" else self.plain_dims if name in self.terms else self.residual_dims
            variables[name] = (dims, np.stack(values) if keeps_step else np.sum(values, axis=0))
        variables["initial"] = (self.edge_dims, self._edge(self.ends.initial, block))
        variables["final"] = (self.edge_dims, self._edge(self.ends.final, block))
        if not self.question.run.closed_by_secant:
            del counts["correction"]
        if not unfinished and findings.unattributed_largest is None:
            variables.pop("unattributed", None)
        attributes = self.attributes() | findings.attributes()
        attributes["derivatives"] = self.question.function.differentiator.way
        if keeps_step:
            kept = {name: COUNTS[name].array(values) for name, values in counts.items() if COUNTS[name].along_step}
            variables |= {name: ("step", values) for name, values in kept.items()}
        else:
            attributes |= totals(counts)
        return xr.Dataset(variables, coords=self.coordinates(windows, block), attrs=attributes)

    @staticmethod
    def _inner(dims: Sequence[str]) -> tuple[str, ...]:
        return tuple(dim for dim in dims if dim != "step")

    def _edge(self, values: Tensor, block: slice | None) -> np.ndarray[Any, Any]:
        kept = reduced(values if block is None else values[block], self.question)
        found: np.ndarray[Any, Any] = kept.reshape(
            [n for axis, n in zip(AXES[-2:], kept.shape, strict=True) if axis in self.dims]
        ).numpy()
        return found

    def joined(self, parts: Iterable[Contribution]) -> list[Contribution]:
        """All windows' contributions to one block of test samples after the other, as contributions to all of them."""
        every, windows = list(parts), len(self.question.windows)
        blocks = [every[start : start + windows] for start in range(0, len(every), windows)]
        if len(blocks) == 1:
            return blocks[0]
        inner = {n: self._inner(self.dims if n == "kernel" else self.plain_dims).index("test") for n in self.terms}
        edge = self._inner(self.residual_dims).index("test")
        return [
            Contribution(
                window=several[0].window,
                terms={n: torch.cat([p.terms[n] for p in several], axis) for n, axis in inner.items()},
                residual=torch.cat([p.residual for p in several], edge),
                omitted=torch.cat([p.omitted for p in several], edge),
                statistics=torch.cat([p.statistics for p in several], edge),
                **{name: count.over_all_blocks([getattr(p, name) for p in several]) for name, count in COUNTS.items()},
                findings=reduce(or_, (p.findings for p in several)),
            )
            for several in zip(*blocks, strict=True)
        ]

    # ------------------------------------------------------------------ labels
    def coordinates(self, windows: Sequence[int], block: slice | None = None) -> dict[str, Any]:
        """The labels of the kept axes."""
        question = self.question
        tests = question.function.rows if block is None else question.function.rows[block]
        labels: dict[str, Any] = {
            "step": [question.windows[w].name for w in windows],
            "gradient_step": list(question.gradient_steps),
            "layer": [layer.name for layer in question.layers],
            "test": tests.numpy(),
            "output": np.arange(self.outputs),
        }
        if question.train is not None:
            labels["train"] = list(question.train.labels)
        found: dict[str, Any] = {axis: labels[axis] for axis in self.dims if axis != "parameter"}
        if "parameter" in self.dims:
            positions, tensors = Places(question).labels()
            found["parameter"] = positions.numpy()
            found["tensor"] = ("parameter", tensors.numpy())
        return found

    def attributes(self) -> dict[str, Any]:
        """What a reader of the result must know: the question and the conventions."""
        question = self.question
        quadrature = question.quadrature
        found = {
            "sign": "a contribution is what is added to the output (the negative of the paper's psi)",
            "closes": "initial + sum(terms) + sum(residual) + sum(omitted) == final",
            "optimizer": question.run.manifest["optimizer"],
            "rule": str(question.run.rule) if question.run.inferred else question.run.rule_name,
            "inferred": int(question.run.inferred),
            "dtype": str(question.function.dtype),
            "output": type(question.function.output).__name__,
            "buffers": "recorded" if question.function.moves else "final",
            "strategy": self.strategy,
            "first_step": question.steps[0],
            "last_step": question.steps[-1],
            "steps_asked": len(question.steps),
            "layers_restricted": int(question.rest is not None),
            "gradients_restricted": int(question.restricts_gradients),
            "nodes_asked": str(quadrature.nodes),
            "tolerance": quadrature.tolerance if quadrature.adaptive else float("nan"),
        }
        if question.function.together:
            found["test_samples_together"] = "test samples are coupled: all that were given pass the model together"
        if question.function.random_state is not None:
            found["random_state"] = question.function.random_state
        if question.chords > 1:
            found["chords"] = question.chords
            found["approximation"] = f"{question.chords} steps share one straight line; exact for their sum only"
        if question.shares != "outputs":
            found["shares"] = question.shares
        if question.notes:
            found["sampled"] = "; ".join(question.notes)
        if "parameter" in self.dims:
            found["tensors"] = list(question.run.parameters)
        return found

    def fingerprint(self) -> str:
        """A hash of everything that the result depends on, by which an interrupted question knows itself again."""
        question, function = self.question, self.question.function
        digest = blake2b(
            json.dumps([self.attributes(), question.steps, self.dims], default=str).encode(), digest_size=16
        )
        digest.update(repr([(layer.name, sorted(layer.masks)) for layer in question.layers]).encode())
        digest.update(repr((question.windows, question.segments, question.gradient_steps, question.train)).encode())
        digest.update(str(question.quadrature).encode())
        masks = [m for layer in question.layers for m in layer.masks.values() if m is not None]
        # initial and final stand for the explained function and for the run's own parameters.
        for tensor in [*masks, function.rows, *trees.leaves(function.inputs), self.ends.initial, self.ends.final]:
            digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
        return digest.hexdigest()
