r"""Test feature maps, contracted with an update: directional derivatives along a step.

phi_s(x) = integral_0^1 df/dtheta(theta_{s-1} + t Delta_s; x) dt  is never formed. Its product with a tangent v is
``sum_j w_j Df(theta_{s-1} + t_j Delta_s; x)[v]`` for quadrature nodes t_j, one forward-mode derivative each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from explaind_core import trees
from explaind_core.derivatives.differentiable import Differentiable, Parameters
from explaind_core.derivatives.differentiator import Differentiator
from explaind_core.derivatives.global_random_state import undisturbed
from explaind_core.derivatives.habits import Habits
from explaind_core.derivatives.kernels import differentiable_kernels
from explaind_core.derivatives.module_attributes import ModuleAttributes
from explaind_core.derivatives.outputs import Output, Rows, flat_rows
from explaind_core.errors import ExplaindError
from explaind_core.training_step import InputRows, run_model

__all__ = ["ExplainedFunction", "FunctionAtStep"]

#: Test samples that one backward pass takes together where each is differentiated alone.
_ROWS_TOGETHER = 64


class ExplainedFunction:
    """The explained function f of some test samples, at every step of training.

    What depends on a step are the buffers: they are held, at their values after the last step or, where these moved in
    training, at those after the step that is asked for. :meth:`at` gives f at a step, which has values and derivatives.
    The model runs in evaluation mode. Test samples are worked off in chunks that fit the processor's cache, unless they
    are coupled: then all that were given pass the model together, whichever are asked for.

    Args:
        model: the architecture, used through ``functional_call`` only.
        buffers: its buffers.
        inputs: the test samples.
        output: what is explained.
        chunk: samples at a time.
        rows: which of the given samples are explained, all by default.
        buffers_at: its buffers after a step, where they moved.
        random_state: the seed that every evaluation of a random f begins with; samples then share their draws, and go
            together.

    Attributes:
        differentiator: takes its derivatives.
        together: whether the test samples are coupled.
        habits: what an evaluation must be guarded against.
        examined: whether both were found out, see :func:`explaind_core.derivatives.examine`.

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
        random_state: int | None = None,
    ) -> None:
        self.model, self.output, self.random_state = model, output, random_state
        self._buffers_at = buffers_at
        #: Step -> buffers, of the two steps whose were read last: those at the ends of a segment.
        self._moved: dict[int, dict[str, Tensor]] = {}
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        reference = next(model.parameters())
        self.device, self.dtype = reference.device, reference.dtype
        self._buffers = self.on_device(buffers)
        plain, self.input_rows = InputRows.split(inputs)
        self.inputs = trees.map_tensors(lambda t: t.detach().to(self.device), plain)
        given = self.input_rows.samples(self.inputs)
        output.check(model, given)
        #: Which of the given samples are explained, in order.
        self.rows = torch.arange(given) if rows is None else torch.tensor(rows, dtype=torch.int64)
        self.all_rows = rows is None
        self.samples, self.given, self.chunk = len(self.rows), given, chunk
        self.together, self.habits = random_state is not None or self.input_rows.ragged, Habits()
        self.examined = False
        #: J, once the function was evaluated.
        self.outputs = 1
        self.differentiator = Differentiator("the explained function")
        if any(isinstance(module, nn.PReLU) for module in model.modules()):
            self.differentiator.refuse_nested("torch's rule for PReLU's slope mixes samples and outputs up")

    @property
    def chunks(self) -> list[slice]:
        """All test samples asked for, in pieces that pass the model together."""
        return self.pieces(slice(0, self.samples))

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
        """A block of test samples, cut into chunks that fit the processor's cache; whole where samples are coupled."""
        if self.together:
            return [block]
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

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """An evaluation that finds, and leaves, everything but parameters and buffers as every other one does."""
        with ExitStack() as stack:
            stack.enter_context(self.kernels())
            if self.habits.draws or self.random_state is not None:
                stack.enter_context(undisturbed(self.device, self.random_state))
            if self.habits.needs_gradients:
                stack.enter_context(torch.enable_grad())
            if self.habits.keeps:
                stack.callback(ModuleAttributes(self.model, compared=False).restore)
            yield


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

    def block_values(self, theta: Parameters, block: slice) -> Tensor:
        """``[b, J]`` of a block of test samples; where samples are coupled, all that were given pass the model.

        Args:
            theta: the parameters, on the model's device.
            block: which test samples.
        """
        function = self.function
        if function.together:
            every = self._evaluate_rows(theta, slice(0, function.given), function.given)
            whole = function.all_rows and block == slice(0, function.given)
            return every if whole else every[function.rows[block].to(every.device)]
        rows = block if function.all_rows else function.rows[block].to(function.device)
        return self._evaluate_rows(theta, rows, block.stop - block.start)

    def _evaluate_rows(self, theta: Parameters, rows: Rows, count: int) -> Tensor:
        function, buffers = self.function, self.buffers
        if function.input_rows.ragged and count != function.given:
            return self._evaluate_rows(theta, slice(0, function.given), function.given)[rows]
        if function.habits.writes:
            buffers = {n: t.clone() for n, t in buffers.items()}
        state = {**theta, **buffers}

        def call(inputs: Any) -> Any:
            return run_model(lambda *a, **k: functional_call(function.model, state, a, k), inputs)

        chunk = function.input_rows.take(function.inputs, rows)
        with function.evaluating():
            return flat_rows(function.output.values(function.model, call, chunk, rows), count)

    def of_parameters(self, theta: Parameters, values: Callable[..., Tensor]) -> Differentiable:
        """A function of some parameters, and perhaps of a row, for the differentiator.

        Args:
            theta: all parameters, on the model's device.
            values: what it is of all of them.
        """
        return Differentiable(
            self.function.model,
            {**theta, **self.buffers},
            lambda parameters, *row: (values({**theta, **parameters}, *row),),
            around=self.function.kernels,
        )

    def values(self, theta: Parameters, block: slice | None = None) -> Tensor:
        """``f(theta)``: ``[n, J]`` in float64.

        Args:
            theta: the parameters.
            block: of the test samples, all by default.
        """
        theta = self.function.on_device(theta)
        pieces = self.function.chunks if block is None else self.function.pieces(block)
        with differentiable_kernels():
            values = torch.cat([self.block_values(theta, rows).detach().double().cpu() for rows in pieces])
        self.function.outputs = values.shape[1]
        return values

    def count_outputs(self, theta: Parameters) -> int:
        """J, from one test sample: all of them may take more memory than their number is worth.

        Args:
            theta: the parameters.
        """
        try:
            with differentiable_kernels(), torch.enable_grad():  # the model may take gradients itself
                self.function.outputs = self.alone(self.function.on_device(theta), slice(0, 1)).shape[1]
        except ExplaindError:
            self.values(theta)  # as it is said of all samples
            raise
        except (RuntimeError, IndexError, ValueError):  # nodes that are linked to others, statistics of a batch
            with differentiable_kernels():
                every = self.alone(self.function.on_device(theta), slice(0, self.function.given))
            self.function.outputs = every.shape[1]
        return self.function.outputs

    def alone(self, theta: Parameters, rows: Rows) -> Tensor:
        """``f(theta)`` of some of the samples that were given, passed through the model without the others.

        Args:
            theta: the parameters, on the model's device.
            rows: which of them.
        """
        count = len(range(*rows.indices(self.function.given))) if isinstance(rows, slice) else len(rows)
        return self._evaluate_rows(theta, rows if isinstance(rows, slice) else rows.to(self.function.device), count)

    def row_values(self, theta: Parameters, row: Tensor) -> Tensor:
        """``[J]`` of one of the samples that were given, passed through the model alone.

        Args:
            theta: the parameters, on the model's device.
            row: which one, 0-d; batched, under vmap.
        """
        return self._evaluate_rows(theta, row.reshape(1), 1)[0]

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
            return torch.cat([self._pushed(theta, point, stacked, rows).double().cpu() for rows in pieces], dim=1)

    def _pushed(self, theta: Parameters, point: Parameters, tangents: Parameters, rows: slice) -> Tensor:
        function = self.of_parameters(theta, lambda p: self.block_values(p, rows))
        return self.function.differentiator.push(function, point, tangents)[0]

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
            if self.function.together:
                return self._pulled_together(theta, point, block, sum_outputs, columns)
            return self._pulled_rows(theta, point, block, sum_outputs, columns)

    def _pulled_sum(
        self, theta: Parameters, point: Parameters, piece: slice, sum_outputs: bool, columns: slice
    ) -> dict[str, Tensor]:
        def summed(p: Parameters) -> Tensor:
            values = self.block_values(p, piece).sum(0)
            return values.sum(0, keepdim=True) if sum_outputs else values[columns]

        found = self.function.differentiator.pull(self.of_parameters(theta, summed), point)
        return {n: g.unsqueeze(0) for n, g in found.items()}

    def _pulled_rows(
        self, theta: Parameters, point: Parameters, block: slice, sum_outputs: bool, columns: slice
    ) -> dict[str, Tensor]:
        def one(p: Parameters, row: Tensor) -> Tensor:
            found = self.row_values(p, row)
            return found.sum(0, keepdim=True) if sum_outputs else found[columns]

        rows = self.function.rows[block].to(self.function.device)
        function = self.of_parameters(theta, one)
        return self.function.differentiator.pull_each(function, point, rows, together=_ROWS_TOGETHER)

    def _pulled_together(
        self, theta: Parameters, point: Parameters, block: slice, sum_outputs: bool, columns: slice
    ) -> dict[str, Tensor]:
        """Every entry of the values of a block, pulled back through all test samples."""

        def entries(p: Parameters) -> Tensor:
            found = self.block_values(p, block)
            return (found.sum(1) if sum_outputs else found[:, columns]).reshape(-1)

        outputs = 1 if sum_outputs else len(range(*columns.indices(self.function.outputs)))
        # As many activations at a time as where samples are differentiated one by one.
        size = max(1, _ROWS_TOGETHER * outputs // self.function.given)
        found = self.function.differentiator.pull(self.of_parameters(theta, entries), point, together=size)
        return {n: g.reshape(block.stop - block.start, -1, *g.shape[1:]) for n, g in found.items()}
