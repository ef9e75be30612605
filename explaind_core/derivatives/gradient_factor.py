"""Whether the gradient that a step was fed is that of its declared samples, up to one factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from explaind_core.errors import RecordingError
from explaind_core.tensors import tolerance

__all__ = ["clipped", "fit_factor", "nearest_factor"]


def fit_factor(
    fed: Mapping[str, Tensor],
    total: Mapping[str, Tensor],
    noise: Callable[[], Mapping[str, float]],
    *,
    step: int,
    declared: float = 1.0,
    limit: float | None = None,
) -> float:
    """The factor c with ``fed = c total``, by least squares over all parameters together.

    Where single entries were clipped, ``fed = clamp(c total, -limit, limit)``, and c is that of the other entries.

    Every tensor must then agree: ``||fed_n - c total_n|| <= tolerance ||fed_n|| + rounding``, with the tolerance
    1e-9 for float64 and 1e-3 for float32. Where gradients of samples cancel, or a loss is so small that its
    derivative is mostly rounding, a sum that is computed in another order is another sum; only there ``noise`` is
    asked for. If c is then not determined by the gradients, the declared factor is used where it fits.

    Args:
        fed: parameter name -> what the optimizer was fed; a name without a gradient is left out.
        total: parameter name -> the sum of the samples' gradients.
        noise: called where it is needed; the size of the rounding error of each tensor of ``total``.
        step: s, for the error.
        declared: what the factor should be.
        limit: the largest entry of ``fed``, where entries were clipped; None where they were not.

    Raises:
        RecordingError: there is no such factor.

    Example:
        >>> fit_factor({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 4.0])}, dict, step=1)
        0.5
    """
    for name, gradient in total.items():
        if name not in fed and bool((gradient != 0).any()):
            raise RecordingError(
                "the optimizer was fed no gradient for a parameter that the declared samples have one for",
                where=f"parameter {name!r}, step {step}",
                expected=f"a gradient; the samples' has norm {gradient.norm():.3g}",
                got="none",
                remedy="freeze the parameter when the run is opened as it was frozen in training, or pass its loss",
            )
    pairs = _pairs(fed, total)
    norms = {n: (float(g.norm()), float(t.norm())) for n, (g, t) in pairs.items()}
    fed_size, size = (math.hypot(*(pair[i] for pair in norms.values())) for i in (0, 1))
    if fed_size == size == 0:
        return declared
    c = _least_squares(pairs, limit, declared)

    def excess(factor: float, rounding: Mapping[str, float]) -> dict[str, float]:
        """By how much each tensor's error exceeds its bound, as a multiple of it."""
        found = {}
        for n, (g, t) in pairs.items():
            error, bound = (
                float((g - clipped(factor * t, limit)).norm()),
                tolerance(total[n].dtype) * norms[n][0] + rounding[n],
            )
            found[n] = 0.0 if error <= bound else error / bound if bound else math.inf
        return found

    # A tensor whose gradient is zero but for rounding (the bias of a key in attention) is measured by the others.
    over = excess(c, {n: 16 * torch.finfo(total[n].dtype).eps * fed_size for n in pairs})
    if any(over.values()) and size:
        rounding = noise()
        # Of two factors that both fit, the declared one is meant. Another one must stand out of the rounding.
        clear = math.hypot(*(rounding[n] for n in pairs)) <= 0.01 * size
        for factor in (declared, c) if clear else (declared,):
            over = excess(factor, {n: abs(factor) * rounding[n] for n in pairs})
            if not any(over.values()):
                return factor
    if not any(over.values()):
        return c
    worst = max(over, key=lambda n: over[n])
    g, t = pairs[worst]
    difference = float((g - clipped(c * t, limit)).norm())
    raise RecordingError(
        "the gradient that the step was fed is not that of its declared samples",
        where=f"step {step}, parameter {worst!r} (and {sum(map(bool, over.values())) - 1} others)",
        expected=f"{c:.6g} times the gradient of the declared batch's loss, of norm {abs(c) * norms[worst][1]:.6g}",
        got=f"a gradient of norm {norms[worst][0]:.6g} that differs from it by {difference:.3g}",
        remedy="check the loss passed to open_run (a term of the parameters alone goes to open_run(..., penalty=)); "
        "that recorder.batch got the inputs, targets and weight of every backward pass, and the values that the model "
        "was called with; that clipping by value was told (recorder.clipped(value=...)); or say "
        'unattributed="carry": what the samples do not explain is then a term of its own, with its size',
    )


def _pairs(fed: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {n: (fed[n].to_dense().to(t).double(), t.double()) for n, t in total.items() if n in fed}


def nearest_factor(
    fed: Mapping[str, Tensor], total: Mapping[str, Tensor], *, declared: float = 1.0, limit: float | None = None
) -> float:
    """The factor c that makes ``c total`` most like ``fed``, by least squares, whether it fits or not.

    Args:
        fed: parameter name -> what the optimizer was fed.
        total: parameter name -> the sum of the samples' gradients.
        declared: what the factor is where every entry was clipped.
        limit: the largest entry of ``fed``, where entries were clipped; None where they were not.

    Example:
        >>> nearest_factor({"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([1.0, 1.0])})
        2.0
    """
    return _least_squares(_pairs(fed, total), limit, declared)


def _least_squares(pairs: Mapping[str, tuple[Tensor, Tensor]], limit: float | None, declared: float) -> float:
    product = square = 0.0
    for g, t in pairs.values():
        free = g.abs() < limit * (1 - 1e-6) if limit is not None else torch.ones_like(g, dtype=torch.bool)
        product, square = product + float((g * t)[free].sum()), square + float((t * t)[free].sum())
    if square:
        return product / square
    return 0.0 if limit is None else declared  # every entry was clipped


def clipped(values: Tensor, limit: float | None) -> Tensor:
    """``values``, none of them larger than ``limit``.

    Example:
        >>> clipped(torch.tensor([-3.0, 1.0]), 2.0)
        tensor([-2.,  1.])
    """
    return values if limit is None else values.clamp(-limit, limit)
