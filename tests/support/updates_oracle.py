"""What every update is made of, sample by sample and step by step: written down as matrices, without the engine."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core import trees
from explaind_core.decomposition.rule_view import FLAT
from explaind_core.operators import OfReadout
from explaind_core.rules.secant import Fitted
from explaind_core.run.replay import Replay
from explaind_core.run.run import Run
from explaind_core.tensors import to_dense
from support.attribution_oracles import forward
from support.oracles import block, matrix


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


def _model(run: Run) -> nn.Module:
    assert run.model is not None
    return copy.deepcopy(run.model).double().requires_grad_(True)


def _move(parameters: Mapping[str, nn.Parameter], theta: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(theta[name])


def _double(tree: Any) -> Any:
    return trees.map_tensors(lambda t: t.double() if t.is_floating_point() else t, tree)
