r"""Test feature maps, contracted with an update: directional derivatives along a step.

phi_s(x) = integral_0^1 df/dtheta(theta_{s-1} + t Delta_s; x) dt  is never formed. Its product with a tangent v is
``sum_j w_j Df(theta_{s-1} + t_j Delta_s; x)[v]`` for quadrature nodes t_j, one forward-mode derivative each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from explaind_core import trees
from explaind_core.errors import QuestionError
from explaind_core.outputs import Output, flat_rows, run_model

__all__ = ["ExplainedFunction", "gauss_legendre"]

Parameters = Mapping[str, Tensor]


@lru_cache
def gauss_legendre(q: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights ``(t_j, w_j)`` of the q-point Gauss-Legendre rule on [0, 1].

    Example:
        >>> gauss_legendre(1)
        ((0.5, 1.0),)
    """
    t, w = np.polynomial.legendre.leggauss(q)
    return tuple(zip(((t + 1) / 2).tolist(), (w / 2).tolist(), strict=True))


@contextmanager
def _differentiable_kernels() -> Iterator[None]:
    """Fused attention kernels have no forward-mode derivative: use the plain ones, of the same value."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class ExplainedFunction:
    """The explained function f of some test samples: its values and its directional derivatives.

    Buffers are held at their values after the last step, so that f depends on the parameters alone; the model
    runs in evaluation mode. Test samples are worked off in chunks that fit the processor's cache.

    Args:
        model: the architecture, used through ``functional_call`` only.
        buffers: its buffers. inputs: the test samples. output: what is explained. chunk: samples at a time.

    Raises:
        QuestionError: the inputs have no samples, or the output does not fit them.
    """

    def __init__(self, model: nn.Module, buffers: Parameters, inputs: Any, output: Output, *, chunk: int = 500) -> None:
        self.model, self.output = model, output
        reference = next(model.parameters())
        self.device, self.dtype = reference.device, reference.dtype
        self.buffers = {n: b.to(self.device) for n, b in buffers.items()}
        self.inputs = trees.map_tensors(lambda t: t.detach().to(self.device), inputs)
        sizes = {len(t) if t.ndim else 0 for t in trees.leaves(self.inputs)}
        if len(sizes) != 1 or 0 in sizes:
            raise QuestionError(
                "the test inputs are not a batch",
                where="inputs",
                expected="tensors with the same, non-zero number of samples",
                got=sorted(sizes) or type(inputs).__name__,
            )
        self.samples = sizes.pop()
        output.check(model, self.samples)
        self.chunks = [slice(a, min(a + chunk, self.samples)) for a in range(0, self.samples, chunk)]
        #: False once vmap could not vectorise this model; its derivatives are then taken one by one.
        self.vectorized = True

    def at(self, theta: Parameters) -> dict[str, Tensor]:
        """Parameters on the model's device, each with its own storage (views cost jvp their whole storage)."""
        return {n: t.to(self.device) for n, t in theta.items()}

    def _evaluate(self, theta: Parameters, rows: slice) -> Tensor:
        def call(inputs: Any) -> Any:
            return run_model(lambda *a, **k: functional_call(self.model, {**theta, **self.buffers}, a, k), inputs)

        chunk = trees.map_tensors(lambda t: t[rows], self.inputs)
        return flat_rows(self.output.values(self.model, call, chunk, rows), rows.stop - rows.start)

    def values(self, theta: Parameters) -> Tensor:
        """``f(theta)``: ``[n, J]`` in float64."""
        theta = self.at(theta)
        with _differentiable_kernels():
            return torch.cat([self._evaluate(theta, rows).double().cpu() for rows in self.chunks])

    def derivatives(self, theta: Parameters, tangents: Sequence[Parameters]) -> Tensor:
        """``Df(theta)[v]`` for tangents v over a few parameters, the others held constant.

        A tangent is zero for parameters that only other tangents name.

        Returns:
            ``[len(tangents), n, J]`` in float64.
        """
        theta = self.at(theta)
        point = {n: t for n, t in theta.items() if any(n in v for v in tangents)}
        stacked = {n: t.new_zeros((len(tangents), *t.shape)) for n, t in point.items()}
        for index, tangent in enumerate(tangents):
            for n, t in tangent.items():
                stacked[n][index] = t
        with _differentiable_kernels():
            return torch.cat([self._chunk(theta, point, stacked, rows).double().cpu() for rows in self.chunks], dim=1)

    def _chunk(self, theta: Parameters, point: Parameters, stacked: Parameters, rows: slice) -> Tensor:
        def along(tangent: Parameters) -> Tensor:
            derivative: Tensor = jvp(lambda p: self._evaluate({**theta, **p}, rows), (point,), (tangent,))[1]
            return derivative

        count = len(next(iter(stacked.values())))
        if self.vectorized and count > 1:
            try:
                vectorised: Tensor = vmap(along)(stacked)
                return vectorised
            except RuntimeError:
                # Some models cannot run under vmap (data-dependent control flow, operators without a
                # batching rule). One by one gives the same numbers; a real error shows up there again.
                self.vectorized = False
        return torch.stack([along({n: t[i].clone() for n, t in stacked.items()}) for i in range(count)])
