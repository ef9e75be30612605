"""Whether a loss couples samples: whether what one sample's outputs add to it depends on another's.

A sample's share of a gradient is then no longer one thing. The gradient through its own outputs, of the whole loss, and
the gradient of its own loss term, through everybody's outputs, add up to the same, and differ sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["couples", "one_per_sample"]

#: Of the largest derivative: what may differ by rounding, in units of eps.
_ROUNDING = 1000.0


def one_per_sample(value: Tensor, n: int) -> bool:
    """Whether a loss returned one number for each of n samples, and not one for all."""
    return value.ndim > 0 and value.numel() == n


@torch.enable_grad()
def couples(loss: Callable[[Sequence[Tensor]], Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether a loss couples the samples of a batch, as far as it can be seen at these outputs.

    Of a loss with one term per sample, ``d(sum_k w_k term_k) / d o_i`` is compared with ``w_i d(sum_k term_k) / d o_i``
    for uneven weights: they are the same for all i only where no term depends on another sample's outputs. Of a loss
    that is one number, half of the samples are given their neighbours' outputs: the derivatives by the others' outputs
    stay where nothing is coupled. Where all samples have the same outputs, that shows nothing.

    Args:
        loss: of the outputs, 0-d or one number per sample.
        outputs: of a batch of n samples, those that have a derivative, ``[n, ...]`` each.

    Example:
        >>> couples(lambda o: o[0].square().mean(), [torch.tensor([1.0, 2.0])])
        False
        >>> couples(lambda o: (o[0] - o[0].mean()).square().mean(), [torch.tensor([1.0, 2.0])])
        True
    """
    n = len(outputs[0]) if outputs else 0
    if n < 2:
        return False
    cut = [o.detach().requires_grad_() for o in outputs]
    value = loss([o.clone() for o in cut])
    if not value.requires_grad:
        return False
    plain = _gradients(value.sum(), cut, retain=True)
    if one_per_sample(value, n):
        weights = torch.linspace(0.5, 1.5, n, dtype=value.dtype, device=value.device)
        weighted = _gradients((value.reshape(n) * weights).sum(), cut)
        pairs = [(w, g * weights.reshape(-1, *[1] * (g.ndim - 1)).to(g)) for w, g in zip(weighted, plain, strict=True)]
        return any(_differ(one, other) for one, other in pairs)
    half = (n + 1) // 2
    swapped = [torch.cat([o[1 : half + 1], o[half:]]).detach().requires_grad_() for o in outputs]
    other_value = loss([o.clone() for o in swapped])
    if not other_value.requires_grad:
        return True
    moved = _gradients(other_value, swapped)
    return any(_differ(a[half:], b[half:]) for a, b in zip(moved, plain, strict=True))


def _gradients(value: Tensor, cut: Sequence[Tensor], *, retain: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(value, list(cut), retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(o) if g is None else g for o, g in zip(cut, found, strict=True)]


def _differ(one: Tensor, other: Tensor) -> bool:
    size = float(torch.maximum(one.abs().max(), other.abs().max())) if one.numel() else 0.0
    if not size or not torch.isfinite(torch.tensor(size)):
        return False
    return float((one - other).abs().max()) > _ROUNDING * torch.finfo(one.dtype).eps * size
