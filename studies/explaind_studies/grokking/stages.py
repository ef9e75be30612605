"""Stages of grokking, found from a run's own accuracy curves: where the paper's step numbers lie in another run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

__all__ = ["CHECKPOINTS", "PAPER_STAGES", "Stages", "find_stages"]

#: The steps before which the paper looks at kernels and similarities (Figures 4 to 6).
PAPER_STAGES = (250, 500, 1100, 1900)
#: Figure 8's checkpoints.
CHECKPOINTS = (339, 539, 1139, 1539, 1739, 1839, 1939)
#: When the paper's run has memorised, and when it ends with 100 % test accuracy.
_MEMORISED, _GENERALISED = 800, 1939


@dataclass(frozen=True)
class Stages:
    """The two events that a run's clock is set by.

    Attributes:
        memorised: the first step after which training accuracy is at least ``train_level``.
        generalised: the first after which test accuracy is at least ``test_level``.
        last: the run's last step.
        train_level: 99 %, or 99 % of the highest accuracy there is where a run does not get there.
        test_level: 100 % (or all but one sample in a thousand), or 99 % of the highest accuracy there is where a run
            does not get there.
        grokked: whether the run got there in both.
    """

    memorised: int
    generalised: int
    last: int
    train_level: float
    test_level: float
    grokked: bool

    def at(self, paper_step: int) -> int:
        """The step of this run that corresponds to a step of the paper's: linear between the events, and within it.

        Example:
            >>> Stages(400, 1000, 1000, 0.99, 0.999, True).at(400), Stages(800, 1939, 1939, 0.99, 0.999, True).at(1100)
            (200, 1100)
        """
        if paper_step <= _MEMORISED:
            step = paper_step * self.memorised / _MEMORISED
        else:
            rate = (self.generalised - self.memorised) / (_GENERALISED - _MEMORISED)
            step = self.memorised + (paper_step - _MEMORISED) * rate
        return int(min(max(round(step), 1), self.last))

    def window(self, paper_step: int, length: int) -> range:
        """The ``length`` steps that end with :meth:`at`, or as many as there are."""
        stop = max(self.at(paper_step), min(length, self.last))
        return range(max(1, stop - length + 1), stop + 1)


def find_stages(metrics: xr.Dataset) -> Stages:
    """Of a run whose ``train_accuracy`` and ``test_accuracy`` were recorded by step.

    Example:
        >>> step = np.arange(1, 11)
        >>> metrics = xr.Dataset({"train_accuracy": ("step", np.minimum(1, step / 5)),
        ...                       "test_accuracy": ("step", np.minimum(1, step / 9))}, coords={"step": step})
        >>> find_stages(metrics)
        Stages(memorised=5, generalised=9, last=10, train_level=0.99, test_level=0.999, grokked=True)
    """
    steps = metrics.step.values
    memorised, train_level, one = _first(steps, metrics.train_accuracy.values, 0.99)
    generalised, test_level, other = _first(steps, metrics.test_accuracy.values, 0.999)
    return Stages(memorised, max(generalised, memorised), int(steps[-1]), train_level, test_level, one and other)


def _first(steps: np.ndarray, accuracy: np.ndarray, level: float) -> tuple[int, float, bool]:
    reached = bool(np.nanmax(accuracy) >= level)
    level = level if reached else 0.99 * float(np.nanmax(accuracy))
    return int(steps[int(np.argmax(accuracy >= level))]), level, reached
