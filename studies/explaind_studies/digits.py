"""Small images for the CNN, scikit-learn's handwritten digits, and the paper's training of it (appendix C.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core.progress import bar

__all__ = ["Images", "Schedule", "accuracy", "batches", "digits", "enlarged_digits", "train_cnn"]


@dataclass(frozen=True)
class Images:
    """A task of classification.

    Attributes:
        train_images: float32 ``[n, channels, h, w]``.
        train_targets: int64 ``[n]``.
        test_images: float32 ``[m, channels, h, w]``.
        test_targets: int64 ``[m]``.
    """

    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor


def enlarged_digits() -> tuple[Tensor, Tensor]:
    """All of them, in scikit-learn's order, with pixels 0 to 16: float32 ``[1797, 1, 16, 16]``, int64 ``[1797]``.

    Every pixel is repeated twice in both directions: 8 x 8 are fewer than the network needs.

    Example:
        >>> pixels, targets = enlarged_digits()
        >>> pixels.shape, int(pixels.max()), targets.unique().tolist() == list(range(10))
        (torch.Size([1797, 1, 16, 16]), 16, True)
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images).float().unsqueeze(1)
    return pixels.repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(found.target).long()


def batches(size: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Ids, every one once an epoch, in a new order each; the last batch of an epoch is what is left.

    Args:
        size: how many samples there are.
        batch: samples in a batch.
        epochs: how often every sample is taken.
        generator: draws the orders.

    Example:
        >>> [len(ids) for ids in batches(5, 2, 2, torch.Generator())]
        [2, 2, 1, 2, 2, 1]
    """
    for _ in range(epochs):
        yield from torch.split(torch.randperm(size, generator=generator), batch)


def digits(seed: int = 0, *, test: int = 360) -> Images:
    """The 1,797 digits of scikit-learn, 8 x 8, every pixel repeated twice in both directions; grey values 0 to 1.

    Args:
        seed: of the split.
        test: how many are not trained on.

    Example:
        >>> task = digits()
        >>> task.train_images.shape, task.test_images.shape
        (torch.Size([1437, 1, 16, 16]), torch.Size([360, 1, 16, 16]))
    """
    pixels, targets = enlarged_digits()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    images, targets = pixels[order].div(16), targets[order]
    return Images(images[test:], targets[test:], images[:test], targets[:test])


@dataclass(frozen=True)
class Schedule:
    """SGD with momentum, and a learning rate that rises to a peak and falls again: the paper's training of its CNN.

    Attributes:
        epochs: passes over the data.
        batch: samples in a batch.
        rate: the highest learning rate.
        peak_epoch: at the end of which epoch it is reached, starting and ending at zero; None for a constant rate.
        momentum: of SGD.
        weight_decay: of SGD.
        whole: whether only whole batches are taken; the last one of an epoch is smaller otherwise.
    """

    epochs: int = 12
    batch: int = 64
    rate: float = 0.1
    peak_epoch: int | None = 5
    momentum: float = 0.9
    weight_decay: float = 0.005
    whole: bool = False

    def batches(self, n: int, seed: int) -> list[Tensor]:
        """Ids of the batches of all epochs, drawn from n samples.

        Example:
            >>> [len(ids) for ids in Schedule(epochs=2, batch=3).batches(7, 0)]
            [3, 3, 1, 3, 3, 1]
        """
        drawn = batches(n, self.batch, self.epochs, torch.Generator().manual_seed(seed))
        return [ids for ids in drawn if len(ids) == self.batch or not self.whole]

    def rates(self, steps: int) -> list[float]:
        """The learning rates of so many steps: the triangle's, in the middle of each step.

        Example:
            >>> [round(rate, 3) for rate in Schedule(epochs=3, peak_epoch=1).rates(3)]
            [0.05, 0.075, 0.025]
        """
        if self.peak_epoch is None:
            return [self.rate] * steps
        knots = [0, steps * min(self.peak_epoch, self.epochs) / self.epochs, steps]
        return [float(rate) for rate in np.interp(np.arange(steps) + 0.5, knots, [0, self.rate, 0])]


def accuracy(model: nn.Module, images: Tensor, targets: Tensor) -> float:
    """Fraction of samples whose argmax is right."""
    with torch.no_grad():
        decided = torch.cat([model(images[i : i + 256]).argmax(1) for i in range(0, len(images), 256)])
        return float((decided == targets).double().mean())


def train_cnn(
    task: Images, path: Path, model: nn.Module, schedule: Schedule, *, seed: int = 0, progress: bool = True
) -> None:
    """Train ``model`` in place and record it at ``path``, from the start.

    Metrics: ``loss`` of each batch before its step; ``train_accuracy`` and ``test_accuracy`` at the end.

    Args:
        seed: of the order of samples.
    """
    loss = nn.NLLLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=schedule.rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    drawn = schedule.batches(len(task.train_images), seed)
    with (
        # What a kill left here is short of its end, and quick to make again.
        explaind.Recorder(
            path, model, optimizer, loss, train_size=len(task.train_images), overwrite=path.exists()
        ) as recorder,
        bar() as display,
    ):
        line = display.add_task("training", total=len(drawn), note="", visible=progress)
        for ids, rate in zip(drawn, schedule.rates(len(drawn)), strict=True):
            images, targets = task.train_images[ids], task.train_targets[ids]
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            value = loss(model(images), targets)
            value.backward()
            recorder.batch(images, targets, ids=ids)
            optimizer.step()
            recorder.log(loss=value.item())
            display.update(line, advance=1, note=f"loss {value.item():.3f}")
        recorder.log(
            train_accuracy=accuracy(model, task.train_images, task.train_targets),
            test_accuracy=accuracy(model, task.test_images, task.test_targets),
        )
