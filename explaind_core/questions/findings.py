"""What is found on the way to an answer, and must be said with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Findings"]

_TOGETHER = "the whole batch is in the forward pass of every share"
_LOSS_COUPLES = (
    "the loss couples samples: a share is the gradient through a sample's own outputs, and that of its own loss term "
    'another one (shares="loss_terms", for a loss that returns one number per sample)'
)


@dataclass(frozen=True)
class Findings:
    """What was found while a part of an answer was computed; parts are joined by ``one | later``.

    Attributes:
        tail_dropped: before which steps what is remembered of gradients was below rounding, and dropped; None for none.
        gradient_factor: the smallest and the largest factor between a fed gradient and that of its samples.
        entries_clipped: how many entries of gradients were clipped one by one; None where none ever is.
        samples_together: whether samples are coupled in the forward pass, so that all are in that of every share.
        unattributed_gradient: the largest relative size of what no sample explains of a gradient; None where that is
            refused.
        unattributed_largest: the largest entry of the term that this makes, in units of the output; None where
            there is no such term.
        gradients_by: how samples' gradients were taken, where not by ``torch.func``, vectorised.
        loss_couples: whether the loss couples samples, so that a share through a sample's own outputs is not the
            gradient of its own loss term.

    Example:
        >>> (Findings(gradient_factor=(0.5, 1.0)) | Findings(gradient_factor=(0.7, 2.0))).attributes()
        {'gradient_factor': [0.5, 2.0]}
    """

    tail_dropped: str | None = None
    gradient_factor: tuple[float, float] | None = None
    entries_clipped: int | None = None
    samples_together: bool = False
    unattributed_gradient: float | None = None
    unattributed_largest: float | None = None
    loss_couples: bool = False
    gradients_by: str | None = None

    def __or__(self, later: Findings) -> Findings:
        factors = [f for pair in (self.gradient_factor, later.gradient_factor) if pair is not None for f in pair]
        clipped = [n for n in (self.entries_clipped, later.entries_clipped) if n is not None]
        return Findings(
            tail_dropped=self.tail_dropped if later.tail_dropped is None else later.tail_dropped,
            gradient_factor=(min(factors), max(factors)) if factors else None,
            entries_clipped=sum(clipped) if clipped else None,
            samples_together=self.samples_together or later.samples_together,
            loss_couples=self.loss_couples or later.loss_couples,
            gradients_by=self.gradients_by or later.gradients_by,
            unattributed_gradient=_larger(self.unattributed_gradient, later.unattributed_gradient),
            unattributed_largest=_larger(self.unattributed_largest, later.unattributed_largest),
        )

    def attributes(self) -> dict[str, Any]:
        """What a result says of it: nothing of what was not found."""
        found = {
            "tail_dropped": self.tail_dropped,
            "gradient_factor": None if self.gradient_factor is None else list(self.gradient_factor),
            "entries_clipped": self.entries_clipped,
            "samples_together": _TOGETHER if self.samples_together else None,
            "sample_gradients": self.gradients_by,
            "loss_couples_samples": _LOSS_COUPLES if self.loss_couples else None,
            "unattributed_gradient": self.unattributed_gradient,
            "unattributed_largest": self.unattributed_largest,
        }
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Findings:
        """Those that a result's attributes say.

        Args:
            attributes: of a result.

        Example:
            >>> Findings.of({"dtype": "float32", "entries_clipped": 3})
            Findings(tail_dropped=None, gradient_factor=None, entries_clipped=3, samples_together=False,
            unattributed_gradient=None, unattributed_largest=None, loss_couples=False, gradients_by=None)
        """
        factor = attributes.get("gradient_factor")
        return cls(
            tail_dropped=attributes.get("tail_dropped"),
            gradient_factor=None if factor is None else (factor[0], factor[1]),
            entries_clipped=attributes.get("entries_clipped"),
            samples_together="samples_together" in attributes,
            loss_couples="loss_couples_samples" in attributes,
            gradients_by=attributes.get("sample_gradients"),
            unattributed_gradient=attributes.get("unattributed_gradient"),
            unattributed_largest=attributes.get("unattributed_largest"),
        )


def _larger(one: float | None, other: float | None) -> float | None:
    sizes = [size for size in (one, other) if size is not None]
    return max(sizes) if sizes else None
