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
    """Of one gradient tensor: the points at which its parts were taken.

    Attributes:
        tensor: a weak reference: a gradient that the loop lets go of must not be kept in memory.
        points: after how many steps each part was taken.
    """

    tensor: TensorWeakRef
    points: frozenset[int]


class GradientOrigins:
    """Follows the gradients that stand in ``.grad``: after how many optimizer steps each part of them was taken.

    A backward pass is seen by hooks on the parameters. A gradient that is put there by hand is seen when it is first
    looked at, which is before every step. What stands there when a backward pass adds to it remains a part, unless it
    was zeroed.

    Args:
        parameters: the model's, by name.

    Attributes:
        now: how many steps of any optimizer were made: the point where the model stands.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> origins = GradientOrigins({"weight": weight})
        >>> weight.sum().backward()
        >>> origins.count_step([])
        >>> weight.sum().backward()
        >>> sorted(origins.points_of(["weight"])["weight"])
        [0, 1]
        >>> origins.close()
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.now = 0
        self._parameters = parameters
        self._stamps: dict[str, _Stamp] = {}
        self._points_before: dict[str, frozenset[int]] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}
        self.follow()

    def follow(self) -> None:
        """Follow parameters that require gradients now, and gradients that were put there by hand."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in self._handles:  # others refuse hooks
                self._handles[name] = [
                    parameter.register_hook(self._before_accumulation(name)),  # type: ignore[no-untyped-call]
                    parameter.register_post_accumulate_grad_hook(self._after_accumulation(name)),  # type: ignore[no-untyped-call]
                ]
            self._points(name)

    def points_of(self, names: Iterable[str]) -> dict[str, frozenset[int]]:
        """The points at which the parts of gradients were taken: after how many steps.

        Args:
            names: of the parameters.

        Returns:
            By name; parameters without a gradient, and with zeros that earlier steps left, are left out.
        """
        found = {name: self._points(name) for name in names}
        # A zero that was left there is the same wherever it was taken.
        return {n: p for n, p in found.items() if p and (p == {self.now} or _is_nonzero(self._parameters[n].grad))}

    def count_step(self, names: Iterable[str]) -> None:
        """Count a step of an optimizer.

        Args:
            names: the parameters that it trains; their gradients, which it may have overwritten, are of before it.
        """
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is not None:
                self._stamp(name, gradient, frozenset({self.now}))
        self.now += 1

    def close(self) -> None:
        """Stop following."""
        for handle in (h for handles in self._handles.values() for h in handles):
            handle.remove()

    def _points(self, name: str) -> frozenset[int]:
        gradient = self._parameters[name].grad
        if gradient is None:
            return frozenset()
        stamp = self._stamps.get(name)
        if stamp is not None and stamp.tensor() is gradient:
            return stamp.points
        return self._stamp(name, gradient, frozenset({self.now}))

    def _stamp(self, name: str, gradient: Tensor, points: frozenset[int]) -> frozenset[int]:
        self._stamps[name] = _Stamp(TensorWeakRef(gradient), points)
        return points

    def _before_accumulation(self, name: str) -> Callable[[Tensor], None]:
        def before(_coming: Tensor) -> None:
            kept, there = self._points(name), self._parameters[name].grad
            self._points_before[name] = kept if kept <= {self.now} or _is_nonzero(there) else frozenset()

        return before

    def _after_accumulation(self, name: str) -> Callable[[Tensor], None]:
        def after(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._stamp(name, parameter.grad, self._points_before.pop(name, frozenset()) | {self.now})

        return after


def _is_nonzero(gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    return bool((gradient._values() if gradient.is_sparse else gradient).any())
