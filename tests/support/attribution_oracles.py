"""A dense, slow, obviously right attribution, and small runs to compare it with the library on.

Nothing is contracted, vectorised or kept apart by layer: a plain module holds plain weights, one backward pass per
test sample and output gives every row of the Jacobian, and every coordinate of every update is multiplied by it.
Only the split of the updates themselves (kernel, regularization, prehistory) is taken from ``decompose``, which
has tests of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core.run.run import Run

OutputFunction = Callable[[Callable[[Any], Any], Any], Tensor]
AXES = ("step", "layer", "test", "output")
SUBSETS = [keep for size in range(5) for keep in itertools.combinations(AXES, size)]


def rows(tree: Any, index: Tensor | slice) -> Any:
    """Some samples of a tensor, a tuple of tensors or a dict of tensors."""
    if isinstance(tree, dict):
        return {key: value[index] for key, value in tree.items()}
    return tuple(value[index] for value in tree) if isinstance(tree, tuple) else tree[index]


def forward(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def record(
    path: Path,
    model: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    inputs: Any,
    targets: Tensor,
    *,
    loss: Any = None,
    steps: int = 4,
    batch: int = 6,
    unrecorded: int = 0,
    rates: Sequence[float] = (),
) -> Run:
    """Train for a few steps and open the run; ``unrecorded`` steps come first, ``rates`` are learning rates by step."""
    loss = nn.CrossEntropyLoss() if loss is None else loss
    optimizer = make_optimizer(p for p in model.parameters() if p.requires_grad)

    def backward() -> Tensor:
        ids = torch.randperm(len(targets))[:batch]
        optimizer.zero_grad()
        value = loss(forward(model, rows(inputs, ids)), targets[ids])
        value.mean().backward()
        return ids

    for _ in range(unrecorded):
        backward()
        optimizer.step()
    with explaind.Recorder(path, model, optimizer, loss, train_size=len(targets)) as recorder:
        for s in range(steps):
            for group in optimizer.param_groups if rates else ():
                group["lr"] = rates[s]
            ids = backward()
            recorder.batch(rows(inputs, ids), targets[ids], ids=ids)
            optimizer.step()
    return explaind.open_run(path, model=model)


@dataclass(frozen=True)
class Dense:
    """Every influence of a run, coordinate by coordinate.

    Attributes:
        influence: term -> [N, D, n, J]. values: f(theta_0) .. f(theta_N), [N + 1, n, J]. where: parameter -> its
            coordinates among the D. shapes: parameter -> shape.
    """

    influence: Mapping[str, Tensor]
    values: Tensor
    where: Mapping[str, slice]
    shapes: Mapping[str, torch.Size]

    def mask(self, *names: str, entries: Any = ...) -> Tensor:
        """[D]: 1 on those entries of the named parameters, 0 elsewhere."""
        mask = torch.zeros(next(iter(self.influence.values())).shape[1], dtype=torch.float64)
        for name in names:
            mask[self.where[name]].view(self.shapes[name])[entries] = 1
        return mask

    def expected(
        self, keep: Sequence[str], layers: Mapping[str, Tensor], steps: Sequence[int]
    ) -> dict[str, np.ndarray[Any, Any]]:
        """What ``attribute`` must return, over the kept axes in canonical order."""
        masks, chosen = torch.stack(list(layers.values())), [s - 1 for s in steps]
        everything = sum(t.sum(1) for t in self.influence.values())
        change = self.values[1:] - self.values[:-1]
        terms = {n: torch.einsum("ld,sdnj->slnj", masks, t[chosen]) for n, t in self.influence.items()}
        # What is not asked for: other parameters in the steps asked for, and whole steps in between.
        omitted = everything[chosen] - sum(t.sum(1) for t in terms.values())
        ends = [steps[0] - 1, *steps[:-1]]
        omitted = omitted + self.values[[s - 1 for s in steps]] - self.values[ends]
        edges = {"initial": self.values[steps[0] - 1], "final": self.values[steps[-1]]}
        plain = {"residual": (change - everything)[chosen], "omitted": omitted}
        groups = (
            (terms, ("step", "layer", "test", "output")), (plain, ("step", "test", "output")),
            (edges, ("test", "output")),
        )  # fmt: skip
        return {
            name: value.sum([i for i, axis in enumerate(axes) if axis not in keep]).numpy()
            if any(axis not in keep for axis in axes)
            else value.numpy()
            for group, axes in groups
            for name, value in group.items()
        }


def dense(run: Run, inputs: Any, nodes: int, output: OutputFunction | None = None) -> Dense:
    """The oracle: in float64 and in evaluation mode, with buffers as the run left them.

    ``output(call, inputs)`` is what is explained; it may look into ``call.model``.
    """
    assert run.model is not None
    model = copy.deepcopy(run.model).eval().double().requires_grad_(True)
    inputs = _double(inputs)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(run.buffers()[name])
    terms = ("kernel", "regularization", "prehistory")

    def call(x: Any) -> Any:
        return forward(model, x)

    call.model = model  # type: ignore[attr-defined]

    def evaluate(theta: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(theta[name])
        value = call(inputs) if output is None else output(call, inputs)
        return value.reshape(len(value), -1)

    def jacobian(theta: Mapping[str, Tensor]) -> Tensor:
        value = evaluate(theta)
        entries = []
        for entry in value.flatten():
            gradients = torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, allow_unused=True)
            flat = [
                torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.to_dense().reshape(-1)
                for g, p in zip(gradients, parameters.values(), strict=True)
            ]
            entries.append(torch.cat(flat))
        return torch.stack(entries, -1).reshape(-1, *value.shape)  # [D, n, J]

    points, weights = np.polynomial.legendre.leggauss(nodes)
    found: dict[str, list[Tensor]] = {term: [] for term in terms}
    values = [evaluate(_double(run.theta(0))).detach()]
    for step in explaind.decompose(run):
        before, after = _double(step.theta_before), _double(step.theta)
        feature_map = sum(
            (w / 2) * jacobian({n: before[n] + (t + 1) / 2 * (after[n] - before[n]) for n in before})
            for t, w in zip(points.tolist(), weights.tolist(), strict=True)
        )
        assert isinstance(feature_map, Tensor)
        for term in terms:
            updates = [
                getattr(step.updates[n], term) if n in step.updates and getattr(step.updates[n], term) is not None
                else torch.zeros_like(p)
                for n, p in parameters.items()
            ]  # fmt: skip
            update = torch.cat([u.detach().reshape(-1) for u in updates])
            found[term].append(feature_map * update[:, None, None])
        values.append(evaluate(after).detach())
    influence = {term: torch.stack(parts) for term, parts in found.items()}
    if not influence["prehistory"].any():
        del influence["prehistory"]
    ends = list(itertools.accumulate(p.numel() for p in parameters.values()))
    where = {n: slice(end - p.numel(), end) for end, (n, p) in zip(ends, parameters.items(), strict=True)}
    return Dense(influence, torch.stack(values), where, {n: p.shape for n, p in parameters.items()})


def _double(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _double(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_double(value) for value in tree)
    return tree.double() if tree.is_floating_point() else tree


def modules(oracle: Dense) -> dict[str, Tensor]:
    """The default layers: one per module that owns parameters, in order."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in oracle.where)
    return {
        owner or "(root)": oracle.mask(*(n for n in oracle.where if n.rpartition(".")[0] == owner)) for owner in owners
    }


def assert_equal(
    result: xr.Dataset,
    expected: Mapping[str, np.ndarray[Any, Any]],
    *,
    tolerance: float = 1e-11,
    closure: float = 1e-12,
) -> None:
    """Every variable equals the oracle's, and the result closes; both as fractions of the largest number around.

    Both sides are sums of at most some hundred products in float64, so they differ by some hundred roundings
    of the largest number: 1e-11 leaves two orders to spare.
    """
    scale = max(1.0, *(float(np.abs(value).max()) for value in expected.values()))
    assert {"kernel", "regularization", "prehistory"} & set(result) == {*expected} - {
        "residual", "omitted", "initial", "final",
    }  # fmt: skip
    for name, value in expected.items():
        assert result[name].shape == value.shape, name
        np.testing.assert_allclose(result[name].values, value, rtol=0, atol=tolerance * scale, err_msg=name)
    assert explaind.closure_error(result) <= closure * scale
