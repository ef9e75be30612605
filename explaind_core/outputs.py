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
from explaind_core.losses import LossFunction, per_sample_loss

__all__ = ["Activation", "Function", "Loss", "ModelCall", "Output", "Outputs", "as_output", "run_model"]

ModelCall = Callable[[Any], Any]


def run_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``; a tuple or list of inputs is spread over the arguments, a dict over the keywords.

    Example:
        >>> run_model(lambda a, b: a + b, {"a": 1, "b": 2})
        3
    """
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


class Output(ABC):
    """A function of the parameters to be explained; subclass it for more than a callable can do."""

    @abstractmethod
    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: slice) -> Any:
        """``[n, ...]`` for the test samples ``rows``, whose inputs are ``inputs``."""

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

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: slice) -> Any:  # noqa: ARG002, D102
        result = call(inputs)
        if self.columns is None or not isinstance(result, Tensor):
            return result
        flat = result.flatten(1)
        outside = [c for c in self.columns if not -flat.shape[1] <= c < flat.shape[1]]
        if outside:
            raise QuestionError(
                "output columns are out of range", expected=f"0 <= column < {flat.shape[1]}", got=outside
            )
        return flat[:, self.columns]


class Loss(Output):
    """The loss of each test sample, J = 1.

    Args:
        targets: the test samples' targets, n rows.
        loss: ``loss(output, target)``; the run's own by default, if it is one of torch's. A reduced loss is
            taken of each sample as a batch of one.
    """

    def __init__(self, targets: Any, loss: LossFunction | None = None) -> None:
        self.targets, self.loss = targets, loss

    def check(self, model: nn.Module, samples: int) -> None:  # noqa: ARG002, D102
        found = {len(t) if t.ndim else 0 for t in trees.leaves(self.targets)}
        if found != {samples}:
            raise QuestionError(
                "targets and inputs do not have the same number of samples", expected=samples, got=found
            )

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: slice) -> Any:  # noqa: ARG002, D102
        assert self.loss is not None  # as_output saw to it
        return per_sample_loss(self.loss, call(inputs), trees.map_tensors(lambda t: t[rows], self.targets))


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

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: slice) -> Any:  # noqa: ARG002, D102
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

    def values(self, model: nn.Module, call: ModelCall, inputs: Any, rows: slice) -> Any:  # noqa: ARG002, D102
        return self.function(call, inputs)


def as_output(output: Output | Callable[[ModelCall, Any], Any] | None, loss: LossFunction | None) -> Output:
    """``output`` as an :class:`Output`: None is the model's outputs, a callable a :class:`Function`.

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


def flat_rows(values: Any, samples: int) -> Tensor:
    """``[n]`` or ``[n, ...]`` as ``[n, J]``.

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
    if values.ndim == 0 or len(values) != samples:
        raise QuestionError(
            "the output does not have one row per sample", expected=f"[{samples}, ...]", got=tuple(values.shape)
        )
    if not values.is_floating_point():
        raise QuestionError("the output has no derivative", expected="a floating-point dtype", got=values.dtype)
    return torch.reshape(values, (samples, -1))
