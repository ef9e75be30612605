"""What a loop says of the gradient of its coming step: by what it was multiplied, and how it was clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from explaind_core.errors import NonFiniteError, RecordingError

__all__ = ["DeclaredClipping"]


@dataclass
class DeclaredClipping:
    """What a loop declared of the coming step's gradient.

    Attributes:
        factor: by what it was multiplied after ``backward()``.
        clips: how it was clipped, in order: ``["norm", limit, type]`` or ``["value", limit]``.

    Example:
        >>> declared = DeclaredClipping()
        >>> declared.clipped(1, norm=1.0, found=4.0)
        >>> round(declared.factor, 6), declared.clips
        (0.25, [['norm', 1.0, 2.0]])
        >>> _ = declared.take()
        >>> declared
        DeclaredClipping(factor=1.0, clips=[])
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
        """Add a clipping; see :meth:`explaind_core.Recorder.clipped`.

        Args:
            step: the number of the coming step, for the error.
            norm: the largest norm that was left.
            norm_type: of which norm.
            value: the largest entry that was left.
            found: the norm before, where it is known.

        Raises:
            RecordingError: neither a norm nor a value is given.
        """
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
        """Multiply the factor; see :meth:`explaind_core.Recorder.gradient_factor`.

        Args:
            step: the number of the coming step, for the error.
            factor: what the gradient was multiplied by.

        Raises:
            NonFiniteError: it is NaN or infinite.
        """
        if not math.isfinite(factor):
            raise NonFiniteError("the gradient factor is not finite", where=f"step {step}", got=factor)
        self.factor *= float(factor)

    def take(self) -> tuple[float, list[list[Any]]]:
        """Take what was declared, and forget it: nothing is declared of the step after.

        Returns:
            ``(factor, clips)``.
        """
        declared = self.factor, self.clips
        self.factor, self.clips = 1.0, []
        return declared

    def __bool__(self) -> bool:
        """Whether anything was declared."""
        return self.factor != 1.0 or bool(self.clips)
