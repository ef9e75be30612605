"""How large a run will be, before it is recorded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import StoreError
from explaind_core.rules import each_optimizer
from explaind_core.store.folder_contents import exists
from explaind_core.store.locations import is_local, reason
from explaind_core.store.readable_size import readable_size

__all__ = ["StoreSize", "check_space", "store_size"]

#: Bytes of a file's header, and of every tensor's entry in it beside its name, which stands there twice.
_HEADER, _ENTRY = 12000, 320
#: Copies of the parameters that an optimizer's state is taken to hold before its first step.
_STATES = 3


@dataclass(frozen=True)
class StoreSize:
    """Bytes on disk; before compression, so that it will be less.

    Attributes:
        per_step: a step's file.
        fixed: the start of the run.
        snapshot: the optimizer's state, each time it is kept.
        batch: inputs and targets of a batch; batches of the same content are stored once.
        steps: how many.
        total: all.

    Example:
        >>> print(StoreSize(per_step=2000, fixed=500, snapshot=800, batch=0, steps=10, total=20500))
        at most 20.5 kB for 10 steps (2 kB a step, 800 B a snapshot, 0 B a batch)
    """

    per_step: int
    fixed: int
    snapshot: int
    batch: int
    steps: int
    total: int

    def __str__(self) -> str:
        step, snapshot, batch, total = (
            readable_size(size, disk=True) for size in (self.per_step, self.snapshot, self.batch, self.total)
        )
        return f"at most {total} for {self.steps} steps ({step} a step, {snapshot} a snapshot, {batch} a batch)"


def store_size(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    steps: int,
    *,
    mode: str = "steps",
    snapshot_every: int = 100,
    batch: Any = None,
    distinct_batches: int | None = None,
) -> StoreSize:
    """How large the run of a training will be at most, before compression.

    A step holds the parameters that are trained and, with ``mode="steps"``, as many gradients; the model's buffers,
    should they change; one copy more for optimizers that evaluate the model elsewhere (Schedule-Free). States of
    optimizers that have not stepped yet are taken to be three times as large as the parameters.

    Args:
        model: what is trained.
        optimizer: one, or a list of several.
        steps: how often they step.
        mode: as of :class:`~explaind_core.Recorder`.
        snapshot_every: as of the Recorder.
        batch: inputs and targets of one step (nested tensors); without them batches are not counted.
        distinct_batches: how many batches differ in content; all of them by default.

    Returns:
        The sizes of its parts, and of all.

    Example:
        >>> model = torch.nn.Linear(1000, 1000)
        >>> print(store_size(model, torch.optim.SGD(model.parameters(), lr=0.1), 100))
        at most 830 MB for 100 steps (8.02 MB a step, 12 MB a snapshot, 0 B a batch)
    """
    optimizers = each_optimizer(optimizer)
    held = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    entries = sum(_ENTRY + 3 * (len(name) + 16) for name in names)
    trained, everything = _bytes(held.values()), _bytes([*model.parameters(), *model.buffers()])
    buffers = _bytes(model.buffers())
    states = [t for o in optimizers for entry in o.state.values() for t in trees.leaves(dict(entry))]
    state = _bytes(states) if states else _STATES * trained
    position = trained + buffers
    per_step = _HEADER + entries + {"steps": position + trained + entries, "parameters": position}.get(mode, entries)
    snapshot = _HEADER + 4 * entries + state + (position if mode == "snapshots" else 0)
    fixed = 2 * _HEADER + 5 * entries + everything + state
    content = 0 if batch is None else _HEADER + _bytes(trees.leaves(batch))
    total = fixed + steps * per_step + steps // snapshot_every * snapshot
    total += content * (steps if distinct_batches is None else distinct_batches)
    return StoreSize(per_step, fixed, snapshot, content, steps, total)


def check_space(path: Path, size: StoreSize) -> None:
    """Refuse a run that the disk has no room for.

    Args:
        path: where the run will lie; elsewhere than on this machine nobody can tell.
        size: of the run.

    Raises:
        StoreError: it has not.
    """
    if not is_local(path):  # elsewhere nobody tells
        return
    folder = next(p for p in (path, *path.absolute().parents) if exists(p))
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise StoreError(
            f"nobody can tell how much room there is: {reason(error)}", where=folder, remedy="leave out expected_steps="
        ) from error
    if size.total > free:
        raise StoreError(
            "the run may not fit on the disk",
            where=path,
            expected=size,
            got=f"{readable_size(free, disk=True)} free",
            remedy="free some space, choose another path, record with mode='parameters' or mode='snapshots'; or leave "
            "out expected_steps=: compressed, it will be smaller",
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
