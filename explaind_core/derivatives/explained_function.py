r"""Test feature maps, contracted with an update: directional derivatives along a step.

phi_s(x) = integral_0^1 df/dtheta(theta_{s-1} + t Delta_s; x) dt  is never formed. Its product with a tangent v is
``sum_j w_j Df(theta_{s-1} + t_j Delta_s; x)[v]`` for quadrature nodes t_j, one forward-mode derivative each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from explaind_core import trees
from explaind_core.derivatives.outputs import Output, Rows, flat_rows
from explaind_core.errors import ExplaindError, QuestionError
from explaind_core.training_step import run_model

__all__ = ["ExplainedFunction", "FunctionAtStep", "differentiable_kernels"]

Parameters = Mapping[str, Tensor]


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
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


class ExplainedFunction:
    """The explained function f of some test samples, at every step of training.

    What depends on a step are the buffers: they are held, at their values after the last step or, where these moved in
    training, at those after the step that is asked for. :meth:`at` gives f at a step, which has values and derivatives.
    The model runs in evaluation mode. Test samples are worked off in chunks that fit the processor's cache.

    Args:
        model: the architecture, used through ``functional_call`` only.
        buffers: its buffers.
        inputs: the test samples.
        output: what is explained.
        chunk: samples at a time.
        rows: which of the given samples are explained, all by default.
        buffers_at: its buffers after a step, where they moved.

    Raises:
        QuestionError: the inputs have no samples, or the output does not fit them.
    """

    def __init__(
        self,
        model: nn.Module,
        buffers: Parameters,
        inputs: Any,
        output: Output,
        *,
        chunk: int = 500,
        rows: Sequence[int] | None = None,
        buffers_at: Callable[[int], Parameters] | None = None,
    ) -> None:
        self.model, self.output = model, output
        self._buffers_at = buffers_at
        #: Step -> buffers, of the two steps whose were read last: those at the ends of a segment.
        self._moved: dict[int, dict[str, Tensor]] = {}
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        reference = next(model.parameters())
        self.device, self.dtype = reference.device, reference.dtype
        self._buffers = self.on_device(buffers)
        self.inputs = trees.map_tensors(lambda t: t.detach().to(self.device), inputs)
        sizes = {len(t) if t.ndim else 0 for t in trees.leaves(self.inputs)}
        if len(sizes) != 1 or 0 in sizes:
            raise QuestionError(
                "the test inputs are not a batch",
                where="inputs",
                expected="tensors with the same, non-zero number of samples",
                got=sorted(sizes) or type(inputs).__name__,
            )
        given = sizes.pop()
        output.check(model, given)
        #: Which of the given samples are explained, in order.
        self.rows = torch.arange(given) if rows is None else torch.tensor(rows, dtype=torch.int64)
        self.all_rows = rows is None
        self.samples, self.chunk = len(self.rows), chunk
        self.chunks = self.pieces(slice(0, self.samples))
        #: J, once the function was evaluated.
        self.outputs = 1
        #: False once vmap could not vectorise this model; its derivatives are then taken one by one.
        self.vectorized = True
        #: The same for backward passes, sample by sample and output by output.
        self.rows_vectorized = True
        # torch's rule for PReLU's slope mixes up samples and outputs, vmap inside vmap, where they are as many.
        self.outputs_vectorized = not any(isinstance(module, nn.PReLU) for module in model.modules())
        #: Test samples that one backward pass takes together.
        self.rows_together: int | None = 64

    @property
    def moves(self) -> bool:
        """Whether the buffers moved in training, and f with them."""
        return self._buffers_at is not None

    def at(self, step: int | None = None) -> FunctionAtStep:
        """The function with the buffers after a step, where these moved; without a step, with the given ones.

        Args:
            step: s.
        """
        if self._buffers_at is None or step is None:
            return FunctionAtStep(self, self._buffers)
        if step not in self._moved:
            found = self.on_device(self._buffers_at(step))
            self._moved = dict([*self._moved.items()][-1:]) | {step: found}
        return FunctionAtStep(self, self._moved[step])

    def on_device(self, tensors: Parameters) -> dict[str, Tensor]:
        """Tensors on the model's device, each with its own storage (views cost jvp their whole storage)."""
        return {n: t.to(self.device) for n, t in tensors.items()}

    def pieces(self, block: slice) -> list[slice]:
        """A block of test samples, cut into chunks that fit the processor's cache."""
        return [slice(a, min(a + self.chunk, block.stop)) for a in range(block.start, block.stop, self.chunk)]

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """OneDNN's recurrent layers have no derivative in evaluation mode, as they keep nothing for one."""
        enabled = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = enabled and not self._recurrent  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.backends.mkldnn.enabled = enabled


@dataclass(frozen=True)
class FunctionAtStep:
    """The explained function at a step: its values and its derivatives, as functions of the parameters alone.

    Attributes:
        function: f at every step, which this one shares everything with but the buffers.
        buffers: those that are held.
    """

    function: ExplainedFunction
    buffers: Parameters

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.function.dtype

    def on_device(self, theta: Parameters) -> dict[str, Tensor]:
        """Parameters on the model's device, for those who evaluate at one point more than once."""
        return self.function.on_device(theta)

    @property
    def samples(self) -> int:
        """How many test samples there are."""
        return self.function.samples

    @property
    def outputs(self) -> int:
        """J, once the function was evaluated."""
        return self.function.outputs

    def _evaluate(self, theta: Parameters, block: slice) -> Tensor:
        rows = block if self.function.all_rows else self.function.rows[block].to(self.function.device)
        return self._evaluate_rows(theta, rows, block.stop - block.start)

    def _evaluate_rows(self, theta: Parameters, rows: Rows, count: int) -> Tensor:
        def call(inputs: Any) -> Any:
            with self.function.kernels():
                state = {**theta, **self.buffers}
                return run_model(lambda *a, **k: functional_call(self.function.model, state, a, k), inputs)

        chunk = trees.map_tensors(lambda t: t[rows], self.function.inputs)
        return flat_rows(self.function.output.values(self.function.model, call, chunk, rows), count)

    def values(self, theta: Parameters, block: slice | None = None) -> Tensor:
        """``f(theta)``: ``[n, J]`` in float64.

        Args:
            theta: the parameters.
            block: of the test samples, all by default.
        """
        theta = self.function.on_device(theta)
        pieces = self.function.chunks if block is None else self.function.pieces(block)
        with differentiable_kernels():
            values = torch.cat([self._evaluate(theta, rows).double().cpu() for rows in pieces])
        self.function.outputs = values.shape[1]
        return values

    def count_outputs(self, theta: Parameters) -> int:
        """J, from one test sample: all of them may take more memory than their number is worth.

        Args:
            theta: the parameters.
        """
        try:
            with differentiable_kernels():
                self.function.outputs = self._evaluate(self.function.on_device(theta), slice(0, 1)).shape[1]
        except ExplaindError:  # as it is said of all samples
            self.values(theta)
        return self.function.outputs

    def derivatives(self, theta: Parameters, tangents: Sequence[Parameters], block: slice | None = None) -> Tensor:
        """``Df(theta)[v]`` for tangents v over a few parameters, the others held constant.

        A tangent is zero for parameters that only other tangents name.

        Args:
            theta: the parameters.
            tangents: parameter name -> tensor, each.
            block: of the test samples, all by default.

        Returns:
            ``[len(tangents), n, J]`` in float64.
        """
        theta = self.function.on_device(theta)
        point = {n: t for n, t in theta.items() if any(n in v for v in tangents)}
        stacked = {n: t.new_zeros((len(tangents), *t.shape)) for n, t in point.items()}
        for index, tangent in enumerate(tangents):
            for n, t in tangent.items():
                stacked[n][index] = t
        with differentiable_kernels():
            pieces = self.function.chunks if block is None else self.function.pieces(block)
            return torch.cat([self._chunk(theta, point, stacked, rows).double().cpu() for rows in pieces], dim=1)

    def _chunk(self, theta: Parameters, point: Parameters, stacked: Parameters, rows: slice) -> Tensor:
        def along(tangent: Parameters) -> Tensor:
            derivative: Tensor = jvp(lambda p: self._evaluate({**theta, **p}, rows), (point,), (tangent,))[1]
            return derivative

        count = len(next(iter(stacked.values())))
        if self.function.vectorized and count > 1:
            try:
                vectorised: Tensor = vmap(along)(stacked)
                return vectorised
            except RuntimeError:
                # Some models cannot run under vmap (data-dependent control flow, operators without a
                # batching rule). One by one gives the same numbers; a real error shows up there again.
                self.function.vectorized = False
        return torch.stack([along({n: t[i].clone() for n, t in stacked.items()}) for i in range(count)])

    # ------------------------------------------------------------------ reverse mode
    def jacobian(
        self,
        theta: Parameters,
        names: Sequence[str],
        block: slice,
        *,
        sum_test: bool,
        sum_outputs: bool,
        columns: slice = slice(None),
    ) -> dict[str, Tensor]:
        """``df / dtheta`` of a block of test samples, by backward passes, with respect to a few parameters.

        Args:
            theta: the parameters.
            names: those with respect to which; the others are held constant.
            block: which test samples.
            sum_test: sum over the samples before differentiating, which costs a row the less.
            sum_outputs: sum over the outputs before differentiating.
            columns: of which outputs, all by default.

        Returns:
            Parameter name -> ``[n or 1, J or 1, *shape]`` in the model's dtype, on its device.
        """
        theta = self.function.on_device(theta)
        point = {n: theta[n] for n in names}
        with differentiable_kernels():
            if sum_test:
                first, *others = [
                    self._pulled_sum(theta, point, piece, sum_outputs, columns) for piece in self.function.pieces(block)
                ]
                return {n: sum((other[n] for other in others), first[n]) for n in names}
            return self._pulled_rows(theta, point, block, sum_outputs, columns)

    def _pulled_sum(
        self, theta: Parameters, point: Parameters, piece: slice, sum_outputs: bool, columns: slice
    ) -> dict[str, Tensor]:
        def summed(p: Parameters) -> Tensor:
            values = self._evaluate({**theta, **p}, piece).sum(0)
            return values.sum(0, keepdim=True) if sum_outputs else values[columns]

        return {n: g.unsqueeze(0) for n, g in self._pull(summed, point).items()}

    def _pulled_rows(
        self, theta: Parameters, point: Parameters, block: slice, sum_outputs: bool, columns: slice
    ) -> dict[str, Tensor]:
        def one(row: Tensor) -> dict[str, Tensor]:
            def values(p: Parameters) -> Tensor:
                found = self._evaluate_rows({**theta, **p}, row.reshape(1), 1)[0]
                return found.sum(0, keepdim=True) if sum_outputs else found[columns]

            return self._pull(values, point)

        rows = self.function.rows[block].to(self.function.device)
        if self.function.rows_vectorized:
            try:
                # vmap cuts the samples itself: all of their activations and derivatives need not fit at once.
                found: dict[str, Tensor] = vmap(one, chunk_size=self.function.rows_together)(rows)
                return found
            except RuntimeError:
                self.function.rows_vectorized = False
        each = [one(row) for row in rows]
        return {n: torch.stack([e[n] for e in each]) for n in point}

    def _pull(self, values: Callable[[Parameters], Tensor], point: Parameters) -> dict[str, Tensor]:
        """One backward pass per output: ``[J, *shape]``."""
        result: Tensor
        result, pull = vjp(values, dict(point))  # type: ignore[misc]  # (three with has_aux)
        if len(result) == 1:
            found: dict[str, Tensor] = pull(torch.ones_like(result))[0]
            return {n: g.unsqueeze(0) for n, g in found.items()}
        basis = torch.eye(len(result), dtype=result.dtype, device=result.device)
        if self.function.outputs_vectorized:
            try:
                every: dict[str, Tensor] = vmap(lambda c: pull(c)[0])(basis)
                return every
            except RuntimeError:
                self.function.outputs_vectorized = False
        each = [pull(row)[0] for row in basis]
        return {n: torch.stack([e[n] for e in each]) for n in point}
