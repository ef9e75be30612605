"""A function of some of a model's parameters, and the model that it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Differentiable", "Parameters", "every_entry", "module_at_fault", "too_little_memory"]

Parameters = Mapping[str, Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Differentiable:
    """A function of some of a model's parameters.

    Attributes:
        model: the model that it runs.
        state: all parameters and buffers, at the point where derivatives are wanted.
        values: parameters by name -> tensors; with a sample as second argument where it is differentiated sample by
            sample.
        around: what must stand around a forward pass and its backward pass alike, beside the parameters: a backward
            pass may run parts of the model again.
    """

    model: nn.Module
    state: Parameters
    values: Callable[..., tuple[Tensor, ...]]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def of_sample(self, sample: Any) -> Differentiable:
        """The function of one sample.

        Args:
            sample: the second argument.
        """
        return replace(self, values=lambda parameters: self.values(parameters, sample))

    def standing(self, parameters: Parameters, work: Callable[[], Found]) -> Found:
        """Do something while the model itself has these parameters.

        A part of the model that runs again in the backward pass must find the parameters of the forward pass.

        Args:
            parameters: those that differ from the state.
            work: what is done.
        """
        held = {f"model.{n}": t for n, t in {**self.state, **parameters}.items()}
        with self.around():
            found: Found = functional_call(_Holder(self.model), held, (work,), tie_weights=True)
        return found


class _Holder(nn.Module):
    """Gives a model other parameters for as long as something is done with it, through torch's public call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def every_entry(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cotangents of every entry of one tensor ``[J]``: the unit matrix."""
    (value,) = values
    return (torch.eye(len(value), dtype=value.dtype, device=value.device),)


def module_at_fault(model: nn.Module, error: BaseException) -> str | None:
    """The innermost module of a model in which an exception was raised: its name and class; None for none.

    Args:
        model: the model.
        error: the exception.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: str | None = None
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            name = names[id(module)]
            found = f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
        trace = trace.tb_next
    return found


def too_little_memory(error: Exception) -> bool:
    """Whether an exception says that memory was used up, which no other way would mend.

    Args:
        error: the exception.

    Example:
        >>> too_little_memory(MemoryError()), too_little_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error))
