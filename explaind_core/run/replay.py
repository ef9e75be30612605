"""The optimizer, replayed on recorded gradients: its states around every step; no model and no batch is needed.

The store keeps gradients and parameters, not the optimizer's states. The real optimizer, fed with the
recorded parameters and gradients, passes through the same states again, and what it makes of the
parameters checks the recording.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import ExplaindError, StoreError
from explaind_core.rules import OWNER, RegisteredRule
from explaind_core.run.explained_steps import ExplainedSteps

__all__ = ["Replay", "ReplayedStep"]

State = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ReplayedStep:
    """One step, replayed. Tensors have the run's own dtypes.

    Attributes:
        step: s.
        theta_before: the recorded theta_{s-1}, at the run's ``point``.
        theta: the recorded theta_s, at the run's ``point``.
        gradients: as fed, by parameter name.
        hyper: parameter name -> hyper-parameters of its group, before the step.
        before: parameter name -> the optimizer's state of it, before the step.
        after: parameter name -> the optimizer's state of it, after the step.
        drift: largest ``|replayed theta_s - recorded theta_s|``: 0 on the machine that trained, as a rule.
        hyper_after: parameter name -> hyper-parameters of its group, after the step.
        gradient_point: where the gradients were taken, if that is not theta_before.
    """

    step: int
    theta_before: dict[str, Tensor]
    theta: dict[str, Tensor]
    gradients: dict[str, Tensor]
    hyper: dict[str, dict[str, Any]]
    before: State
    after: State
    drift: float
    hyper_after: dict[str, dict[str, Any]] = field(default_factory=dict)
    gradient_point: dict[str, Tensor] | None = None


class Replay:
    """The optimizer of a run, or its optimizers, rebuilt to be replayed.

    Args:
        run: with at least one step.
        parameters: name -> what the optimizers train; the run's own, copied, by default.

    Attributes:
        run: the run.
        optimizers: in the order in which they were given to the Recorder; one, for most runs.

    Raises:
        StoreError: its class is not known here, or cannot be built from the recorded hyper-parameters.
        RuleNotFoundError: the rule that the run was recorded with is not registered.

    Example:
        >>> from explaind_core.testing import record_example
        >>> replay = Replay(record_example(steps=3))
        >>> [(step.step, step.drift) for step in replay.steps()]
        [(1, 0.0), (2, 0.0), (3, 0.0)]
    """

    def __init__(self, run: ExplainedSteps, parameters: Mapping[str, nn.Parameter] | None = None) -> None:
        self.run = run
        start = run.theta(0)
        # A run that is computed again gives the parameters of a model.
        self._parameters = dict(parameters or {name: nn.Parameter(start[name].clone()) for name in run.parameters})
        self.optimizers = self._build()
        self._built_with = [[set(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        self._unclaimed: State = {}
        self.load(run.optimizer_state(0))

    # ------------------------------------------------------------------ building
    def _build(self) -> list[torch.optim.Optimizer]:
        if not self.run.steps:
            raise StoreError("the run has no finished step", where=self.run.path, remedy="train at least one step")
        return [
            self.run.make_optimizer(
                member,
                [
                    {**group, "params": [self._parameters[n] for n in group["params"]]}
                    for group in self._groups_of(member, self.run.groups(1))
                ],
            )
            for member in range(len(self.run.optimizers))
        ]

    def _groups_of(self, member: int, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The recorded groups of one of the optimizers, as that one has them."""
        if len(self.run.optimizers) == 1:
            return [dict(group) for group in groups]
        return [{k: v for k, v in group.items() if k != OWNER} for group in groups if group[OWNER] == member]

    def load(self, state: State) -> None:
        """Put the optimizers into a state.

        Args:
            state: parameter name -> entries; the tensors are copied.
        """
        for optimizer, built_with in zip(self.optimizers, self._built_with, strict=True):
            optimizer.state.clear()
            # Counters that its first step makes in its groups are not among what was recorded before that step.
            for group, known in zip(optimizer.param_groups, built_with, strict=False):
                for counter in set(group) - known:
                    del group[counter]
        self._unclaimed = {name: trees.map_tensors(torch.clone, entries) for name, entries in state.items()}
        self._claim()

    def _claim(self) -> None:
        """Give states to the optimizers that train their parameters; groups that joined later may be missing yet."""
        for optimizer in self.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name in list(self._unclaimed):
                if len(self.optimizers) == 1 or id(self._parameters[name]) in held:
                    optimizer.state[self._parameters[name]] = self._unclaimed.pop(name)

    def rule(self) -> RegisteredRule:
        """The rule that explains these optimizers, see :meth:`ExplainedSteps.rule_for`.

        Returns:
            The rule; of several optimizers, their rules as one.

        Raises:
            RuleNotFoundError: it is not the one that the run was recorded with.
        """
        return self.run.rule_for(self.optimizers)

    # ------------------------------------------------------------------ replaying
    def state(self) -> State:
        """A copy of the optimizers' state.

        Returns:
            Parameter name -> entries.
        """
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        held = {
            names[id(p)]: entries
            for optimizer in self.optimizers
            for p, entries in optimizer.state.items()
            if id(p) in names
        }
        return {
            name: trees.map_tensors(lambda t: t.detach().clone(), dict(entries))
            for name, entries in (held | self._unclaimed).items()
        }

    def steps(self, *, until: int | None = None, start: int = 0) -> Iterator[ReplayedStep]:
        """Replay steps, one after the other.

        Args:
            until: the last of them; the run's last by default.
            start: the step before the first, whose state must have been loaded; 0 is the run's start.

        Yields:
            Each step, with the states before and after it.

        Raises:
            StoreError: a file is damaged; an optimizer iterates otherwise than it did in training.
        """
        before_theta, trained = self.run.theta(start), self.run.theta(start, point="gradient")
        before_state = self.state()
        elsewhere = self.run.point != "gradient"
        for s in range(start + 1, (len(self.run.steps) if until is None else until) + 1):
            trained_before, trained = trained, self.run.theta(s, point="gradient")
            theta = self.run.theta(s) if elsewhere else trained
            gradients = self.run.gradients(s)
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(trained_before[name])
            calls, outside, groups = self.run.closure_calls(s), self.run.outside(s), self.run.groups(s)
            self._make_step(groups, gradients, calls, outside, self.run.stepped(s), where=self.run.store.step_path(s))
            after_state = self.state()
            drift = max(
                (float((p.detach() - trained[n]).abs().max()) for n, p in self._parameters.items() if p.numel()),
                default=0.0,
            )
            yield ReplayedStep(
                s,
                before_theta,
                theta,
                gradients,
                _by_parameter(self.run.hyper(s)),
                before_state,
                after_state,
                drift,
                self._groups(),
                trained_before if elsewhere else None,
            )
            before_theta, before_state = theta, after_state

    def step_again(
        self,
        groups: tuple[dict[str, Any], ...],
        gradients: dict[str, Tensor],
        outside: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Make the optimizer's next step, from where the parameters and its state stand.

        Args:
            groups: hyper-parameters, see :meth:`StoredSteps.groups`.
            gradients: what it is fed, by parameter name.
            outside: see :meth:`StoredSteps.outside`.
        """
        self._make_step(groups, gradients, (), outside, (0,), where=self.run.path)

    def _make_step(self, groups: tuple[dict[str, Any], ...], *fed: Any, where: object) -> None:
        """:meth:`_step` with these hyper-parameters."""
        try:
            self._set_groups(groups)
            self._step(*fed)
        except ExplaindError:
            raise
        except Exception as error:  # whatever an optimizer says of values and states that are not its own
            raise StoreError(
                f"replayed, the optimizer cannot make the step: {error!r}",
                where=where,
                expected="hyper-parameters and states as the optimizer has them",
                got=[{k: v for k, v in group.items() if k != "params"} for group in groups],
                remedy="replay with the versions of torch and of the optimizer that trained",
            ) from error

    def _step(
        self,
        gradients: dict[str, Tensor],
        calls: Sequence[tuple[float, dict[str, Tensor]]],
        outside: Mapping[str, Mapping[str, Tensor]],
        stepped: Sequence[int],
    ) -> None:
        def feed(fed: dict[str, Tensor]) -> None:
            for name, parameter in self._parameters.items():
                parameter.grad = fed[name].clone() if name in fed else None

        if not calls:
            feed(gradients)
            for member in stepped:
                optimizer = self.optimizers[member]
                if self.run.manifest.get("outside"):
                    given: dict[Tensor, Mapping[str, Tensor]] = {self._parameters[n]: e for n, e in outside.items()}
                    self.rule().rule.replay_step(optimizer, given)
                else:
                    optimizer.step()
            return
        coming = iter(calls)

        def closure() -> float:
            loss, fed = next(coming)
            feed(fed)
            return loss

        try:
            self.optimizers[0].step(closure)
        except StopIteration:
            raise StoreError(
                "replayed, the optimizer evaluates its closure more often than it did in training",
                where=f"{self.run.path}, {len(calls)} calls recorded",
                remedy="replay with the versions of torch and of the optimizer that trained",
            ) from None

    def _groups(self) -> dict[str, dict[str, Any]]:
        """Parameter name -> its group's hyper-parameters as they stand; one-element tensors as numbers."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        groups = []
        for member, optimizer in enumerate(self.optimizers):
            owner = {OWNER: member} if len(self.optimizers) > 1 else {}
            for group in optimizer.param_groups:
                plain = trees.map_tensors(_number, {k: v for k, v in group.items() if k != "params"})
                groups.append({**plain, **owner, "params": [names[id(p)] for p in group["params"]]})
        return _by_parameter(groups)

    def _set_groups(self, groups: tuple[dict[str, Any], ...]) -> None:
        for member, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(self._groups_of(member, groups)):
                values = {**group, "params": [self._parameters[n] for n in group["params"]]}
                if index < len(optimizer.param_groups):
                    optimizer.param_groups[index].update(values)
                else:
                    optimizer.add_param_group(values)
        self._claim()

    def state_after(self, s: int) -> State:
        """The optimizer's state after step s, replayed from the nearest snapshot before it.

        Args:
            s: 0..N.

        Returns:
            Parameter name -> entries.
        """
        # The last step is made in any case: only the optimizer itself knows what it leaves in its groups.
        start = max(k for k in self.run.snapshots() if k < s or k == 0)
        self.load(self.run.optimizer_state(start))
        for _ in self.steps(start=start, until=s):
            pass
        return self.state()

    def counters(self) -> list[list[dict[str, Any]]]:
        """What each optimizer keeps in its groups beside its constructor's options: counters, estimates.

        Returns:
            For each optimizer one mapping a group.
        """
        found = []
        for optimizer in self.optimizers:
            options = inspect.signature(type(optimizer)).parameters
            known = {*options, "params", "param_names", "initial_lr"}
            found.append([{k: v for k, v in group.items() if k not in known} for group in optimizer.param_groups])
        return found


def _number(tensor: Tensor) -> Any:
    return tensor.item() if tensor.numel() == 1 else tensor


def _by_parameter(groups: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in group.items() if k != "params"} for group in groups for name in group["params"]}
