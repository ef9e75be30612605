"""Some entries of what a model returned, by which another function with its parameters is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from explaind_core import trees

__all__ = ["differ_beyond_rounding", "keeps_outputs", "output_entries"]

#: Outputs that are looked at, tensors of each, and entries of each tensor: spread over all samples.
_TENSORS, _ENTRIES = 8, 64
#: What the same function may differ by on another machine or compiled, of the entries' norm: units of rounding, and at
#: most that much where these are coarse.
_ROUNDING, _COARSE = 1024.0, 0.05


def keeps_outputs(step: int, snapshot_every: int) -> bool:
    """Whether a step's outputs are kept: the first one behind a snapshot, and those whose number is a power of two.

    Args:
        step: its number, from 1.
        snapshot_every: of the recording.

    Example:
        >>> [step for step in range(1, 30) if keeps_outputs(step, 10)]
        [1, 2, 4, 8, 11, 16, 21]
    """
    return step & (step - 1) == 0 or (step - 1) % snapshot_every == 0


def output_entries(output: Any) -> dict[str, Tensor]:
    """Entries at equal distances of every real tensor in an output.

    Args:
        output: whatever a model returned.

    Returns:
        By its key, or its place in a tuple of so many: float64 ``[k]``, k at most 512, in main memory.

    Example:
        >>> output_entries({"logits": torch.arange(3.0), "names": ["a"]})
        {'logits': tensor([0., 1., 2.], dtype=torch.float64)}
        >>> {name: len(entries) for name, entries in output_entries((torch.zeros(1000, 7), torch.zeros(2))).items()}
        {'0 of 2': 64, '1 of 2': 2}
    """
    parts = {"output": output}
    if isinstance(output, Mapping):
        parts = {str(key): value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        parts = {f"{place} of {len(output)}": value for place, value in enumerate(output)}
    found = {name: _entries(part) for name, part in list(parts.items())[:_TENSORS]}
    return {name: entries for name, entries in found.items() if entries is not None}


def _entries(part: Any) -> Tensor | None:
    """Those of what stands under one name."""
    found = [t.detach() for t in trees.leaves(part) if t.is_floating_point() and t.layout == torch.strided]
    if not found or any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in found):
        return None
    flat = [t.reshape(-1) for t in found[:_TENSORS]]
    return torch.cat([t[_spread(len(t), t.device)].double().cpu() for t in flat])


def _spread(size: int, device: torch.device) -> Tensor:
    """At most so many places, from the first to the last; in integers, as a float32 does not count to 2^24."""
    count = min(size, _ENTRIES)
    return torch.arange(count, device=device) * (size - 1) // max(count - 1, 1)


def differ_beyond_rounding(kept: Mapping[str, Tensor], now: Mapping[str, Tensor], unit: float) -> float:
    """By how much two models' outputs differ, where that is more than rounding.

    Outputs that only one of them has say nothing: a model that is given labels returns its loss, too.

    Args:
        kept: entries of the recorded output, as :func:`output_entries` returns them.
        now: of the one to compare.
        unit: of rounding: eps of the coarsest type that the model computed in.

    Returns:
        ``|now - kept| / |kept|`` of the output for which it is largest; infinite where entries are not as many, or not
        infinite at the same places; 0 where the difference may be rounding.

    Example:
        >>> differ_beyond_rounding({"output": torch.ones(4)}, {"output": torch.ones(4) + 1e-5}, unit=1.2e-7)
        0.0
        >>> round(differ_beyond_rounding({"output": torch.ones(4)}, {"output": torch.ones(4) + 1e-3}, unit=1.2e-7), 6)
        0.001
    """
    return max((_difference(kept[name], now[name], unit) for name in kept if name in now), default=0.0)


def _difference(kept: Tensor, now: Tensor, unit: float) -> float:
    if kept.shape != now.shape or not torch.equal(kept.isfinite(), now.isfinite()):
        return float("inf")
    finite = kept.isfinite()
    missed, size = float((now - kept)[finite].norm()), float(kept[finite].norm())
    if missed <= min(_ROUNDING * unit, _COARSE) * size:
        return 0.0
    return missed / size if size else float("inf")
