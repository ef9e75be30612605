"""What a model is made of: the classes, settings and code of its modules, by which another of its shapes is known."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from xxhash import xxh3_64

from explaind_core.naming import plain_name, qualified_name

__all__ = ["different_parts", "model_parts"]


def model_parts(model: nn.Module) -> dict[str, list[str]]:
    """Every module's class, its settings as ``repr`` shows them, and a hash of its ``forward``.

    Args:
        model: any module.

    Returns:
        JSON: module name -> class, settings, hash; the hash is empty for torch's own classes, which are known by name,
        and where there is no source.

    Example:
        >>> model_parts(nn.Sequential(nn.Dropout(0.1)))["0"]
        ['torch.nn.modules.dropout.Dropout', 'p=0.1, inplace=False', '']
    """
    return {
        plain_name(name, model): [qualified_name(type(module)), _settings(module), _code(module)]
        for name, module in model.named_modules()
    }


def different_parts(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a model differs from the recorded one, in words; nothing where it does not.

    Args:
        recorded: what :func:`model_parts` said of it.
        now: what it says of the model to compare.

    Example:
        >>> different_parts(model_parts(nn.Sequential(nn.Tanh())), model_parts(nn.Sequential(nn.SiLU())))
        ["module '0': recorded Tanh(), opened SiLU()"]
    """
    found = []
    for name in {**recorded, **now}:
        before, after = recorded.get(name), now.get(name)
        if before is None or after is None:
            found.append(f"module {name!r}: {'not recorded' if before is None else 'not there'}")
        elif list(before) != list(after):
            code = list(before[:2]) == list(after[:2])
            words = [f"{kind.rpartition('.')[2]}({settings})" for kind, settings, _ in (before, after)]
            found.append(f"module {name!r}: recorded {words[0]}, opened {words[1]}{', whose code differs' * code}")
    return found


def _settings(module: nn.Module) -> str:
    try:
        return module.extra_repr()
    except Exception:  # one that shows what it has no more
        return ""


def _code(module: nn.Module) -> str:
    kind = type(module)
    if kind.__module__.partition(".")[0] == "torch":
        return ""
    try:
        return str(xxh3_64(inspect.getsource(kind.forward).encode()).hexdigest())
    except (OSError, TypeError):
        return ""
