"""What is explained: a function of the parameters with one row per test sample.

The model's outputs, a loss, an activation (Corollary 3.3), or any callable. An output function is called as
``function(call, inputs)``, where ``call(inputs)`` runs the model with the parameters of the moment; it
returns ``[n]`` or ``[n, ...]`` for n samples, and everything behind the first axis is flattened to J outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import QuestionError
from explaind_core.training_step import LossFunction, ModelCall, SampleLosses

__all__ = ["Activation", "Chosen", "Function", "LogProbabilities", "Loss", "Output", "Outputs", "Rows", "as_output"]

#: Which test samples an output is asked for: a slice of them, or a tensor of row indices (batched, under vmap).
Rows = slice | Tensor


class Output(ABC):
    """A function of the parameters to be explained; subclass it for more than a callable can do."""

    @abstractmethod
    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:
        """``[n, ...]`` for the test samples ``rows``, whose inputs are ``inputs``.

        Args:
            model: the model, for what is inside of it.
            call: ``call(inputs)`` runs it.
            inputs: those of the test samples ``rows``.
            rows: which of all test samples they are: picks what belongs to them, ``targets[rows]``; a slice, or row
                numbers that only vmap knows.
        """

    def check(self, model: nn.Module, samples: int) -> None:  # noqa: B027 (nothing to check, by default)
        """Refuse a question that cannot be answered, before any work is done."""


class Outputs(Output):
    """The model's outputs, all of them or some columns of the flattened ``[n, J]``.

    Example:
        >>> Outputs(columns=[0]).columns
        [0]
    """

    def __init__(self, columns: Sequence[int] | None = None) -> None:
        self.columns = None if columns is None else list(columns)

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:  # noqa: ARG002, D102
        return _select(call(inputs), self.columns)


class LogProbabilities(Output):
    """``log softmax`` of the model's outputs, all of them or some columns of the flattened ``[n, J]``.

    Args:
        columns: which of the J to explain, all by default.
        axis: the class axis of the model's outputs: -1 for ``[n, V]`` and ``[n, T, V]``, 1 for ``[n, V, T]``.

    Example:
        >>> halves = LogProbabilities().values(None, lambda x: x, torch.zeros(1, 2), slice(0, 1))
        >>> halves.exp()
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, columns: Sequence[int] | None = None, axis: int = -1) -> None:
        self.columns, self.axis = None if columns is None else list(columns), axis

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:  # noqa: ARG002, D102
        result = call(inputs)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result  # refused as what it is
        return _select(result.log_softmax(_class_axis(result, self.axis)), self.columns)


class Chosen(Output):
    """One entry per sample: the logit of its own class, J = 1; one per token for sequences, J = T.

    Args:
        columns: int64 ``[n]``, the class to look at in each test sample's ``[V]``; or ``[n, T]`` for outputs
            ``[n, T, V]``, one class a token.
        of: what is chosen from, before it is flattened: the model's outputs by default, ``LogProbabilities()`` for
            a log-probability, or any other output with a class axis.
        axis: the class axis of what is chosen from. The last by default, or that of ``LogProbabilities(axis=...)``.

    Raises:
        QuestionError: the columns are not whole numbers, or negative.

    Example:
        >>> logits = torch.tensor([[3.0, 1.0], [5.0, 7.0]])
        >>> Chosen(torch.tensor([0, 1])).values(None, lambda x: x, logits, slice(0, 2))
        tensor([3., 7.])
    """

    def __init__(
        self, columns: Any, of: Output | Callable[[ModelCall, Any], Any] | None = None, *, axis: int | None = None
    ) -> None:
        self.columns: Tensor = torch.as_tensor(columns)
        if self.columns.is_floating_point() or self.columns.dtype == torch.bool:
            raise QuestionError(
                "the chosen columns are not whole numbers", where="Chosen", expected="int64", got=self.columns.dtype
            )
        self.columns = self.columns.long()
        self.of = as_output(of, None)
        self.axis = axis if axis is not None else self.of.axis if isinstance(self.of, LogProbabilities) else -1
        # Looked at here, once: under vmap no value may decide anything.
        smallest, self.largest = (int(x) for x in self.columns.aminmax()) if self.columns.numel() else (0, 0)
        if smallest < 0:
            raise QuestionError(
                "a chosen column is negative",
                where="Chosen",
                expected="0 <= column < number of classes",
                got=smallest,
                remedy="put any class where nothing is meant (padding), and leave those outputs out of what you read",
            )

    def check(self, model: nn.Module, samples: int) -> None:  # noqa: D102
        found = len(self.columns) if self.columns.ndim else 0
        if found != samples:
            raise QuestionError(
                "columns and inputs do not have the same number of samples", expected=samples, got=found
            )
        self.of.check(model, samples)

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:  # noqa: D102
        result = self.of.values(model, call, inputs, rows)
        if not isinstance(result, Tensor):
            return result  # refused as what it is
        axis = _class_axis(result, self.axis)
        chosen = self.columns.to(result.device)[rows]
        expected = tuple(n for i, n in enumerate(result.shape) if i != axis)
        if chosen.shape != expected:
            raise QuestionError(
                "there is not one chosen column for each place of the output",
                where=f"an output of shape {tuple(result.shape)} with its classes on axis {axis}",
                expected=expected,
                got=tuple(chosen.shape),
            )
        if self.largest >= result.shape[axis]:
            raise QuestionError(
                "a chosen column is out of range", expected=f"0 <= column < {result.shape[axis]}", got=self.largest
            )
        return result.gather(axis, chosen.unsqueeze(axis)).squeeze(axis)


class Loss(Output):
    """The loss of each test sample, J = 1.

    Args:
        targets: the test samples' targets, n rows; None for a loss that takes none.
        loss: ``loss(output, target)``; the run's own by default, if it is one of torch's. A reduced loss is
            taken of each sample as a batch of one.
    """

    def __init__(self, targets: Any, loss: LossFunction | None = None) -> None:
        self.targets, self.loss = targets, loss
        self._each = None if loss is None else SampleLosses(loss)

    def check(self, model: nn.Module, samples: int) -> None:  # noqa: ARG002, D102
        found = {len(t) if t.ndim else 0 for t in trees.leaves(self.targets)}
        if found != {samples} and self.targets is not None:
            raise QuestionError(
                "targets and inputs do not have the same number of samples", expected=samples, got=found
            )

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:  # noqa: ARG002, D102
        assert self._each is not None  # as_output saw to it
        outputs = call(inputs)
        where = next((leaf.device for leaf in trees.leaves(outputs)), None)
        targets = trees.map_tensors(lambda t: (t if where is None else t.to(where))[rows], self.targets)
        return self._each(outputs, targets)


class Activation(Output):
    """What the module of that name returns, flattened: ``Activation("encoder.0")``."""

    def __init__(self, module: str) -> None:
        self.module = module

    def check(self, model: nn.Module, samples: int) -> None:  # noqa: ARG002, D102
        names = [name for name, _ in model.named_modules()]
        if self.module not in names:
            raise QuestionError(
                f"the model has no module {self.module!r}", expected=f"one of {names[1:]}", got=self.module
            )

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:  # noqa: ARG002, D102
        seen: list[Any] = []
        handle = model.get_submodule(self.module).register_forward_hook(lambda _m, _i, result: seen.append(result))
        try:
            call(inputs)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise QuestionError(
                f"the module {self.module!r} ran {len(seen)} times in one forward pass",
                expected="once",
                remedy="pass a callable that selects what is meant",
            )
        return seen[0]


class Function(Output):
    """Any callable ``function(call, inputs) -> [n, ...]``, for instance a logit difference.

    Example:
        >>> margin = Function(lambda call, inputs: call(inputs)[:, 0] - call(inputs)[:, 1])
        >>> margin.values(None, lambda x: x, torch.tensor([[3.0, 1.0]]), slice(0, 1))
        tensor([2.])
    """

    def __init__(self, function: Callable[[ModelCall, Any], Any]) -> None:
        self.function = function

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: Rows) -> Any:  # noqa: ARG002, D102
        return self.function(call, inputs)


def as_output(output: Output | Callable[[ModelCall, Any], Any] | None, loss: LossFunction | None) -> Output:
    """``output`` as an :class:`Output`: None is the model's outputs, a callable a :class:`Function`.

    Args:
        output: None, a callable, or an :class:`Output`.
        loss: that of the run, if it is known.

    Raises:
        QuestionError: a Loss without a function for a run whose loss is not known; or no output at all.
    """
    if output is None:
        return Outputs()
    if isinstance(output, Loss) and output.loss is None:
        if loss is None:
            raise QuestionError(
                "the run's loss is not known",
                where="Loss(targets)",
                expected="a loss of torch.nn, or one that is given",
                remedy="say Loss(targets, loss=...) or open_run(..., loss=...)",
            )
        return Loss(output.targets, loss)
    if isinstance(output, Output):
        return output
    if callable(output):
        return Function(output)
    raise QuestionError(
        "output is nothing that can be explained",
        expected="Outputs(), Loss(targets), Activation(name) or a callable (call, inputs) -> [n, ...]",
        got=type(output).__name__,
    )


def _select(result: Any, columns: Sequence[int] | None) -> Any:
    """Some columns of the flattened ``[n, J]``; what is no tensor is refused later, as what it is."""
    if columns is None or not isinstance(result, Tensor):
        return result
    flat = result.flatten(1)
    outside = [c for c in columns if not -flat.shape[1] <= c < flat.shape[1]]
    if outside:
        raise QuestionError("output columns are out of range", expected=f"0 <= column < {flat.shape[1]}", got=outside)
    return flat[:, list(columns)]


def _class_axis(result: Tensor, axis: int) -> int:
    """``axis`` counted from the front; an axis behind that of the samples."""
    if not -result.ndim <= axis < result.ndim or axis % result.ndim == 0:
        raise QuestionError(
            "the output has no such class axis",
            where="axis",
            expected=f"an axis of {tuple(result.shape)} behind the samples' own",
            got=axis,
        )
    return axis % result.ndim


def flat_rows(values: Any, samples: int) -> Tensor:
    """``[n]`` or ``[n, ...]`` as ``[n, J]``; of a single sample, all that there is: its axis may have been squeezed.

    Args:
        values: what an output returned.
        samples: how many test samples there are, n.

    Raises:
        QuestionError: not a tensor, or not one row per sample.
    """
    if not isinstance(values, Tensor):
        raise QuestionError(
            "the output is not a tensor",
            expected="a tensor with one row per sample",
            got=type(values).__name__,
            remedy="pass a callable that picks one: output=lambda call, inputs: call(inputs).logits",
        )
    if samples > 1 and (values.ndim == 0 or len(values) != samples):
        raise QuestionError(
            "the output does not have one row per sample", expected=f"[{samples}, ...]", got=tuple(values.shape)
        )
    if not values.is_floating_point():
        raise QuestionError("the output has no derivative", expected="a floating-point dtype", got=values.dtype)
    return torch.reshape(values, (samples, -1))
