"""Which kernels torch computes attention with, where its derivatives are wanted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from explaind_core.derivatives.ordinary_autograd import NOTHING_FLOWS

__all__ = ["differentiable_kernels"]


@contextmanager
def differentiable_kernels(*, forward_mode: bool = True) -> Iterator[None]:
    """Fused attention kernels have no forward-mode derivative: use the plain ones, of the same value.

    Args:
        forward_mode: False where backward passes are to be those of training to the last bit: kernels are then chosen
            as torch chooses them.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    kernels = sdpa_kernel(SDPBackend.MATH) if forward_mode else nullcontext()
    try:
        with kernels, torch.no_grad(), warnings.catch_warnings():
            # vmap says so of every operator that it has no rule for; the numbers are the same.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            # Nothing has to flow where values are asked for; where derivatives are, that is an error.
            warnings.filterwarnings("ignore", NOTHING_FLOWS, UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
