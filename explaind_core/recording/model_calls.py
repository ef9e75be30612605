"""How often the model was called for what the optimizer is fed: a declared batch stands for one call of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.errors import RecordingError

__all__ = ["ModelCalls"]

#: What makes several calls one.
TOGETHER = """record a module that makes all of these calls in one forward, and train through it:

    class Together(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            return tuple(self.model(x) for x in inputs)

    def loss_of(outputs, targets):
        return loss(*outputs)                        # with targets, if it takes some

    together = Together(model)
    with Recorder(path, together, optimizer, loss_of) as recorder:
        ...
        loss_of(together(a, b), None).backward()
        recorder.batch((a, b), None, ids=ids)        # one row of a and of b for each id
    run = open_run(path, model=together, loss=loss_of)
"""


@dataclass
class _Call:
    """One call of a watched module.

    Attributes:
        module: its id.
        rows: of the first tensor that it was given.
        gradients: what stood in ``.grad`` before: tensors by id and version.
        reached: whether a backward pass came.
    """

    module: int
    rows: int
    gradients: tuple[tuple[int, int], ...]
    reached: bool = False


class ModelCalls:
    """The calls whose outputs are in the gradient that is going to be fed.

    Calls that no backward pass reaches (evaluations) do not count, nor do those whose gradient is in no ``.grad``
    (``torch.autograd.grad``, a gradient that was zeroed).

    Args:
        model: whose gradients are looked at.

    Example:
        >>> model, calls = nn.Linear(1, 1), ModelCalls(nn.Linear(1, 1))
        >>> calls.check([2], step=1)
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._calls: list[_Call] = []
        self._running: list[_Call] = []

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A watched module is called; inside the call of another one it is a part of that.

        Args:
            module: the one that is called.
            args: what it is given.
            kwargs: what it is given by name.
        """
        if not self._running:
            self._drop()
        first = next((t for t in trees.leaves((tuple(args), dict(kwargs))) if t.ndim), None)
        self._running.append(_Call(id(module), 0 if first is None else len(first), self._gradients()))

    def end(self, output: Any) -> None:
        """The last call that began is over.

        Args:
            output: what it returned.
        """
        if not self._running:
            return
        call = self._running.pop()
        if self._running or not torch.is_grad_enabled():
            return

        def reached(_gradient: Tensor) -> None:
            call.reached = True

        found = [leaf for leaf in trees.leaves(output) if leaf.requires_grad and not _transformed(leaf)]
        for leaf in found:
            leaf.register_hook(reached)  # type: ignore[no-untyped-call]
        if found:
            self._calls.append(call)

    def forget(self) -> None:
        """The step is over."""
        self._calls = []

    def check(self, samples: Sequence[int], step: int) -> None:
        """Refuse more calls than batches, of more rows than samples.

        A batch may be passed through the model in parts: these have as many rows as it, and add up to it.

        Args:
            samples: how many samples each declared batch has.
            step: the number of the coming step, for the error.

        Raises:
            RecordingError: there were.
        """
        self._drop()
        of: defaultdict[int, list[int]] = defaultdict(list)
        for call in self._calls:
            if call.reached:
                of[call.module].append(call.rows)
        for rows in of.values():
            if len(rows) > len(samples) and sum(rows) > sum(samples):
                raise RecordingError(
                    "the gradient is of several calls of the model for one declared batch, and could not be split by "
                    "its samples",
                    where=f"step {step}",
                    expected=f"{len(samples)} calls, one for each declared batch: {sum(samples)} rows",
                    got=f"{len(rows)} calls that the backward pass has reached, of {sum(rows)} rows",
                    remedy=TOGETHER,
                )
        self._calls = [call for call in self._calls if not call.reached]

    def _drop(self) -> None:
        """Forget calls that a backward pass has reached without leaving anything in ``.grad``."""
        now = self._gradients()
        self._calls = [call for call in self._calls if not (call.reached and call.gradients == now)]

    def _gradients(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(p.grad), p.grad._version) for p in self._parameters if p.grad is not None)


def _transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one of ``torch.func``'s, which take no hooks."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
