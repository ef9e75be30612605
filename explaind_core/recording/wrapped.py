"""Models and optimizers in the wrappers of frameworks: which of them can be recorded, and what else they tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from explaind_core.errors import RecordingError
from explaind_core.naming import held_by, wrapping

__all__ = ["autocast_inside", "check_wrappers", "scaler_inside"]

#: Wrappers that keep parameters in pieces, or elsewhere, by the name of their class: no step of theirs is seen whole.
_SHARDED = {
    "FullyShardedDataParallel": "fully sharded data parallel training (FSDP)",
    "FSDPModule": "fully sharded data parallel training (FSDP2)",
    "DeepSpeedEngine": "DeepSpeed",
    "PipelineStage": "pipeline parallel training",
}


def check_wrappers(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse a model whose wrapper is not what is trained, or does not hold all of it.

    Args:
        model: what the Recorder was given.
        optimizers: without the shells of frameworks.

    Raises:
        RecordingError: parameters are in shards; several processes share a batch; a running average is given and not
            the model that it is of.
    """
    for name, module in model.named_modules():
        kinds = [_SHARDED[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _SHARDED]
        if kinds:
            raise RecordingError(
                f"{kinds[0]} cannot be recorded: no process holds the parameters whole",
                where=f"module {name!r}",
                expected="a plain module, or one in nn.DataParallel or DistributedDataParallel of one process",
                got=type(module).__name__,
                remedy="train in one process, with the module that was wrapped",
            )
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            raise RecordingError(
                "several processes cannot be recorded: each one sees its own part of a batch",
                where=f"module {name!r}",
                expected="a process group of one",
                got=f"{module.process_group.size()} processes",
                remedy="train in one process, with larger batches or gradient accumulation",
            )
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for module in wrapping(model):
        if isinstance(module, AveragedModel) and not held & {id(p) for p in module.parameters()}:
            raise RecordingError(
                "the model to record is a running average of the model that is trained",
                where="Recorder(path, model, ...)",
                expected="the module whose parameters the optimizer has",
                got="torch.optim.swa_utils.AveragedModel, which has copies of them",
                remedy="give the Recorder the model that was averaged; open_run takes either, or any new one",
            )


def scaler_inside(optimizers: Any) -> GradScaler | None:
    """The gradient scaler that accelerate's optimizer steps through.

    Args:
        optimizers: one or several, as the Recorder was given them.

    Returns:
        None where there is none.
    """
    given: Iterable[Any] = optimizers if isinstance(optimizers, Sequence) else [optimizers]
    for optimizer in given:
        scaler = held_by(optimizer, "scaler")
        if isinstance(held_by(optimizer, "optimizer"), torch.optim.Optimizer) and scaler is not None:
            found: GradScaler = scaler
            return found
    return None


def autocast_inside(model: nn.Module) -> torch.autocast | None:
    """The autocast that accelerate wraps around ``model.forward``, where no hook sees it.

    Args:
        model: without its wrappers.

    Returns:
        None where there is none.
    """
    function: Any = model.forward if "_original_forward" in vars(model) else None
    while function is not None:
        function = getattr(function, "__func__", function)
        for cell in getattr(function, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.autocast):
                return cell.cell_contents
        function = getattr(function, "__wrapped__", None)
    return None
