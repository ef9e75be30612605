"""How often the model was called for what the optimizer is fed: a declared batch stands for one call of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

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

Or, where no question will keep the train axis, record the loop as it is: Recorder(..., train_axis=False)
"""


@dataclass(eq=False)
class _Call:
    """One call of a watched module.

    Attributes:
        module: its id.
        rows: of the first tensor that it was given.
    """

    module: int
    rows: int


@dataclass(eq=False)
class _BackwardPass:
    """One backward pass that reached outputs of calls.

    Attributes:
        task: its number, torch's.
        gradients: what stood in ``.grad`` before it: tensors by id and version.
        calls: those that it has reached.
        over: whether it has ended.
    """

    task: int
    gradients: tuple[tuple[int, int], ...]
    calls: list[_Call] = field(default_factory=list)
    over: bool = False


class ModelCalls:
    """The calls whose outputs are in the gradient that is going to be fed.

    Calls that no backward pass reaches (evaluations) do not count, nor do those whose gradient is in no ``.grad`` any
    more (``torch.autograd.grad``, a gradient that was cleared before the next backward pass).

    Args:
        parameters: returns the tensors whose ``.grad`` is going to be fed.
        refused: whether more calls than batches are an error.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> calls = ModelCalls(lambda: list(model.parameters()))
        >>> calls.check([2], step=1)
        0
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]], *, refused: bool = True) -> None:
        self._parameters, self._refused = parameters, refused
        self._running: list[_Call] = []
        self._passes: list[_BackwardPass] = []

    @property
    def nested(self) -> bool:
        """Whether a watched module is being called inside the call of another one."""
        return len(self._running) > 1

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A watched module is called; inside the call of another one it is a part of that.

        Args:
            module: the one that is called.
            args: what it is given.
            kwargs: what it is given by name.
        """
        if torch._C._current_graph_task_id() < 0:  # outside: what has not ended by now has failed
            for each in [each for each in self._passes if not each.over]:
                self._end_pass(each)
        first = next((t for t in trees.leaves((tuple(args), dict(kwargs))) if t.ndim), None)
        self._running.append(_Call(id(module), 0 if first is None else len(first)))

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
        for leaf in trees.leaves(output):
            if leaf.requires_grad and not _transformed(leaf):
                leaf.register_hook(lambda _gradient: self._reach(call))  # type: ignore[no-untyped-call]

    def _reach(self, call: _Call) -> None:
        """A backward pass goes through an output of a call."""
        task = torch._C._current_graph_task_id()
        found = next((each for each in self._passes if each.task == task), None)
        if found is None:
            if self._passes and self._cleared():
                self._passes = [each for each in self._passes if not each.over]
            found = begun = _BackwardPass(task, self._gradients())
            self._passes.append(begun)
            Variable._execution_engine.queue_callback(lambda: self._end_pass(begun))
        found.calls.append(call)

    def _end_pass(self, ended: _BackwardPass) -> None:
        """What left nothing in ``.grad`` is not in what will be fed."""
        ended.over = True
        if ended.gradients == self._gradients():
            self._passes = [each for each in self._passes if each is not ended]

    def forget(self) -> None:
        """The step is over."""
        self._passes = []

    def check(self, samples: Sequence[int], step: int) -> int:
        """Look for more calls than batches, of more rows than samples.

        A batch may be passed through the model in parts: these have as many rows as it, and add up to it.

        Args:
            samples: how many samples each declared batch has.
            step: the number of the coming step, for the error.

        Returns:
            How many calls of a module there were, where these are too many; else 0.

        Raises:
            RecordingError: there were too many, and that is refused.
        """
        of: defaultdict[int, list[int]] = defaultdict(list)
        for call in {id(call): call for each in self._passes for call in each.calls}.values():
            of[call.module].append(call.rows)
        self.forget()
        rows = next((r for r in of.values() if len(r) > len(samples) and sum(r) > sum(samples)), [])
        if rows and self._refused:
            raise RecordingError(
                "the gradient is of several calls of the model for one declared batch, and could not be split by "
                "its samples",
                where=f"step {step}",
                expected=f"{len(samples)} calls, one for each declared batch: {sum(samples)} rows",
                got=f"{len(rows)} calls that the backward pass has reached, of {sum(rows)} rows",
                remedy=TOGETHER,
            )
        return len(rows)

    def _cleared(self) -> bool:
        return all(p.grad is None or not _any(p.grad) for p in self._parameters())

    def _gradients(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(p.grad), p.grad._version) for p in self._parameters() if p.grad is not None)


def _any(gradient: Tensor) -> bool:
    return bool((gradient._values() if gradient.is_sparse else gradient).any())


def _transformed(tensor: Tensor) -> bool:
    """Whether a tensor is one of ``torch.func``'s, which take no hooks."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
