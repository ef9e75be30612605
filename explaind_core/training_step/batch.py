"""What a step's gradient was of: its micro-batches, as they were declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from explaind_core.errors import QuestionError
from explaind_core.training_step.forward_state import ForwardState
from explaind_core.training_step.input_rows import InputRows

__all__ = ["Batch", "MicroBatch"]


@dataclass(frozen=True)
class MicroBatch:
    """One declared batch.

    Attributes:
        ids: which training samples it holds, int64 ``[n]``.
        inputs: what the model was called with, as declared.
        targets: the loss's second argument, as declared.
        weight: the factor of its loss.
        forward: how the model stood when it was passed through; None where no pass was seen.
        rows: what was said of which rows of the inputs belong to which sample.
    """

    ids: Tensor
    inputs: Any
    targets: Any
    weight: float
    forward: ForwardState | None = None
    rows: InputRows = field(default_factory=InputRows)


@dataclass(frozen=True)
class Batch:
    """All micro-batches whose gradients one step was fed.

    Attributes:
        micro: in the order in which they were declared.
    """

    micro: tuple[MicroBatch, ...]

    @property
    def ids(self) -> Tensor:
        """The ids of all its samples, in order; a sample that stands twice appears twice."""
        return torch.cat([m.ids for m in self.micro])

    def _only(self) -> MicroBatch:
        if len(self.micro) != 1:
            raise QuestionError(
                f"this step has {len(self.micro)} micro-batches", remedy="loop over .micro: each has inputs and targets"
            )
        return self.micro[0]

    @property
    def inputs(self) -> Any:
        """The inputs, where the step has one micro-batch."""
        return self._only().inputs

    @property
    def targets(self) -> Any:
        """The targets, where the step has one micro-batch."""
        return self._only().targets
