"""What the windows of a question sum up to, whichever strategy computed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from explaind_core.questions.findings import Findings
from explaind_core.questions.question import AXES, GRADIENT_AXES, Question
from explaind_core.tensors import tolerance

__all__ = ["Contribution", "WindowSum"]

#: The axes of one window's terms.
INNER = AXES[1:]
#: Of the largest layer's kernel, or of what f changed by: what sums over samples and outputs round, in units of eps.
_ROUNDING = 64


def waived(dtype: torch.dtype) -> float:
    """What samples may leave of the kernel of a layer, of its largest entry, before that is a term of its own.

    Args:
        dtype: of the model.

    Example:
        >>> f"{waived(torch.float64):.0e}", f"{waived(torch.float32):.0e}"
        ('1e-11', '1e-05')
    """
    return tolerance(dtype) / 100  # of what their gradients are compared with


@dataclass
class Contribution:
    """What one window added to the explained function. Arrays are float64 over the kept axes, step left out.

    Attributes:
        window: its position.
        terms: term -> influences.
        residual: over (test, output) as far as kept.
        omitted: what restrictions left out, over the same.
        statistics: what buffers added that moved, over the same.
        nodes: of the quadrature, summed over the window's segments.
        evaluations: nodes evaluated, refinements included.
        converged: whether all segments met the tolerance.
        update_error: the largest of its steps (see decompose).
        correction: the largest secant of its steps.
        missed: how many segments did not meet the tolerance.
        gram: ``[L', n, n]``, inner products of the kernel's tensors over steps, parameters and entries, if wanted.
        findings: what was found on the way to it, since the contribution before it.
    """

    window: int
    terms: Mapping[str, Tensor]
    residual: Tensor
    omitted: Tensor
    statistics: Tensor
    nodes: int
    evaluations: int
    converged: bool
    update_error: float
    correction: float
    missed: int = 0
    gram: Tensor | None = None
    findings: Findings = field(default_factory=Findings)


@dataclass
class WindowSum:
    """Adds up one window, step by step.

    Every array has all inner axes in order, of size 1 where an axis is not kept; ``samples`` is how many test
    samples it is about, if not all.
    """

    question: Question
    window: int
    outputs: int
    names: Sequence[str]
    samples: int | None = None
    terms: dict[str, Tensor] = field(init=False)
    change: Tensor = field(init=False)
    omitted: Tensor = field(init=False)
    gap: Tensor = field(init=False)
    statistics: Tensor = field(init=False)
    nodes: int = 0
    evaluations: int = 0
    converged: bool = True
    update_error: float = 0.0
    correction: float = 0.0
    missed: int = 0
    gram: Tensor | None = None
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        sizes = self.question.sizes(self.outputs)
        sizes["test"] = self.samples if self.samples is not None else sizes["test"]
        full = [sizes[axis] if axis in self.question.keep else 1 for axis in INNER]
        plain = [1 if axis in GRADIENT_AXES else n for axis, n in zip(INNER, full, strict=True)]
        self.terms = {
            name: torch.zeros(full if name == "kernel" else plain, dtype=torch.float64) for name in self.names
        }
        edge = (full[-2], full[-1])
        self.change, self.omitted, self.gap, self.statistics = (
            torch.zeros(edge, dtype=torch.float64) for _ in range(4)
        )

    def count(self, *, nodes: int, evaluations: int, converged: bool) -> None:
        """Note what a segment's quadrature took."""
        self.nodes += nodes
        self.evaluations += evaluations
        self.converged &= converged
        self.missed += not converged

    def note(self, *, update_error: float, correction: float) -> None:
        """Note how well a step is explained."""
        self.update_error = max(self.update_error, update_error)
        self.correction = max(self.correction, correction)

    def finish(self) -> Contribution:
        """The sum, over the kept axes; what nothing explains is the residual."""
        largest = self._left()
        total = self.omitted + self.statistics
        for term in self.terms.values():
            total += term.sum(tuple(range(term.ndim - 2)))
        keep = self.question.keep
        return Contribution(
            window=self.window,
            terms={
                n: _squeezed(t, INNER, keep, gone=() if n == "kernel" else GRADIENT_AXES) for n, t in self.terms.items()
            },
            residual=_squeezed(self.change - total, AXES[-2:], keep),
            omitted=_squeezed(self.omitted + self.gap, AXES[-2:], keep),
            statistics=_squeezed(self.statistics, AXES[-2:], keep),
            nodes=self.nodes,
            evaluations=self.evaluations,
            converged=self.converged,
            update_error=self.update_error,
            correction=self.correction,
            missed=self.missed,
            gram=self.gram,
            findings=self.findings | Findings(unattributed_largest=largest),
        )

    def _left(self) -> float | None:
        """The largest entry of what samples leave of the kernel; None where that is rounding, which the residual takes.

        It is more than that where gradients are zero but for rounding (a bias before a normalisation), and the
        optimizer divides by their size. A layer whose kernel cancels is measured by the rounding of the others.
        """
        left = self.terms.get("unattributed")
        if left is None:
            return None
        whole = left + self.terms["kernel"].sum((0, 3), keepdim=True)
        sizes, scales = (t.abs().transpose(0, 1).flatten(1).amax(1) for t in (left, whole))
        dtype = self.question.function.dtype
        rounding = _ROUNDING * torch.finfo(dtype).eps * torch.maximum(scales.max(), self.change.abs().max())
        bounds = torch.maximum(waived(dtype) * scales, rounding)
        if not self.question.forgives and bool((sizes <= bounds).all()):
            left.zero_()
            return None
        return float(left.abs().max())


def _squeezed(values: Tensor, axes: Sequence[str], keep: Sequence[str], *, gone: Sequence[str] = ()) -> Tensor:
    shape = [n for axis, n in zip(axes, values.shape, strict=True) if axis in keep and axis not in gone]
    return values.reshape(shape)
