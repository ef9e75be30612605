"""What is recorded: a model and its optimizers, seen through the names of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import RecordingError
from explaind_core.naming import plain, plain_name, qualified_name
from explaind_core.recording.trained_loss import WITH_LOSS
from explaind_core.rules import JOINED_BY, OWNER, RegisteredRule, check_joinable, hand_over, joined
from explaind_core.tensors import copied

__all__ = ["Subject"]


class Subject:
    """A model, its optimizers, and the rules that speak for them.

    Args:
        model: any module, compiled or not.
        optimizers: one, or several.
        registered: the rule of each.

    Attributes:
        model: as it was given.
        optimizers: in the order in which they were given.
        registered: their rules, likewise.
        rule: the only rule, or all of them as one (:class:`explaind_core.rules.JointRule`).
        parameters: the model's, by their names in the plain model, if it is compiled.
        names: the name of every parameter, by its ``id``.

    Raises:
        RecordingError: an optimizer trains tensors that are not parameters of ``model``, or complex ones; two of
            them share a parameter.
        UnsupportedOptionError: one uses an option that its rule does not model, or can be recorded alone only.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        registered: Sequence[RegisteredRule],
    ) -> None:
        self.model, self.optimizers, self.registered = plain(model), list(optimizers), list(registered)
        hand_over(self.optimizers)
        self.rule = joined(registered).rule
        if self.joint:
            check_joinable(self.optimizers, [r.rule for r in registered])
        self.parameters = {plain_name(name, self.model): p for name, p in self.model.named_parameters()}
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._owners: dict[str, int] = {}
        self.check_parameters()
        for optimizer, each in zip(self.optimizers, registered, strict=True):
            each.rule.check_held_options(optimizer, unused=not optimizer.state)
        self.groups()  # refuses options before anything is written

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next((p.device for p in self.parameters.values()), torch.device("cpu"))

    @property
    def joint(self) -> bool:
        """Whether there are several optimizers."""
        return len(self.optimizers) > 1

    def owner(self, name: str) -> int | None:
        """Which optimizer trains a parameter.

        Args:
            name: of the parameter.

        Returns:
            Its number, counted from 0; None where none does.
        """
        return self._owners.get(name)

    def described(self) -> dict[str, Any]:
        """The optimizer and its rule as the manifest has them.

        Returns:
            JSON; of several, their names joined, and each one's own.
        """
        each = [_described(o, r) for o, r in zip(self.optimizers, self.registered, strict=True)]
        if not self.joint:
            return each[0]
        rules = [entry["rule"] for entry in each]
        rule: dict[str, Any] = {key: JOINED_BY.join(r[key] for r in rules) for key in ("name", "package", "version")}
        rule |= {key: any(r[key] for r in rules) for key in ("inferred", "closed_by_secant")}
        names = JOINED_BY.join(entry["optimizer"] for entry in each)
        return {"optimizer": names, "rule": {**rule, "settings": {}}, "optimizers": each}

    def theta(self) -> dict[str, Tensor]:
        """Copies of all parameters as they stand.

        Returns:
            By name, in main memory.
        """
        return {name: copied(parameter) for name, parameter in self.parameters.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers as they stand.

        Returns:
            By name, in main memory.
        """
        return {plain_name(name, self.model): copied(buffer) for name, buffer in self.model.named_buffers()}

    def trained(self) -> list[nn.Parameter]:
        """The parameters in the optimizers' groups.

        Returns:
            In the model's order.
        """
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.parameters.values() if id(p) in held]

    def check_parameters(self) -> None:
        """Refuse what cannot be recorded; groups may have been added since the last look."""
        for member, optimizer in enumerate(self.optimizers):
            for index, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    self._check_parameter(parameter, member, index)

    def _check_parameter(self, parameter: Tensor, member: int, index: int) -> None:
        of = f" of optimizer {member}, {type(self.optimizers[member]).__name__}" if self.joint else ""
        if id(parameter) not in self.names:
            raise RecordingError(
                "the optimizer trains a tensor that is no parameter of the model",
                where=f"parameter group {index}{of}",
                got=f"a tensor of shape {tuple(parameter.shape)}",
                remedy="record one module of which all that is trained is a part, and whose forward makes the whole "
                f"pass (return self.head(self.body(x))). Where these are weights of a loss, {WITH_LOSS}",
            )
        name = self.names[id(parameter)]
        if parameter.is_complex():
            raise RecordingError(
                "complex parameters are not supported",
                where=f"parameter {name!r}",
                remedy="train on torch.view_as_real of it",
            )
        owner = self._owners.setdefault(name, member)
        if owner != member:
            kinds = [type(self.optimizers[k]).__name__ for k in (owner, member)]
            raise RecordingError(
                "two optimizers train the same parameter, or one took it over from the other",
                where=f"parameter {name!r}",
                expected="every parameter in the groups of one optimizer, from its first step to the last",
                got=f"optimizer {owner} ({kinds[0]}) and optimizer {member} ({kinds[1]})",
                remedy="give each parameter to one of them",
            )

    def groups(self) -> list[dict[str, Any]]:
        """Every group's hyper-parameters as they stand, checked against its rule.

        Returns:
            One entry a group, with the names of its parameters; with several optimizers the groups of all, one
            optimizer behind the other, each with its optimizer's number.

        Raises:
            UnsupportedOptionError: an optimizer uses an option that its rule does not model.
            RecordingError: a group has an entry of the name that tells optimizers apart.
        """
        groups = []
        for member, (optimizer, registered) in enumerate(zip(self.optimizers, self.registered, strict=True)):
            rule = registered.rule
            aside = rule.options_aside(optimizer)
            rule.check_held_options(optimizer)
            for index, group in enumerate(optimizer.param_groups):
                rule.check_options({**group, **aside}, [*optimizer.defaults, *aside])
                entry: dict[str, Any] = {"params": [self.names[id(p)] for p in group["params"]]}
                values = {**group, **aside}
                entry |= {key: _plain(value) for key, value in values.items() if key not in ("params", "param_names")}
                if self.joint:
                    self._check_owner_is_free(entry, member, index)
                    entry[OWNER] = member
                groups.append(entry)
        return groups

    def _check_owner_is_free(self, entry: dict[str, Any], member: int, index: int) -> None:
        if OWNER in entry:
            raise RecordingError(
                f"a parameter group has an entry {OWNER!r}, which tells optimizers apart in a run of several",
                where=f"parameter group {index} of optimizer {member}",
                got=entry[OWNER],
                remedy="keep it under another name",
            )

    def state(self) -> dict[str, dict[str, Any]]:
        """The optimizers' state as it stands.

        Returns:
            The entries of every parameter, by its name.
        """
        return {
            self.names[id(parameter)]: dict(entries)
            for optimizer in self.optimizers
            for parameter, entries in optimizer.state.items()
            if id(parameter) in self.names
        }

    def outside(self, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state entries that gradients alone do not give, where they changed.

        Args:
            last: what this returned before, all calls together.

        Returns:
            Copies, as ``entry/parameter``.
        """
        found = {}
        for name, entries in self.state().items() if self.rule.outside else ():
            for entry in self.rule.outside:
                key = f"{entry}/{name}"
                if entry in entries and (key not in last or not torch.equal(entries[entry], last[key])):
                    found[key] = copied(entries[entry])
        return found

    def evaluated(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the model is evaluated, for optimizers for which that is elsewhere than where training stands.

        Args:
            theta: where training stands, by parameter.

        Returns:
            Copies by parameter; empty where these do not differ.
        """
        if not self.rule.evaluates_elsewhere:
            return {}
        state, found = self.state(), {}
        for group in self.groups():
            for name in group["params"]:
                found[name] = copied(self.rule.evaluated(theta[name], state.get(name, {}), group))
        return found


def _described(optimizer: torch.optim.Optimizer, registered: RegisteredRule) -> dict[str, Any]:
    rule = registered.rule
    return {
        "optimizer": qualified_name(type(optimizer)),
        "optimizer_defaults": sorted(optimizer.defaults),
        "rule": {
            "name": qualified_name(type(rule)),
            "package": registered.package,
            "version": registered.version,
            "inferred": rule.inferred,
            "closed_by_secant": rule.closed_by_secant,
            "settings": rule.settings(),
        },
    }


def _plain(value: Any) -> Any:
    """A hyper-parameter as the store keeps it; what a scheduler or user left there that is no data is only named."""
    try:
        trees.flatten(value, "hyper-parameter")
    except RecordingError:
        return f"<{type(value).__name__}>"
    return value.detach().clone() if isinstance(value, Tensor) else value
