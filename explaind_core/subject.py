"""What is recorded: a model and its optimizer, seen through the names of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.batches import copied
from explaind_core.errors import RecordingError
from explaind_core.plugins import RegisteredRule

__all__ = ["Subject"]


class Subject:
    """A model, its optimizer, and the rule that speaks for it.

    Raises:
        RecordingError: the optimizer trains tensors that are not parameters of ``model``, or complex ones.
        UnsupportedOptionError: it uses an option that the rule does not model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, registered: RegisteredRule) -> None:
        self.model, self.optimizer, self.registered = model, optimizer, registered
        self.rule = registered.rule
        self.parameters = dict(model.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.check_parameters()
        self.groups()  # refuses options before anything is written

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next((p.device for p in self.parameters.values()), torch.device("cpu"))

    def theta(self) -> dict[str, Tensor]:
        """Copies of all parameters as they stand."""
        return {name: copied(parameter) for name, parameter in self.parameters.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers as they stand."""
        return {name: copied(buffer) for name, buffer in self.model.named_buffers()}

    def trained(self) -> list[nn.Parameter]:
        """The parameters in the optimizer's groups, in the model's order."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return [p for p in self.parameters.values() if id(p) in held]

    def check_parameters(self) -> None:
        """Refuse what cannot be recorded; groups may have been added since the last look."""
        for index, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in self.names:
                    raise RecordingError(
                        "the optimizer trains a tensor that is no parameter of the model",
                        where=f"parameter group {index}",
                        got=f"a tensor of shape {tuple(parameter.shape)}",
                        remedy="record with the module that owns it, e.g. nn.ModuleList([model, head])",
                    )
                if parameter.is_complex():
                    raise RecordingError(
                        "complex parameters are not supported",
                        where=f"parameter {self.names[id(parameter)]!r}",
                        remedy="train on torch.view_as_real of it",
                    )

    def groups(self) -> list[dict[str, Any]]:
        """Every group's hyper-parameters as they stand, with the names of its parameters, checked against the rule."""
        groups, rule = [], self.rule
        aside = rule.options_aside(self.optimizer)
        for group in self.optimizer.param_groups:
            rule.check_options({**group, **aside}, [*self.optimizer.defaults, *aside])
            entry: dict[str, Any] = {"params": [self.names[id(p)] for p in group["params"]]}
            values = {**group, **aside}
            entry |= {key: _plain(value) for key, value in values.items() if key not in ("params", "param_names")}
            groups.append(entry)
        return groups

    def state(self) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name."""
        return {
            self.names[id(parameter)]: dict(entries)
            for parameter, entries in self.optimizer.state.items()
            if id(parameter) in self.names
        }

    def outside(self, last: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state entries that gradients alone do not give, where they differ from ``last``: ``entry/parameter``."""
        found = {}
        for name, entries in self.state().items() if self.rule.outside else ():
            for entry in self.rule.outside:
                key = f"{entry}/{name}"
                if entry in entries and (key not in last or not torch.equal(entries[entry], last[key])):
                    found[key] = copied(entries[entry])
        return found

    def evaluated(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the model is evaluated when training stands at ``theta``, for optimizers where these differ."""
        if not self.rule.evaluates_elsewhere:
            return {}
        state, found = self.state(), {}
        for group in self.groups():
            for name in group["params"]:
                found[name] = copied(self.rule.evaluated(theta[name], state.get(name, {}), group))
        return found

    def untouched(self, left: Tensor, found: Tensor) -> bool:
        """Whether ``found`` is what the last step left."""
        if not self.rule.evaluates_elsewhere or left.numel() == 0:
            return torch.equal(left, found)
        # Going to the evaluated point and back rounds; anything beyond that rounding is a change.
        allowed = 16 * torch.finfo(left.dtype).eps * float(left.abs().max())
        return float((left.double() - found.double()).abs().max()) <= allowed


def _plain(value: Any) -> Any:
    """A hyper-parameter as the store keeps it; what a scheduler or user left there that is no data is only named."""
    try:
        trees.flatten(value, "hyper-parameter")
    except RecordingError:
        return f"<{type(value).__name__}>"
    return value.detach().clone() if isinstance(value, Tensor) else value
