"""What the pruning study depends on, and the images of one of its runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from explaind_core.errors import QuestionError
from explaind_studies.cifar import cifar2
from explaind_studies.digits import enlarged_digits

__all__ = ["LEVELS", "PAPER", "QUICK", "Setting", "Task", "images"]

#: Fractions of parameters pruned: the marks of Figure 2, as far as they can be read.
LEVELS = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.97, 0.99)


@dataclass(frozen=True)
class Setting:
    """A pruning experiment. Network and training are those of appendix C.1.

    Attributes:
        data: the folder of CIFAR-10's python files; None for scikit-learn's digits.
        seed: of the first run; the others count on from it. It draws the split, the initialisation, the batches and the
            random choice.
        seeds: how many runs.
        width: channels of the network's first layer; None for 64 with CIFAR-10, and 8 with digits.
        batch: samples in a batch; None for 256 with CIFAR-10, and 32 with digits.
        epochs: passes over the data.
        peak: the learning rate's highest value, to which it rises from 0; it falls to 0 at the end.
        peak_epoch: at the end of which epoch it gets there.
        momentum: of SGD.
        weight_decay: of SGD.
        scored: how many samples importance is summed over; they are not in training, and accuracy is not measured on
            them.
        nodes: of the quadrature, per step.
        samples_at_once: scored in one pass over the run.
        levels: fractions of parameters pruned, rising.
        retrain_epochs: passes over the data in retraining; a quarter of the epochs, after Li et al.
        retrain_rate: the constant learning rate of retraining, after Li et al.
    """

    data: str | None = None
    seed: int = 0
    seeds: int = 5
    width: int | None = None
    batch: int | None = None
    epochs: int = 12
    peak: float = 0.1
    peak_epoch: int = 5
    momentum: float = 0.9
    weight_decay: float = 0.005
    scored: int = 10
    nodes: int = 1
    samples_at_once: int = 10
    levels: tuple[float, ...] = LEVELS
    retrain_epochs: int = 3
    retrain_rate: float = 0.001

    def resolved(self) -> Setting:
        """With the width and the batch size of the data set.

        Raises:
            QuestionError: the levels do not rise between 0 and 1, or something is asked for no times.

        Example:
            >>> setting = Setting().resolved()
            >>> setting.width, setting.batch
            (8, 32)
        """
        if any(not 0 < level < 1 for level in self.levels) or list(self.levels) != sorted(set(self.levels)):
            raise QuestionError("the levels do not rise", where="levels", expected="0 < ... < 1", got=self.levels)
        if min(self.seeds, self.scored, self.epochs, self.samples_at_once, len(self.levels)) < 1:
            raise QuestionError("a number of the pruning study is not positive", where="setting", got=self)
        width, batch = (8, 32) if self.data is None else (64, 256)
        return replace(self, width=self.width or width, batch=self.batch or batch)


PAPER = Setting()
QUICK = Setting(seeds=2, width=4)


@dataclass(frozen=True)
class Task:
    """The images of one run: to train on, to score parameters with, and to evaluate pruned networks on.

    Shapes: ``*_images`` float32 ``[n, channels, h, w]``, ``*_targets`` int64 ``[n]``.
    """

    train_images: Tensor
    train_targets: Tensor
    score_images: Tensor
    score_targets: Tensor
    test_images: Tensor
    test_targets: Tensor
    classes: int

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.train_images.shape[1]


#: Of the 1,797 digits.
_DIGITS_TRAINED = 1200


def images(setting: Setting, seed: int) -> Task:
    """The images of the run with that seed.

    Digits: 1,200 to train on, the same share of every class, every pixel repeated twice in both directions, so that the
    16 x 16 are as many as the network needs. CIFAR-10: the training files' cats and dogs, in their order. What is not
    trained on is split in two, class by class. Less the training images' mean, over their deviation.

    Raises:
        QuestionError: more samples are to be scored than there are besides some to evaluate on.
        StoreError: the files cannot be read.

    Example:
        >>> task = images(Setting(scored=50), seed=0)
        >>> task.train_images.shape, len(task.score_images), len(task.test_images)
        (torch.Size([1200, 1, 16, 16]), 50, 547)
    """
    if setting.data is not None:
        cifar = cifar2(setting.data)
        trained, others = (cifar.train_images, cifar.train_targets), (cifar.test_images, cifar.test_targets)
    else:
        trained, others = _digits(seed)
    classes = int(trained[1].max()) + 1
    if not classes <= setting.scored <= len(others[1]) - classes:
        raise QuestionError(
            "that many samples cannot be scored",
            where="scored",
            expected=f"{classes} (one a class) to {len(others[1]) - classes}",
            got=setting.scored,
        )
    first, second = _stratified(others[1], setting.scored, seed)
    return Task(*trained, others[0][first], others[1][first], others[0][second], others[1][second], classes)


def _digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    pixels, targets = enlarged_digits()
    first, second = _stratified(targets, _DIGITS_TRAINED, seed)
    normalised = (pixels - pixels[first].mean()) / pixels[first].std()
    return (normalised[first], targets[first]), (normalised[second], targets[second])


def _stratified(targets: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of indices: ``size`` drawn, the same share of every class, and the rest."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(range(len(targets)), train_size=size, random_state=seed, stratify=targets)
    return torch.tensor(first), torch.tensor(second)
