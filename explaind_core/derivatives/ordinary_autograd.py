"""Derivatives by backward passes alone, for models that ``torch.func`` cannot follow.

The model itself stands at the parameters during forward and backward passes alike: activations that are computed again
on the way back find them there.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.derivatives.differentiable import Differentiable, Parameters, every_entry

__all__ = ["NOTHING_FLOWS", "OrdinaryAutograd"]

Found = TypeVar("Found")
#: What is done with values and the parameters that they are functions of.
Work = Callable[[tuple[Tensor, ...], dict[str, Tensor]], Found]
#: How torch warns that a recomputed part of the model (``use_reentrant=True``) passes no gradient on.
NOTHING_FLOWS = "None of the inputs have requires_grad=True"


class OrdinaryAutograd:
    """Pulls cotangents back, and pushes tangents forward by pulling back twice.

    Attributes:
        accumulates: whether gradients are to be had by ``backward()`` alone, which adds them up at the parameters, and
            only where inputs ask for gradients, too: activations are recomputed with ``use_reentrant=True``.
        twice: whether backward passes can be differentiated.
        batched: whether several cotangents go back in one pass.
    """

    def __init__(self) -> None:
        self.accumulates, self.twice, self.batched = False, True, True

    def push(self, function: Differentiable, point: Parameters, tangents: Parameters) -> tuple[Tensor, ...]:
        """``Df(point)[v_r]`` along R directions: ``[R, ...]`` for every tensor of the values.

        ``c -> Df^T c`` is linear, so that the derivative of ``<Df^T c, v>`` by c is ``Df v``. Where a backward pass
        cannot be differentiated, or comes out wrong, one is made for every entry of the values.

        Args:
            function: f.
            point: the parameters that it is differentiated by.
            tangents: parameter name -> ``[R, *shape]``, of every parameter in ``point``.
        """

        def work(values: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
            if self.twice and not self.accumulates:
                try:
                    return _pushed_by_pulling_twice(values, leaves, tangents)
                except (RuntimeError, NotImplementedError):
                    self.twice = False
            return self._pushed_entry_by_entry(values, leaves, tangents)

        return self._run(function, point, work)

    def pull(
        self,
        function: Differentiable,
        point: Parameters,
        cotangents: tuple[Tensor, ...] | None = None,
        *,
        together: int | None = None,
    ) -> dict[str, Tensor]:
        """``c_r^T Df(point)`` for R cotangents: parameter name -> ``[R, *shape]``.

        Args:
            function: f.
            point: the parameters that it is differentiated by.
            cotangents: ``[R, ...]`` for every tensor of the values; one for every entry of them by default, where
                these are one tensor ``[J]``.
            together: so many cotangents at a time, all by default.
        """

        def work(values: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
            given = every_entry(values) if cotangents is None else cotangents
            size = len(given[0]) if together is None else together
            blocks = [slice(start, start + size) for start in range(0, len(given[0]), size)]
            parts = [self._pulled(values, leaves, tuple(c[block] for c in given)) for block in blocks]
            return {n: torch.cat([part[n] for part in parts]) for n in leaves}

        return self._run(function, point, work)

    # ------------------------------------------------------------------ one forward pass, and what follows it
    def _run(
        self,
        function: Differentiable,
        point: Parameters,
        work: Work[Found],
    ) -> Found:
        try:
            return self._attempt(function, point, work)
        except (RuntimeError, UserWarning) as error:
            reentrant = "use_reentrant" in str(error) or "Checkpoint" in str(error) or NOTHING_FLOWS in str(error)
            if self.accumulates or not reentrant:
                raise
        self.accumulates = True
        return self._attempt(function, point, work)

    def _attempt(
        self,
        function: Differentiable,
        point: Parameters,
        work: Work[Found],
    ) -> Found:
        leaves = {n: t.detach().requires_grad_() for n, t in point.items()}

        def run() -> Found:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("error", NOTHING_FLOWS)
                values = function.values(leaves)
            return work(values, leaves)

        with _inputs_asking(function.model, self.accumulates):
            return function.standing(leaves, run)

    # ------------------------------------------------------------------ backward passes
    def _pulled(
        self, values: tuple[Tensor, ...], leaves: dict[str, Tensor], cotangents: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        count, pairs = len(cotangents[0]), list(zip(values, cotangents, strict=True))
        depend = [(value, c) for value, c in pairs if value.requires_grad]
        if not depend:
            return {n: t.new_zeros((count, *t.shape)) for n, t in leaves.items()}
        if self.batched and count > 1 and not self.accumulates:
            try:
                found = torch.autograd.grad(
                    [value for value, _ in depend], list(leaves.values()), [c for _, c in depend],
                    retain_graph=True, allow_unused=True, is_grads_batched=True,
                )  # fmt: skip
                return dict(zip(leaves, _filled(found, leaves, (count,)), strict=True))
            except (RuntimeError, NotImplementedError) as error:
                if "use_reentrant" in str(error):
                    raise
                self.batched = False
        each = [self._one([value for value, _ in depend], leaves, [c[r] for _, c in depend]) for r in range(count)]
        return {n: torch.stack(gradients) for n, gradients in zip(leaves, zip(*each, strict=True), strict=True)}

    def _one(self, values: list[Tensor], leaves: dict[str, Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        """One backward pass."""
        if not self.accumulates:
            found = torch.autograd.grad(
                values, list(leaves.values()), cotangents, retain_graph=True, allow_unused=True
            )  # fmt: skip
            return _filled(found, leaves, ())
        for leaf in leaves.values():
            leaf.grad = None
        torch.autograd.backward(values, cotangents, retain_graph=True)
        return _filled([leaf.grad for leaf in leaves.values()], leaves, ())

    def _pushed_entry_by_entry(
        self, values: tuple[Tensor, ...], leaves: dict[str, Tensor], tangents: Parameters
    ) -> tuple[Tensor, ...]:
        count, pushed = len(next(iter(tangents.values()))), []
        for value in values:
            columns = [value.new_zeros(count)] * value.numel()
            for entry in range(value.numel()) if value.requires_grad else ():
                one_hot = torch.zeros_like(value).reshape(-1)
                one_hot[entry] = 1
                gradients = self._one([value], leaves, [one_hot.reshape(value.shape)])
                products = [
                    tangents[n].reshape(count, -1) @ g.reshape(-1) for n, g in zip(leaves, gradients, strict=True)
                ]
                columns[entry] = torch.stack(products).sum(0)
            pushed.append(torch.stack(columns, 1).reshape(count, *value.shape).detach())
        return tuple(pushed)


def _pushed_by_pulling_twice(
    values: tuple[Tensor, ...], leaves: dict[str, Tensor], tangents: Parameters
) -> tuple[Tensor, ...]:
    """``Df v_r`` as the derivative of ``<Df^T c, v_r>`` by c (RuntimeError where that is not ``<c, Df v_r>``)."""
    count = len(next(iter(tangents.values())))
    depend = [value for value in values if value.requires_grad]
    # Any cotangents would do. These are not alike, so that no symmetry makes the check below true of wrong numbers.
    cotangents = [_uneven(value).requires_grad_() for value in depend]
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if depend:
        with torch.enable_grad():
            gradients = torch.autograd.grad(
                depend, list(leaves.values()), cotangents, create_graph=True, allow_unused=True
            )  # fmt: skip
    pushed: list[list[Tensor]] = [[torch.zeros_like(value) for value in values] for _ in range(count)]
    given = {n: g.to_dense() for n, g in zip(leaves, gradients, strict=True) if g is not None}
    for r in range(count) if given else ():
        with torch.enable_grad():
            inner = torch.stack([(g * tangents[n][r]).sum() for n, g in given.items()]).sum()
        size = sum(float((g.detach() * tangents[n][r]).abs().sum()) for n, g in given.items())
        if not inner.requires_grad:
            raise RuntimeError("the backward pass has no derivative")
        found = torch.autograd.grad(inner, cotangents, retain_graph=True, allow_unused=True)
        products = [c.detach() * d for c, d in zip(cotangents, found, strict=True) if d is not None]
        size += sum(float(p.abs().sum()) for p in products)
        error = abs(float(inner) - sum(float(p.sum()) for p in products))
        if not error <= math.sqrt(torch.finfo(inner.dtype).eps) * size and math.isfinite(size):
            raise RuntimeError("the derivative of the backward pass is wrong")
        derivatives = iter(found)
        for i, value in enumerate(values):
            derivative = next(derivatives) if value.requires_grad else None
            pushed[r][i] = torch.zeros_like(value) if derivative is None else derivative
    return tuple(torch.stack([row[i] for row in pushed]).detach() for i in range(len(values)))


def _uneven(value: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)


def _filled(gradients: Sequence[Tensor | None], leaves: Mapping[str, Tensor], several: tuple[int, ...]) -> list[Tensor]:
    """Dense gradients, zero where nothing depends on a parameter."""
    return [
        t.new_zeros((*several, *t.shape)) if g is None else g.detach().to_dense()
        for g, t in zip(gradients, leaves.values(), strict=True)
    ]


@contextmanager
def _inputs_asking(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model's inputs ask for gradients, too, where these are wanted."""

    def asking(tensor: Tensor) -> Tensor:
        differentiable = tensor.is_floating_point() and not tensor.requires_grad and torch.is_grad_enabled()
        return tensor.detach().requires_grad_() if differentiable else tensor

    def ask(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return trees.map_tensors(asking, args), trees.map_tensors(asking, kwargs)

    handle = model.register_forward_pre_hook(ask, with_kwargs=True) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
