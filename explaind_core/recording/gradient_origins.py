"""Where the gradients in ``.grad`` were taken, when several optimizers move a model by turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

__all__ = ["GradientOrigins"]


@dataclass(frozen=True)
class _Stamp:
    """When the parts of one gradient tensor were added to it."""

    tensor: TensorWeakRef
    taken: frozenset[int]


class GradientOrigins:
    """Follows the gradients that stand in ``.grad``: after how many optimizer steps each part of them was taken.

    A backward pass is seen by hooks on the parameters. A gradient that is put there by hand is seen when it is first
    looked at, which is before every step. What stands there when a backward pass adds to it remains a part, unless it
    was zeroed.

    Args:
        parameters: the model's, by name.

    Attributes:
        now: how many steps of any optimizer were made.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> origins = GradientOrigins({"weight": weight})
        >>> weight.sum().backward()
        >>> origins.stepped([])
        >>> weight.sum().backward()
        >>> sorted(origins.of(["weight"])["weight"])
        [0, 1]
        >>> origins.close()
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.now = 0
        self._parameters = parameters
        self._stamps: dict[str, _Stamp] = {}
        self._kept: dict[str, frozenset[int]] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}
        self.look()

    def look(self) -> None:
        """Follow parameters that require gradients now, and gradients that were put there by hand."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in self._handles:  # others refuse hooks
                self._handles[name] = [
                    parameter.register_hook(self._coming(name)),  # type: ignore[no-untyped-call]
                    parameter.register_post_accumulate_grad_hook(self._added(name)),  # type: ignore[no-untyped-call]
                ]
            self._taken(name)

    def of(self, names: Iterable[str]) -> dict[str, frozenset[int]]:
        """After how many steps the parts of these parameters' gradients were taken, where one is not zero."""
        found = {name: self._taken(name) for name in names}
        # A zero that was left there is the same wherever it was taken.
        return {n: t for n, t in found.items() if t and (t == {self.now} or _any(self._parameters[n].grad))}

    def stepped(self, names: Iterable[str]) -> None:
        """Count a step; the gradients of the parameters ``names``, which it may have overwritten, are of before it."""
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is not None:
                self._stamp(name, gradient, frozenset({self.now}))
        self.now += 1

    def close(self) -> None:
        """Stop following."""
        for handle in (h for handles in self._handles.values() for h in handles):
            handle.remove()

    def _taken(self, name: str) -> frozenset[int]:
        gradient = self._parameters[name].grad
        if gradient is None:
            return frozenset()
        stamp = self._stamps.get(name)
        if stamp is not None and stamp.tensor() is gradient:
            return stamp.taken
        return self._stamp(name, gradient, frozenset({self.now}))

    def _stamp(self, name: str, gradient: Tensor, taken: frozenset[int]) -> frozenset[int]:
        # A weak reference: a gradient that the loop lets go of must not be kept in memory.
        self._stamps[name] = _Stamp(TensorWeakRef(gradient), taken)
        return taken

    def _coming(self, name: str) -> Callable[[Tensor], None]:
        def before(_coming: Tensor) -> None:
            kept, there = self._taken(name), self._parameters[name].grad
            self._kept[name] = kept if kept <= {self.now} or _any(there) else frozenset()

        return before

    def _added(self, name: str) -> Callable[[Tensor], None]:
        def after(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._stamp(name, parameter.grad, self._kept.pop(name, frozenset()) | {self.now})

        return after


def _any(gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    return bool((gradient._values() if gradient.is_sparse else gradient).any())
