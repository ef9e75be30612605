"""What was seen of one step while it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from explaind_core.recording.inner_iterations import Evaluation

__all__ = ["SeenStep"]


@dataclass
class SeenStep:
    """What was seen of a step.

    Attributes:
        gradients: by parameter, as the optimizer was fed them.
        groups: the hyper-parameters of every group, before it.
        evaluations: the calls of its closure, where the optimizer iterates inside a step.
        clips: how the gradients were clipped, in order.
        buffers_before: buffers that did not stand where the last step left them when the model was called.
        recomputation: what else is needed to compute the gradients again, as JSON.
        stepped: which of several optimizers made it; empty for one.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    clips: list[list[Any]] = field(default_factory=list)
    buffers_before: dict[str, Tensor] = field(default_factory=dict)
    recomputation: dict[str, Any] = field(default_factory=dict)
    stepped: list[int] = field(default_factory=list)
