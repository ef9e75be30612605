"""Li et al. (2017): filters of the smallest L1 norm are pruned, the same share in every layer, then retrained."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from explaind_studies.digits import batches
from explaind_studies.pruning.setting import Setting, Task
from explaind_studies.pruning.training import sgd
from explaind_studies.resnet import ResNet9

__all__ = [
    "GROUPS",
    "Channels",
    "apply",
    "channel_counts",
    "filter_masks",
    "pruned_filters",
    "retrain",
    "smallest_left_out",
]


@dataclass(frozen=True)
class Channels:
    """Channels that are pruned together.

    Attributes:
        makers: the convolutions whose filters make them: several where a residual block adds to a shortcut. The first
            is the shortcut's, and chooses (as Li et al. have it).
        readers: the convolutions that read them.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]


#: All channels of the network. Those of ``layer4`` are read by the output layer, which is spared.
GROUPS = (
    Channels(("layer1.0",), ("layer2.0",)),
    Channels(("layer2.0", "residual1.block2.0"), ("residual1.block1.0", "layer3.0")),
    Channels(("residual1.block1.0",), ("residual1.block2.0",)),
    Channels(("layer3.0", "residual2.block2.0"), ("residual2.block1.0", "layer4.0")),
    Channels(("residual2.block1.0",), ("residual2.block2.0",)),
    Channels(("layer4.0",), ()),
)


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    return module


def filter_masks(model: ResNet9, kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """Which entries are left when only those channels are: name -> bool of the parameter's shape; not of the head.

    A filter goes with its bias and with what reads its channel.

    Args:
        kept: bool ``[channels]`` for each of ``GROUPS``.

    Example:
        >>> model = ResNet9(width=1)
        >>> masks = filter_masks(model, [torch.ones(n, dtype=torch.bool) for n in (1, 2, 2, 4, 4, 2)])
        >>> sum(int(mask.sum()) for mask in masks.values()) == sum(p.numel() for p in model.parameters()) - 4
        True
    """
    masks = {
        name: torch.ones(parameter.shape, dtype=torch.bool)
        for name, parameter in model.named_parameters()
        if not name.startswith("head.")
    }
    for group, channels in zip(GROUPS, kept, strict=True):
        for name in group.makers:
            masks[f"{name}.weight"][~channels] = False
            masks[f"{name}.bias"][~channels] = False
        for name in group.readers:
            masks[f"{name}.weight"][:, ~channels] = False
    return masks


def _size(model: ResNet9, counts: Iterable[int]) -> int:
    """Parameters, without the head's, of the network with so many channels in each of ``GROUPS``."""
    sizes = list(zip(GROUPS, counts, strict=True))
    made = {name: n for group, n in sizes for name in group.makers}
    read = {name: n for group, n in sizes for name in group.readers}
    return sum(
        n
        * read.get(name, _convolution(model, "layer1.0").in_channels)
        * math.prod(_convolution(model, name).kernel_size)
        + n
        for name, n in made.items()
    )


def channel_counts(model: ResNet9, fraction: float) -> list[int]:
    """How many channels of each of ``GROUPS`` to keep: the same share of all, such that ``fraction`` is pruned.

    Shares are rounded to whole channels, at least one; of all shares the one whose fraction of pruned parameters is
    nearest to ``fraction``.

    Example:
        >>> channel_counts(ResNet9(width=8), 0.9)
        [3, 5, 5, 10, 10, 5]
    """
    widths = [_convolution(model, group.makers[0]).out_channels for group in GROUPS]
    whole = _size(model, widths)
    # The number of channels changes only where the share times a width passes a half.
    shares = sorted({(k + 0.5) / n for n in widths for k in range(n)} | {1.0})
    options: set[tuple[int, ...]] = {tuple(max(1, math.floor(share * n + 0.5)) for n in widths) for share in shares}
    return list(min(sorted(options), key=lambda counts: abs(1 - _size(model, counts) / whole - fraction)))


def smallest_left_out(model: ResNet9, counts: Sequence[int], kept: Sequence[Tensor]) -> list[Tensor]:
    """The channels whose filters have the largest L1 norms, so many in each of ``GROUPS``, of those kept so far."""
    chosen = []
    for group, count, before in zip(GROUPS, counts, kept, strict=True):
        norms = _convolution(model, group.makers[0]).weight.detach().abs().sum((1, 2, 3))
        norms = torch.where(before, norms, -1.0)  # what was pruned does not come back
        left = torch.zeros_like(before)
        left[norms.argsort(descending=True, stable=True)[:count]] = True
        chosen.append(left)
    return chosen


def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what the masks leave out to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def retrain(model: ResNet9, masks: Mapping[str, Tensor], task: Task, setting: Setting, seed: int) -> None:
    """Train what is left, in place, at a constant learning rate; what is pruned stays zero.

    Args:
        model: pruned.
        masks: name -> bool of the parameter's shape, what is left.
        task: the images.
        setting: of the study.
        seed: of the order of samples.
    """
    assert setting.batch is not None
    optimizer, loss = sgd(model, setting, setting.retrain_rate), nn.NLLLoss()
    generator = torch.Generator().manual_seed(seed)
    for ids in batches(len(task.train_images), setting.batch, setting.retrain_epochs, generator):
        optimizer.zero_grad()
        loss(model(task.train_images[ids]), task.train_targets[ids]).backward()
        optimizer.step()
        apply(model, masks)


def pruned_filters(model: ResNet9, task: Task, setting: Setting, seed: int) -> Iterator[tuple[float, ResNet9]]:
    """Level after level: prune filters, retrain, go on from there.

    Yields:
        The fraction of parameters that is pruned, the head's not counted, and the network, at each of the levels.
    """
    model = copy.deepcopy(model)
    kept = [torch.ones(_convolution(model, group.makers[0]).out_channels, dtype=torch.bool) for group in GROUPS]
    seeds = np.random.SeedSequence([seed, 1]).generate_state(len(setting.levels))
    for level, order in zip(setting.levels, seeds, strict=True):
        kept = smallest_left_out(model, channel_counts(model, level), kept)
        masks = filter_masks(model, kept)
        apply(model, masks)
        retrain(model, masks, task, setting, int(order))
        left = sum(int(mask.sum()) for mask in masks.values())
        yield 1 - left / sum(mask.numel() for mask in masks.values()), model
