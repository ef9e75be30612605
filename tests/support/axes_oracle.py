"""The whole influence tensor, dense, slow and obviously right, with all its seven axes.

Nothing of the library's engine is used. A rule is asked for its declaration, and everything that follows from it is
written down as matrices: every step learning rate ``alpha_{s,i}``, every operator, every sample's share of every
gradient by a backward pass of its own, every row of the Jacobian by another. Questions are answered by masks and sums.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import explaind_core as explaind
from explaind_core.run.run import Run
from explaind_core.tensors import to_dense
from support.attribution_oracles import OutputFunction, forward, modules
from support.updates_oracle import Updates, _double, _model, _move, _updates

AXES = ("step", "gradient_step", "layer", "parameter", "train", "test", "output")
#: All 128 of them.
SUBSETS = [keep for size in range(len(AXES) + 1) for keep in itertools.combinations(AXES, size)]
#: What a variable of a result extends over, as far as it is kept; all others are terms like the regularization.
PLAIN, EDGES = ("step", "test", "output"), ("test", "output")
DIMS = {"kernel": AXES, "residual": PLAIN, "omitted": PLAIN, "initial": EDGES, "final": EDGES}
TERM = ("step", "layer", "parameter", "test", "output")


def dims_of(name: str, keep: Sequence[str]) -> tuple[str, ...]:
    """The dimensions of a result's variable."""
    return tuple(axis for axis in DIMS.get(name, TERM) if axis in keep)


# ---------------------------------------------------------------------- the influence tensor
@dataclass(frozen=True)
class Influences:
    """Every influence of a run on n test samples with J outputs.

    Attributes:
        updates: what the updates are made of. phi: ``[N, D, n, J]``. values: f(theta_0) .. f(theta_N), [N + 1, n, J].
    """

    updates: Updates
    phi: Tensor
    values: Tensor

    @cached_property
    def kernel(self) -> Tensor:
        """``[N, N, D, K, n, J]``: step, gradient step, coordinate, sample, test sample, output."""
        return -torch.einsum("sdnj,sidk->sidknj", self.phi, self.updates.share)

    @cached_property
    def others(self) -> dict[str, Tensor]:
        """The terms without gradient step and sample: ``[N, D, n, J]``."""
        found = {"regularization": self.updates.decay, "prehistory": self.updates.remembered}
        return {n: -self.phi * r[:, :, None, None] for n, r in found.items() if r is not None}

    @property
    def where(self) -> Mapping[str, slice]:
        """Parameter -> its coordinates."""
        return self.updates.where

    def mask(self, *names: str, entries: Any = ...) -> Tensor:
        """[D]: 1 on those entries of the named parameters, 0 elsewhere."""
        mask = torch.zeros(self.phi.shape[1], dtype=torch.float64)
        for name in names:
            mask[self.where[name]].view(self.updates.shapes[name])[entries] = 1
        return mask

    def scope(
        self,
        *,
        layers: Mapping[str, Tensor] | None = None,
        steps: Any = None,
        gradient_steps: Any = None,
        train: Any = None,
        test: Any = None,
    ) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """Labels of all axes, and which positions each of them sums (layer: its mask)."""
        N, (n, J) = len(self.phi), self.phi.shape[2:]
        windows = {
            name: _numbers(value, N)
            for name, value in (steps if isinstance(steps, Mapping) else dict.fromkeys([None], steps)).items()
        }
        if None in windows:
            windows = {s: [s] for s in windows[None]}
        last = max(s for chosen in windows.values() for s in chosen)
        fed = [i for i in _numbers(gradient_steps, N) if i <= last]
        if train is None:
            train = sorted(set().union(*(self.updates.batches[i - 1] for i in fed)))
        if isinstance(train, slice):
            train = [k for k in self.updates.ids if k in range(10**6)[train]]
        groups = train if isinstance(train, Mapping) else {int(k): [int(k)] for k in train}
        layers = modules(self) if layers is None else layers  # type: ignore[arg-type]
        covered = (sum(layers.values()) > 0).nonzero()[:, 0].tolist()
        sampled = list(range(n)[test]) if isinstance(test, slice) else list(range(n)) if test is None else list(test)
        labels = {
            "step": list(windows), "gradient_step": fed, "layer": list(layers), "parameter": covered,
            "train": list(groups), "test": sampled, "output": list(range(J)),
        }  # fmt: skip
        positions = {
            "step": [[s - 1 for s in chosen] for chosen in windows.values()],
            "gradient_step": [[i - 1] for i in fed],
            "layer": layers,
            "train": [[self.updates.ids.index(int(k)) for k in g if int(k) in self.updates.ids]
                      for g in groups.values()],
            "test": [[row] for row in sampled],
        }  # fmt: skip
        return labels, positions

    def expected(self, keep: Sequence[str], **question: Any) -> dict[str, np.ndarray[Any, Any]]:
        """What ``attribute`` must return: every variable over the kept axes in canonical order.

        Args:
            keep: the kept axes. question: ``layers`` (name -> [D] mask), ``steps`` (numbers, or name -> numbers),
                ``gradient_steps``, ``train`` (ids, or name -> ids), ``test``; all by default.
        """
        labels, chosen = self.scope(**question)
        masks, covered = torch.stack(list(chosen["layer"].values())), labels["parameter"]

        def split(values: Tensor, axis: int) -> Tensor:
            """Coordinates become layer x parameter, with zeros outside of the layer."""
            apart = torch.stack([values * _along(mask, axis, values.ndim) for mask in masks], axis)
            return apart.index_select(axis + 1, torch.tensor(covered))

        everything = self.kernel.sum((1, 2, 3)) + sum(term.sum(1) for term in self.others.values())
        kernel = _pick(_pick(self.kernel, 3, chosen["train"]), 1, chosen["gradient_step"])
        terms = {"kernel": split(kernel, 2)} | {name: split(term, 1) for name, term in self.others.items()}
        told = terms["kernel"].sum((1, 2, 3, 4)) + sum(terms[name].sum((1, 2)) for name in self.others)
        # What was not asked for, in the steps asked for ...
        omitted = everything - told
        # ... and before each of them, since the one before.
        asked = [s for window in chosen["step"] for s in window]
        for before, s in itertools.pairwise(asked):
            omitted[s] += self.values[s] - self.values[before + 1]
        found = terms | {
            "residual": self.values[1:] - self.values[:-1] - everything,
            "omitted": omitted,
        }
        found = {name: _pick(value, 0, chosen["step"]) for name, value in found.items()}
        found |= {"initial": self.values[asked[0]], "final": self.values[asked[-1] + 1]}
        return {name: _kept(_pick(value, value.ndim - 2, chosen["test"]), name, keep) for name, value in found.items()}

    def labels(self, keep: Sequence[str], **question: Any) -> dict[str, list[Any]]:
        """The labels of the kept axes."""
        return {axis: values for axis, values in self.scope(**question)[0].items() if axis in keep}


def influences(
    run: Run, inputs: Any, nodes: int | str | Sequence[int], output: OutputFunction | None = None, loss: Any = None
) -> Influences:
    """The oracle, in float64 and in evaluation mode, with buffers as the run left them.

    Args:
        run: the run. inputs: the test samples.
        nodes: Gauss-Legendre nodes per step (or a number for each), "left" for one node at t = 0,
            or "midpoint:q" for q equal midpoints.
        output: ``output(call, inputs)`` is what is explained; it may look into ``call.model``.
        loss: what was trained on, where the run does not know.
    """
    model = _model(run).eval()
    inputs = _double(inputs)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(run.buffers()[name])

    def call(x: Any) -> Any:
        return forward(model, x)

    call.model = model  # type: ignore[attr-defined]

    def evaluate(theta: Mapping[str, Tensor]) -> Tensor:
        _move(parameters, theta)
        value = call(inputs) if output is None else output(call, inputs)
        return value.reshape(len(value), -1)

    def jacobian(theta: Mapping[str, Tensor]) -> Tensor:
        value = evaluate(theta)
        columns = []
        for entry in value.flatten():
            gradients = torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, allow_unused=True)
            columns.append(
                torch.cat(
                    [
                        to_dense(torch.zeros_like(p) if g is None else g).reshape(-1)
                        for g, p in zip(gradients, parameters.values(), strict=True)
                    ]
                )
            )
        return torch.stack(columns, -1).reshape(-1, *value.shape)  # [D, n, J]

    assert list(parameters) == list(run.parameters)
    thetas = [_double(run.theta(s)) for s in range(len(run.steps) + 1)]
    orders = [nodes] * len(run.steps) if isinstance(nodes, int | str) else list(nodes)
    phi = []
    for q, before, after in zip(orders, thetas[:-1], thetas[1:], strict=True):
        if q == "left":
            points, weights = np.array([-1.0]), np.array([2.0])
        elif isinstance(q, str):  # "midpoint:q"
            count = int(q.split(":")[1])
            points, weights = (2 * np.arange(count) + 1) / count - 1, np.full(count, 2 / count)
        else:
            points, weights = np.polynomial.legendre.leggauss(int(q))
        phi.append(
            sum(
                (w / 2) * jacobian({n: before[n] + (t + 1) / 2 * (after[n] - before[n]) for n in before})
                for t, w in zip(points.tolist(), weights.tolist(), strict=True)
            )
        )
    return Influences(_updates(run, loss), torch.stack(phi), torch.stack([evaluate(t).detach() for t in thetas]))


def _numbers(steps: Any, last: int) -> list[int]:
    """Step numbers: all up to ``last``, or those that a slice, a list or a number names."""
    if steps is None:
        return list(range(1, last + 1))
    if isinstance(steps, slice):
        return list(range(last + 1)[slice(1 if steps.start is None else steps.start, steps.stop, steps.step)])
    return [steps] if isinstance(steps, int) else list(steps)


def _pick(values: Tensor, axis: int, groups: Sequence[Sequence[int]]) -> Tensor:
    """Each group's sum along an axis."""
    return torch.stack([values.index_select(axis, torch.tensor(g, dtype=torch.int64)).sum(axis) for g in groups], axis)


def _along(mask: Tensor, axis: int, ndim: int) -> Tensor:
    return mask.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _kept(value: Tensor, name: str, keep: Sequence[str]) -> np.ndarray[Any, Any]:
    gone = tuple(index for index, axis in enumerate(DIMS.get(name, TERM)) if axis not in keep)
    return (value.sum(gone) if gone else value).numpy()


# ---------------------------------------------------------------------- comparing
def assert_answers(
    result: xr.Dataset, truth: Influences, keep: Sequence[str], *, tolerance: float = 1e-11, **question: Any
) -> None:
    """Every variable, dimension and label of a result is the oracle's, and it closes.

    Both sides are sums of at most some thousand products in float64, so they differ by some hundred roundings of
    the largest number around; 1e-11 of it leaves an order to spare.
    """
    expected, labels = truth.expected(keep, **question), truth.labels(keep, **question)
    scale = max(1.0, *(float(np.abs(value).max()) for value in expected.values()))
    terms = {"kernel", "regularization", "prehistory"}
    assert terms & set(result) == terms & set(expected)
    for name, value in expected.items():
        assert result[name].dims == dims_of(name, keep), name
        assert result[name].shape == value.shape, name
        np.testing.assert_allclose(result[name].values, value, rtol=0, atol=tolerance * scale, err_msg=name)
    for axis, values in labels.items():
        assert result[axis].values.tolist() == values, axis
    assert explaind.closure_error(result) <= 1e-12 * scale
