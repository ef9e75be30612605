"""What a loop says of the gradient of its coming step: by what it was multiplied, and how it was clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from explaind_core.errors import NonFiniteError, RecordingError

__all__ = ["Declared"]


@dataclass
class Declared:
    """Of the coming step's gradient.

    Attributes:
        factor: by what it was multiplied after ``backward()``. clips: how it was clipped, in order.

    Example:
        >>> declared = Declared()
        >>> declared.clipped(1, norm=1.0, found=4.0)
        >>> round(declared.factor, 6), declared.clips
        (0.25, [['norm', 1.0, 2.0]])
        >>> _ = declared.take()
        >>> declared
        Declared(factor=1.0, clips=[])
    """

    factor: float = 1.0
    clips: list[list[Any]] = field(default_factory=list)

    def clipped(
        self,
        step: int,
        *,
        norm: float | None = None,
        norm_type: float = 2.0,
        value: float | None = None,
        found: float | Tensor | None = None,
    ) -> None:
        """See :meth:`explaind_core.Recorder.clipped`."""
        if norm is None and value is None:
            raise RecordingError(
                "clipping has a norm or a value",
                where=f"step {step}",
                remedy="recorder.clipped(norm=1.0), or recorder.clipped(value=1.0)",
            )
        if norm is not None:
            self.clips.append(["norm", float(norm), float(norm_type)])
            # A norm that is not finite leaves no finite gradient: the step is refused, or a gradient scaler skips it.
            if found is not None and math.isfinite(found):
                self.factor *= min(1.0, float(norm) / (float(found) + 1e-6))
        if value is not None:
            self.clips.append(["value", float(value)])

    def multiplied(self, step: int, factor: float) -> None:
        """See :meth:`explaind_core.Recorder.gradient_factor`."""
        if not math.isfinite(factor):
            raise NonFiniteError("the gradient factor is not finite", where=f"step {step}", got=factor)
        self.factor *= float(factor)

    def take(self) -> tuple[float, list[list[Any]]]:
        """``(factor, clips)``, which are forgotten: nothing is said of the step after."""
        said = self.factor, self.clips
        self.factor, self.clips = 1.0, []
        return said

    def __bool__(self) -> bool:
        """Whether anything was said."""
        return self.factor != 1.0 or bool(self.clips)
