"""Accuracy and divergence of pruned networks, level by level, for every way of pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.func import functional_call

from explaind_core.errors import QuestionError
from explaind_studies.pruning.filters import pruned_filters
from explaind_studies.pruning.setting import Setting, Task
from explaind_studies.pruning.training import accuracy, outputs
from explaind_studies.resnet import ResNet9

__all__ = [
    "FILTERS",
    "IMPORTANCE",
    "MAGNITUDE",
    "METHODS",
    "RANDOM",
    "curves",
    "divergence",
    "kept",
    "loaded",
    "pruned",
]

IMPORTANCE, FILTERS, MAGNITUDE, RANDOM = "importance", "Li et al. (2017)", "magnitude", "random"
METHODS = (IMPORTANCE, FILTERS, MAGNITUDE, RANDOM)


def kept(scores: Tensor, fraction: float) -> Tensor:
    """Which entries are kept when that fraction, rounded to whole entries, is pruned: the largest; bool ``[D']``.

    Of equal scores, those that stand first are kept.

    Example:
        >>> kept(torch.tensor([1.0, 3.0, 2.0, 3.0]), 0.75)
        tensor([False,  True, False, False])
    """
    count = len(scores) - round(fraction * len(scores))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[scores.argsort(descending=True, stable=True)[:count]] = True
    return mask


def loaded(model: ResNet9, theta: Tensor) -> ResNet9:
    """``model`` with the parameters ``[D]``, one behind the other; in place."""
    torch.nn.utils.vector_to_parameters(theta, model.parameters())
    return model


def pruned(model: ResNet9, mask: Tensor) -> dict[str, Tensor]:
    """The parameters with zeros where the mask ``[D']`` says so; it does not cover the output layer, the last one.

    Raises:
        QuestionError: the mask has another length.
    """
    names = [name for name, _ in model.named_parameters()]
    assert names[-1] == "head.weight"  # so that the mask covers the first D' entries
    sizes = [model.get_parameter(name).numel() for name in names[:-1]]
    if sum(sizes) != len(mask):
        raise QuestionError("the mask does not fit", where="mask", expected=sum(sizes), got=len(mask))
    parts = dict(zip(names[:-1], torch.split(mask, sizes), strict=True))
    return {
        name: parameter.detach() * parts[name].reshape(parameter.shape) if name in parts else parameter.detach()
        for name, parameter in model.named_parameters()
    }


def divergence(full: Tensor, other: Tensor) -> float:
    """``KL(full || other)``, the mean over samples of log-probabilities ``[n, classes]``.

    Example:
        >>> same = torch.tensor([[0.25, 0.75]]).log()
        >>> divergence(same, same), round(divergence(same, same.flip(1)), 4)
        (0.0, 0.5493)
    """
    full, other = full.double(), other.double()
    return float((full.exp() * (full - other)).sum(1).mean())


def _call(model: ResNet9, parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    values: Tensor = functional_call(model, parameters, (images,))
    return values


def curves(model: ResNet9, importance: Tensor, task: Task, setting: Setting, seed: int) -> xr.Dataset:
    """Every way of pruning at every level, evaluated on the images kept for that.

    Args:
        model: trained.
        importance: float64 ``[D']``, of all parameters but the output layer's.
        task: the images.
        setting: of the study.
        seed: of the random choice, and of the order of samples in retraining.

    Returns:
        ``accuracy``, ``kl`` and ``pruned`` (the fraction that is zero, the output layer not counted) over
        (way, level).
    """
    full = outputs(model, task.test_images)
    found: dict[str, list[tuple[float, float, float]]] = {
        method: [
            (fraction, accuracy(values, task.test_targets), divergence(full, values)) for fraction, values in networks
        ]
        for method, networks in _networks(model, importance, task, setting, seed).items()
    }
    table = np.array([found[method] for method in METHODS])
    dims = ("way", "level")
    return xr.Dataset(
        {"pruned": (dims, table[..., 0]), "accuracy": (dims, table[..., 1]), "kl": (dims, table[..., 2])},
        coords={"way": list(METHODS), "level": list(setting.levels)},
    )


def _networks(
    model: ResNet9, importance: Tensor, task: Task, setting: Setting, seed: int
) -> Mapping[str, Iterator[tuple[float, Tensor]]]:
    """Method -> (fraction pruned, log-probabilities) at each of the levels."""
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 2]).generate_state(1)[0]))
    # One order for all levels: what is kept at a level is a part of what is kept at the one before.
    scores = {
        IMPORTANCE: importance,
        MAGNITUDE: theta[: len(importance)].abs(),
        RANDOM: torch.randperm(len(importance), generator=generator),
    }

    def ranked(ranking: Tensor) -> Iterator[tuple[float, Tensor]]:
        for level in setting.levels:
            mask = kept(ranking, level)
            values = outputs(partial(_call, model, pruned(model, mask)), task.test_images)
            yield 1 - float(mask.double().mean()), values

    def retrained() -> Iterator[tuple[float, Tensor]]:
        for fraction, smaller in pruned_filters(model, task, setting, seed):
            yield fraction, outputs(smaller, task.test_images)

    return {FILTERS: retrained(), **{method: ranked(ranking) for method, ranking in scores.items()}}
