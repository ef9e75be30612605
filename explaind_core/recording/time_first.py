"""Inputs whose first axis is time, not samples: seen where both axes happen to be as long, so that no number tells."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import RecordingError
from explaind_core.training_step import run_model

__all__ = ["check_time_first"]


def check_time_first(model: nn.Module, inputs: Any, samples: int, where: str) -> None:
    """Refuse a batch whose samples lie along the second axis of its inputs, for layers that take time first.

    Looked at where an input is ``[n, n, ...]`` for n samples and the model has layers with ``batch_first=False``: one
    entry along each axis is exchanged for its neighbour. If that of the second axis changes one sample's output alone,
    and that of the first one others, too, time comes first.

    Args:
        model: as it is trained; it is run without gradients, in evaluation mode, and left as it was.
        inputs: of the batch, as the model takes them.
        samples: n.
        where: for the error.

    Raises:
        RecordingError: they do.
    """
    leaves = trees.leaves(inputs)
    square = next((i for i, t in enumerate(leaves) if t.ndim > 1 and t.shape[:2] == (samples, samples)), None)
    if square is None or samples < 3 or not any(getattr(m, "batch_first", True) is False for m in model.modules()):
        return
    modes = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            model.eval()
            plain, first, second = (_outputs(model, inputs, square, axis) for axis in (None, 0, 1))
    except (RuntimeError, ValueError, TypeError, IndexError):  # nothing that could be told apart
        return
    finally:
        for module, mode in modes.items():
            module.training = mode
    if plain is None or first is None or second is None or len(plain) != samples:
        return
    alone = {1}
    by_first = _changed(plain, first, 0)
    if by_first != alone and alone in (_changed(plain, second, 0), _changed(plain, second, 1)):
        raise RecordingError(
            "the samples lie along the second axis of the inputs, where time was taken for them",
            where=where,
            expected="inputs, and outputs, with one row per sample",
            got=f"inputs of shape {tuple(leaves[square].shape)} for layers with batch_first=False",
            remedy="record a module whose forward takes samples first and transposes (x.transpose(0, 1)), or build the "
            "layers with batch_first=True",
        )


def _outputs(model: nn.Module, inputs: Any, index: int, axis: int | None) -> Tensor | None:
    """The first tensor of the outputs, where entry 1 along an axis of an input is its neighbour's."""
    leaves = list(trees.leaves(inputs))
    if axis is not None:
        order = torch.arange(leaves[index].shape[axis], device=leaves[index].device)
        order[1] = 0
        leaves[index] = leaves[index].index_select(axis, order)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = trees.leaves(run_model(model, trees.rebuilt(inputs, iter([t.to(device) for t in leaves]))))
    return found[0] if found and found[0].ndim else None


def _changed(one: Tensor, other: Tensor, axis: int) -> set[int]:
    """The entries along an axis in which two tensors differ, by more than rounding."""
    if axis >= one.ndim:
        return set()
    difference = (one.double() - other.double()).abs().movedim(axis, 0).reshape(one.shape[axis], -1).amax(1)
    return set((difference > 1e-5 * float(one.abs().max())).nonzero().flatten().tolist())
