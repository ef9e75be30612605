"""Which parameters make a layer: module prefixes, or names with patterns and slices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core.errors import LayerError
from explaind_core.training_step import ParameterInfo

__all__ = ["Layer", "LayerSpec", "resolve_layers"]

Slices = slice | int | tuple[slice | int, ...]
ModuleType = type[nn.Module]
Pattern = str | ModuleType
LayerSpec = Sequence[Pattern] | Mapping[str, Pattern | Sequence[Pattern] | Mapping[str, Slices]]


@dataclass(frozen=True)
class Layer:
    """A named set of parameter entries.

    Attributes:
        name: its label.
        masks: parameter name -> None for all of it, or a mask (1 inside, 0 outside).
    """

    name: str
    masks: Mapping[str, Tensor | None]

    def share(self, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This layer's share of an update: its parameters only, zero outside its slices."""
        return {n: update[n] if m is None else update[n] * m for n, m in self.masks.items() if n in update}


def resolve_layers(
    spec: LayerSpec | None, parameters: Mapping[str, ParameterInfo], model: nn.Module | None = None
) -> tuple[tuple[Layer, ...], Layer | None]:
    """The layers that ``spec`` names, and what they leave out (None if nothing).

    Args:
        spec: None for one layer per module that owns parameters; a list of module prefixes (or patterns); or
            a mapping from a name to a prefix or pattern, a list of them, or ``{pattern: slices}``. A prefix
            matches whole path parts (``"encoder"`` is ``encoder.*`` but not ``encoder2.*``); ``*``, ``?`` and
            ``[...]`` make a pattern over parameter names. A module type (``nn.Linear``) may stand for a pattern: the
            parameters that modules of this type own.
        model: whose modules are looked through for types.

    Raises:
        LayerError: a layer matches nothing, a slice does not fit, or two layers overlap.

    Example:
        >>> parameters = {"a.weight": ParameterInfo(torch.Size([2]), torch.float32, True)}
        >>> [layer.name for layer in resolve_layers(None, parameters)[0]]
        ['a']
    """
    if spec is None:
        owners = dict.fromkeys(n.rpartition(".")[0] for n in parameters)
        layers = [
            Layer(owner or "(root)", {n: None for n in parameters if n.rpartition(".")[0] == owner}) for owner in owners
        ]
    else:
        if isinstance(spec, str | type):
            spec = [spec]
        items = spec.items() if isinstance(spec, Mapping) else [(_label(prefix), prefix) for prefix in spec]
        owned = _Owned(parameters, model)
        layers = [Layer(str(name), _masks(str(name), value, owned)) for name, value in items]
        if not layers:
            raise LayerError("no layer is named", where="layers", remedy="leave layers out, or name at least one")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise LayerError("two layers have the same name", got=names)
    return tuple(layers), _rest(layers, parameters)


def _label(pattern: Pattern) -> str:
    return pattern.__name__ if isinstance(pattern, type) else pattern


@dataclass(frozen=True)
class _Owned:
    """The parameters, and the model whose modules own them."""

    parameters: Mapping[str, ParameterInfo]
    model: nn.Module | None

    def by_type(self, kind: ModuleType) -> list[str]:
        """The parameters that modules of a type own directly, under the names that the run knows them by."""
        if self.model is None:
            return []
        names = {id(p): n for n, p in self.model.named_parameters()}  # a tied one has one name
        found = {
            names[id(p)]: None
            for module in self.model.modules()
            if isinstance(module, kind)
            for p in module.parameters(recurse=False)
        }
        return [n for n in self.parameters if n in found]


def _masks(name: str, value: Any, owned: _Owned) -> dict[str, Tensor | None]:
    parameters = owned.parameters
    if isinstance(value, str | type):
        value = [value]
    if not isinstance(value, Mapping | Sequence) or not all(isinstance(pattern, str | type) for pattern in value):
        raise LayerError(
            f"the layer {name!r} is neither a prefix, a pattern nor slices",
            where="layers",
            expected="a string, a list of strings, or a mapping from strings to slices",
            got=value,
        )
    if not value:
        raise LayerError(f"the layer {name!r} names no parameter", where="layers", got=value)
    if isinstance(value, Mapping):
        return {
            n: _mask(name, n, where, parameters[n].shape)
            for pattern, where in value.items()
            for n in _matching(name, pattern, owned)
        }
    return {n: None for pattern in value for n in _matching(name, pattern, owned)}


def _matching(layer: str, pattern: Pattern, owned: _Owned) -> list[str]:
    parameters = owned.parameters
    if isinstance(pattern, type):
        found = owned.by_type(pattern)
    elif re.search(r"[*?\[]", pattern):
        found = [n for n in parameters if fnmatchcase(n, pattern)]
    else:
        found = [n for n in parameters if n == pattern or n.startswith(pattern + ".")]
    if not found:
        raise LayerError(
            f"the layer {layer!r} matches no parameter",
            where=f"pattern {_label(pattern)!r}",
            expected=f"a prefix of, or a pattern for, one of {', '.join(parameters)}",
            got=_label(pattern),
            remedy="module prefixes match whole path parts; patterns use * and match whole parameter names",
        )
    return found


def _mask(layer: str, name: str, where: Slices, shape: torch.Size) -> Tensor:
    mask = torch.zeros(shape)
    try:
        mask[where] = 1
    except (IndexError, TypeError) as error:
        raise LayerError(
            f"a slice of the layer {layer!r} does not fit: {error}",
            where=f"parameter {name!r}",
            expected=tuple(shape),
            got=where,
        ) from error
    if not mask.any():
        raise LayerError(
            f"a slice of the layer {layer!r} is empty", where=f"parameter {name!r}", expected=tuple(shape), got=where
        )
    return mask


def _rest(layers: Sequence[Layer], parameters: Mapping[str, ParameterInfo]) -> Layer | None:
    """Everything that no layer covers; refuses what two layers cover."""
    rest: dict[str, Tensor | None] = {}
    for name, info in parameters.items():
        covers = [(layer.name, layer.masks[name]) for layer in layers if name in layer.masks]
        covered = sum((torch.ones(info.shape) if m is None else m for _, m in covers), torch.zeros(info.shape))
        if (covered > 1).any():
            raise LayerError(
                "layers overlap: their shares would be counted twice",
                where=f"parameter {name!r}",
                got=[layer for layer, _ in covers],
                remedy="make the layers disjoint, or ask twice",
            )
        if (covered == 0).any():
            rest[name] = None if not covers else 1 - covered
    return Layer("(rest)", rest) if rest else None
