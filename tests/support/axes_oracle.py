"""The whole influence tensor, dense, slow and obviously right, with all its seven axes.

Nothing of the library's engine is used. A rule is asked for its declaration, and everything that follows from it is
written down as matrices: every step learning rate ``alpha_{s,i}``, every operator, every sample's share of every
gradient by a backward pass of its own, every row of the Jacobian by another. Questions are answered by masks and sums.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core import trees
from explaind_core.decomposition.rule_view import FLAT
from explaind_core.operators import OfReadout
from explaind_core.rules.secant import Fitted
from explaind_core.run.replay import Replay
from explaind_core.run.run import Run
from explaind_core.tensors import to_dense
from support.attribution_oracles import OutputFunction, forward, modules
from support.oracles import block, matrix

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


# ---------------------------------------------------------------------- what the updates are made of
@dataclass(frozen=True)
class Updates:
    """Every update of a run, coordinate by coordinate (D of them), with N steps and K distinct samples.

    Attributes:
        share: ``[N, N, D, K]``: ``alpha_{s,i} P_s E_i g_{i,k}``, zero for i > s.
        decay: ``[N, D]``: r_s. remembered: ``[N, D]``: what comes of m_0, None where recording began afresh.
        shares: ``[N, D, K]``: g_{i,k}, zero where the parameter was fed no gradient.
        ids: the K sample ids, rising. batches: which of them each step's batch held.
        where: parameter -> its coordinates. shapes: parameter -> shape.
    """

    share: Tensor
    decay: Tensor
    remembered: Tensor | None
    shares: Tensor
    ids: list[int]
    batches: list[set[int]]
    where: Mapping[str, slice]
    shapes: Mapping[str, torch.Size]


def sample_gradients(run: Run, s: int, loss: Any = None) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Ids and gradients of every row of the batch of step s: its share of what the step was fed.

    A row's share is the gradient of the whole batch's loss through this row of the model's outputs alone: any
    normaliser, and whatever the model does with its batch, is that of the batch.
    """
    loss = run.loss if loss is None else loss
    model = _model(run).train()
    parameters = dict(model.named_parameters())
    _move(parameters, run.theta(s - 1, point="gradient"))
    ids, found = [], []
    for micro in run.batch(s).micro:
        outputs = forward(model, _double(micro.inputs))
        leaf = outputs.detach().requires_grad_()
        value = micro.weight * loss(leaf, _double(micro.targets)).mean() * run.gradient_factor(s)
        (pull,) = torch.autograd.grad(value, leaf)
        for row, k in enumerate(micro.ids.tolist()):
            only = torch.zeros_like(pull)
            only[row] = pull[row]
            gradients = torch.autograd.grad(
                outputs, list(parameters.values()), only, retain_graph=True, allow_unused=True
            )
            ids.append(k)
            found.append(
                {
                    n: torch.zeros_like(p) if g is None else to_dense(g)
                    for (n, p), g in zip(parameters.items(), gradients, strict=True)
                }
            )
    return ids, found


def updates(run: Run, loss: Any = None) -> Updates:
    """The explicit sums over all pairs (s, i) of steps and all samples k, with everything a matrix."""
    shapes = {n: p.shape for n, p in run.parameters.items()}
    ends = list(itertools.accumulate(shape.numel() for shape in shapes.values()))
    where = {n: slice(end - shapes[n].numel(), end) for n, end in zip(shapes, ends, strict=True)}
    N, D = len(run.steps), ends[-1]
    fed = [sample_gradients(run, s, loss) for s in run.steps]
    ids = sorted({k for step, _ in fed for k in step})
    shares = torch.zeros(N, D, len(ids), dtype=torch.float64)
    for i, (step, found) in enumerate(fed):
        gradients = run.gradients(i + 1)
        for k, row in zip(step, found, strict=True):
            for name in gradients:
                shares[i, where[name], ids.index(k)] += row[name].reshape(-1)
        for name, gradient in gradients.items():  # the samples' shares are those of the gradient that was fed
            total, fed_here = shares[i, where[name]].sum(1).view(shapes[name]), to_dense(gradient)
            rounding = 1e4 * torch.finfo(fed_here.dtype).eps
            torch.testing.assert_close(total, fed_here.double(), rtol=rounding, atol=rounding / 10)

    rules = Replay(run).rule().rule
    share, decay = torch.zeros(N, N, D, len(ids), dtype=torch.float64), torch.zeros(N, D, dtype=torch.float64)
    start = run.optimizer_state(0)
    remembered = torch.zeros(N, D, dtype=torch.float64) if any(start.values()) else None
    for name, steps in declarations(run).items():
        names = [n for group in run.hyper(1) for n in group["params"]] if name == FLAT else [name]
        at = torch.cat([torch.arange(D)[where[n]] for n in names])
        shape, rule = steps[0][0].theta.shape, rules.member(steps[0][0].hyper)  # its own optimizer's
        filters = [declared.filter for _, declared in steps]
        initial = _initial(start.get(name, {}), rule.filter_states, shape)
        for last, (step, declared) in enumerate(steps):
            weights = [_alpha(filters, last, first, shape) for first in range(last + 1)]
            through = [a @ d.gradient_operator.dense(shape) for a, (_, d) in zip(weights, steps, strict=False)]
            pulled = sum(
                a @ d.coupled_decay.dense(shape) @ old.theta.flatten()
                for a, (old, d) in zip(weights, steps, strict=False)
            )
            kept = torch.zeros(at.shape, dtype=torch.float64)
            if initial is not None:
                kept = _read(filters, 0, last, initial, shape)
            out = sum(a @ old.gradient.flatten() for a, (old, _) in zip(through, steps, strict=False)) + pulled + kept
            P = _preconditioner(rule, step, declared, out)
            for a, (old, _) in zip(through, steps, strict=False):
                share[step.step - 1, old.step - 1, at] = P @ a @ shares[old.step - 1, at]
            decay[step.step - 1, at] = declared.decoupled_decay.dense(shape) @ step.theta.flatten() + P @ pulled
            if remembered is not None:
                remembered[step.step - 1, at] = P @ kept
    batches = [set(step) for step, _ in fed]
    return Updates(share, decay, remembered, shares, ids, batches, where, shapes)


_updates = lru_cache(maxsize=None)(updates)


def declarations(run: Run) -> dict[str, list[tuple[Any, Any]]]:
    """Parameter -> (RecordedStep, StepCoefficients) of each of its steps, as its rule declared them."""
    seen: dict[str, list[tuple[Any, Any]]] = {}
    rule = Replay(run).rule().rule
    kinds = {type(member) for member in getattr(rule, "members", [rule])}

    def seen_by(original: Any) -> Any:
        def coefficients(self: Any, step: Any) -> Any:
            declared = original(self, step)
            seen.setdefault(step.name, []).append((step, declared))
            return declared

        return coefficients

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(mock.patch.object(kind, "coefficients", seen_by(kind.coefficients)))
        for _ in explaind.decompose(run):
            pass
    return seen


def _initial(state: Mapping[str, Any], names: Sequence[str], shape: torch.Size) -> Tensor | None:
    """m_0, flat, or None where it is zero."""
    entries = [state[n].double() if n in state else torch.zeros(shape, dtype=torch.float64) for n in names]
    return torch.cat([e.reshape(-1) for e in entries]) if any(bool(e.any()) for e in entries) else None


def _alpha(filters: Sequence[Any], s: int, i: int, shape: torch.Size) -> Tensor:
    """``alpha_{s,i} = C_s A_{s-1} ... A_{i+1} B_i`` (``D_s`` for i = s) as a matrix; s and i count from 0."""
    if i == s:
        return matrix(filters[s].D, shape)
    state = block([[b] for b in filters[i].B], shape) if filters[i].order else torch.zeros(0, shape.numel())
    return _read(filters, i + 1, s, state.double(), shape)


def _read(filters: Sequence[Any], first: int, s: int, state: Tensor, shape: torch.Size) -> Tensor:
    """``C_s A_{s-1} ... A_first state``; states that a filter gains on the way start at zero."""
    D = shape.numel()
    for now in range(first, s + 1):
        k = filters[now].order
        if k == 0:
            return torch.zeros(D, *state.shape[1:], dtype=torch.float64)
        grown = torch.zeros(k * D, *state.shape[1:], dtype=torch.float64)
        grown[: len(state)] = state
        state = block([filters[now].C] if now == s else filters[now].A, shape) @ grown
    return state


def _preconditioner(rule: Any, step: Any, declared: Any, out: Tensor) -> Tensor:
    """P_s as a matrix, made and closed by what its filter reads out where the rule says so."""
    shape, P = step.theta.shape, declared.preconditioner
    if isinstance(P, OfReadout):
        P = P.make(out.view(shape))
    if not rule.closed_by_secant:
        return P.dense(shape)
    update = -step.displacement.flatten() - declared.decoupled_decay.dense(shape) @ step.theta.flatten()
    if isinstance(P, Fitted):
        P = P.fit(out.view(shape), update.view(shape))
    dense = P.dense(shape)
    return dense + torch.outer(update - dense @ out, out) / out.dot(out) if out.any() else dense


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


def _model(run: Run) -> nn.Module:
    assert run.model is not None
    return copy.deepcopy(run.model).double().requires_grad_(True)


def _move(parameters: Mapping[str, nn.Parameter], theta: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(theta[name])


def _double(tree: Any) -> Any:
    return trees.map_tensors(lambda t: t.double() if t.is_floating_point() else t, tree)


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
