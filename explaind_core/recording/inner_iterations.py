"""Optimizers that iterate inside ``step(closure)``: each inner iteration becomes a step of its own.

The recorder sees every evaluation of the closure: where, which loss, which gradient. A second instance of the
optimizer, told to make one iteration a call and fed with these evaluations, passes through the same iterates, so
that the run is recorded as what it is: one gradient, one update, a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import RecordingError
from explaind_core.naming import qualified_name
from explaind_core.rules import UpdateRule
from explaind_core.training_step import rebuild_optimizer

__all__ = ["Evaluation", "Iteration", "IterationSplitter"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the closure.

    Attributes:
        theta: the parameters at which it was made, by name.
        loss: what it returned.
        gradients: by parameter; a missing one is left out.
    """

    theta: Mapping[str, Tensor]
    loss: float
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class Iteration:
    """One inner iteration.

    Attributes:
        groups: the hyper-parameters under which one call of ``step(closure)`` makes it.
        evaluations: what that call is fed, the one at its starting point first.
        theta: the parameters after it.
        state: the optimizer's state after it, where it was asked for.
    """

    groups: list[dict[str, Any]]
    evaluations: tuple[Evaluation, ...]
    theta: dict[str, Tensor]
    state: dict[str, dict[str, Any]] | None


class IterationSplitter:
    """Follows an optimizer through its inner iterations.

    Args:
        rule: the optimizer's rule, which counts iterations and knows how to ask for one.
        optimizer: as it stands when recording begins.
        parameters: the model's, by name.
    """

    def __init__(
        self, rule: UpdateRule, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._rule, self._kind = rule, qualified_name(type(optimizer))
        self._parameters = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        names = {id(p): name for name, p in parameters.items()}
        groups = [
            {**group, "params": [self._parameters[names[id(p)]] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        self._shadow = rebuild_optimizer(type(optimizer), groups)
        for parameter, entries in optimizer.state.items():
            self._shadow.state[self._parameters[names[id(parameter)]]] = _cloned(dict(entries))

    def count(self, optimizer: torch.optim.Optimizer) -> int:
        """How many iterations an optimizer has made in all.

        Args:
            optimizer: the recorded one.

        Returns:
            Their number, over all of its steps.
        """
        merged: dict[str, Any] = {}
        for entries in optimizer.state.values():
            merged |= entries
        return self._rule.iterations(merged) or 0

    def split(
        self,
        evaluations: Sequence[Evaluation],
        groups: Sequence[Mapping[str, Any]],
        count: int,
        step: int,
        snapshot_every: int,
    ) -> list[Iteration]:
        """Split one call of ``step(closure)`` into its iterations.

        Args:
            evaluations: of its closure, in order.
            groups: the hyper-parameters before it.
            count: how many iterations it made.
            step: the number of the first of them as a recorded step.
            snapshot_every: states are kept of those whose step is a multiple of it.

        Returns:
            ``count`` iterations.

        Raises:
            RecordingError: the evaluations do not lead to ``count`` iterations.
        """
        used, current, found = 1, evaluations[0], []
        for index in range(count):
            one_iteration = [{**group, **self._rule.one_iteration(group, used)} for group in groups]
            fed: list[Evaluation] = []

            def closure(current: Evaluation = current, fed: list[Evaluation] = fed) -> float:
                nonlocal used
                if fed:
                    if used == len(evaluations):
                        raise self._lost(step)
                    used += 1
                fed.append(evaluations[used - 1] if fed else current)
                for name, parameter in self._parameters.items():
                    gradient = fed[-1].gradients.get(name)
                    parameter.grad = None if gradient is None else gradient.clone()
                return fed[-1].loss

            self._move_to(current.theta, one_iteration)
            self._shadow.step(closure)
            theta = {name: p.detach().clone() for name, p in self._parameters.items()}
            # A copy: the next iteration changes tensors and lists of the state in place.
            state = _cloned(self._state()) if (step + index) % snapshot_every == 0 else None
            found.append(Iteration(one_iteration, tuple(fed), theta, state))
            if index + 1 < count:
                # A line search has evaluated the new iterate already; without one it is evaluated next.
                at_iterate = [evaluation for evaluation in fed if _same(evaluation.theta, theta)]
                if not at_iterate and used < len(evaluations):
                    at_iterate = [evaluations[used]]
                    used += 1
                if not at_iterate or not _same(at_iterate[-1].theta, theta):
                    raise self._lost(step)
                current = at_iterate[-1]
        return found

    def _lost(self, step: int) -> RecordingError:
        return RecordingError(
            f"the iterations inside one step of {self._kind} cannot be told apart",
            where=f"step {step}",
            expected="the same iterates again, when it is fed the losses and gradients that its closure returned",
            remedy="let the closure only compute the loss and its gradient, and change no parameter in it",
        )

    def _move_to(self, theta: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(theta[name])
        for group, values in zip(self._shadow.param_groups, groups, strict=True):
            group.update({key: value for key, value in values.items() if key != "params"})

    def _state(self) -> dict[str, dict[str, Any]]:
        names = {id(p): name for name, p in self._parameters.items()}
        return {names[id(p)]: dict(entries) for p, entries in self._shadow.state.items()}


def _cloned(tree: Any) -> Any:
    return trees.map_tensors(lambda t: t.detach().clone(), tree)


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)
