"""A micro-batch at a point of training: outputs as functions of the parameters, and what the loss says to them.

The cotangents ``c = d (weight * loss) / d outputs`` are taken of the whole micro-batch, so that a normaliser which
belongs to it (class weights, tokens that are not padding) is in every sample's share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from explaind_core import trees
from explaind_core.errors import QuestionError, RecordingError
from explaind_core.losses import LossFunction
from explaind_core.outputs import run_model
from explaind_core.run import MicroBatch

__all__ = ["BatchPoint", "rebuilt", "tolerance"]

_REMEDY = "a gradient has no share per sample there: keep only axes other than train"
#: In single precision some kinks of a ReLU are decided otherwise. What is to be found (another batch, another loss)
#: differs much more.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways to the same gradients or outputs may differ, relative to their size.

    Example:
        >>> tolerance(torch.float64)
        1e-09
    """
    return _TOLERANCE.get(dtype, 32 * torch.finfo(dtype).eps)


class BatchPoint:
    """A micro-batch of n samples at ``theta``. Used within ``feature_maps.differentiable_kernels``.

    Args:
        model: the architecture, in the mode that it was trained in.
        loss: 0-d, or one number per sample (their mean is meant). micro: the micro-batch.
        state: all parameters and buffers.
        start: where its samples begin in the batch.

    Attributes:
        used: which tensors of the output the loss depends on. cotangents: of these, ``[n, ...]`` each.
        activation: how many numbers a sample has in the largest output of a module.

    Raises:
        RecordingError: an output that the loss depends on has no row per sample, or samples are not independent.
        QuestionError: the loss returns neither one number nor one per sample.
    """

    def __init__(
        self, model: nn.Module, loss: LossFunction, micro: MicroBatch, state: Mapping[str, Tensor], start: int
    ) -> None:
        self.model, self.state, self.start, self.n = model, state, start, len(micro.ids)
        device = next(model.parameters()).device
        self.inputs, targets = (
            trees.map_tensors(lambda t: t.detach().to(device), t) for t in (micro.inputs, micro.targets)
        )
        result = self._run({}, self.inputs)
        leaves = trees.leaves(result)
        inexact = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() or leaf.is_complex()]
        # Cut from each other: an output may be computed from another one, and would be counted twice.
        cut = {i: leaves[i].detach().requires_grad_() for i in inexact}
        with torch.enable_grad():
            given = iter([cut[i].clone() if i in cut else leaf for i, leaf in enumerate(leaves)])
            value = micro.weight * self._one_number(loss(rebuilt(result, given), targets))
        found: dict[int, Tensor] = {}
        if cut and value.requires_grad:
            gradients = torch.autograd.grad(value, list(cut.values()), allow_unused=True)
            found = {i: g for i, g in zip(cut, gradients, strict=True) if g is not None and bool((g != 0).any())}
        for i, cotangent in found.items():
            if cotangent.ndim == 0 or len(cotangent) != self.n or cotangent.is_complex():
                raise RecordingError(
                    "the loss depends on an output that does not have one row per sample",
                    where=f"output tensor {i} of the model, batch of {self.n} samples",
                    expected=f"real numbers, ({self.n}, ...)",
                    got=f"{cotangent.dtype}, {tuple(cotangent.shape)}",
                    remedy="let the model return something per sample, and reduce it in the loss given to open_run",
                )
        self.used, self.cotangents = list(found), list(found.values())
        self._check_independent([leaves[i] for i in self.used])
        self.activation = self._largest_activation()

    def _one_number(self, value: Tensor) -> Tensor:
        if value.ndim == 0:
            return value
        if value.numel() == self.n:
            return value.mean()
        raise QuestionError(
            "the loss returns neither one number nor one per sample",
            expected=f"a 0-d tensor, or shape ({self.n},)",
            got=tuple(value.shape),
            remedy="sum or average over the other axes",
        )

    def _check_independent(self, whole: list[Tensor]) -> None:
        """The first sample alone, and some others without it, must give what they give in the whole batch."""
        for rows in (slice(0, 1), slice(1, min(self.n, 16))) if self.n > 1 else ():
            try:
                part = self.outputs({}, rows)
            except (RuntimeError, ValueError) as error:
                raise RecordingError(
                    f"the model cannot be run on a part of a batch: {error}",
                    where=f"{rows.stop - rows.start} of {self.n} samples",
                    remedy=_REMEDY,
                ) from error
            for expected, found in zip((t[rows] for t in whole), part, strict=True):
                got: object = tuple(found.shape)
                same = found.shape == expected.shape
                if same:
                    difference = torch.where(found == expected, 0, (found - expected).abs()).amax()
                    same = bool(difference <= tolerance(expected.dtype) * expected.abs().amax())
                    got = f"a difference of {difference:.3g}"
                if not same:
                    raise RecordingError(
                        "the model's outputs for a sample depend on the other samples of its batch, or on chance",
                        where=f"batch of {self.n} samples",
                        expected="the same outputs for a part of the batch, with the batch as the first axis",
                        got=got,
                        remedy=_REMEDY,
                    )

    # ------------------------------------------------------------------ the outputs as functions of the parameters
    def _run(self, parameters: Mapping[str, Tensor], inputs: Any) -> Any:
        state = {**self.state, **parameters}
        if self.model.training:  # in which mode a model may write to its buffers
            state |= {n: state[n].clone() for n, _ in self.model.named_buffers() if n in state}
        return run_model(lambda *a, **k: functional_call(self.model, state, a, k), inputs)

    def _used(self, result: Any) -> tuple[Tensor, ...]:
        leaves = trees.leaves(result)
        return tuple(leaves[i] for i in self.used)

    def _per_sample(self, leaf: Tensor) -> bool:
        return leaf.ndim > 0 and len(leaf) == self.n  # what has no row per sample is the same for all of them

    def outputs(self, parameters: Mapping[str, Tensor], rows: slice | Tensor) -> tuple[Tensor, ...]:
        """The used outputs of the samples ``rows``, the parameters that are not given held constant."""
        taken = trees.map_tensors(lambda t: t[rows] if self._per_sample(t) else t, self.inputs)
        return self._used(self._run(parameters, taken))

    def sample_inputs(self, rows: slice) -> tuple[Tensor, ...]:
        """What :meth:`sample_outputs` is to be mapped over."""
        return tuple(t[rows] for t in trees.leaves(self.inputs) if self._per_sample(t))

    def sample_outputs(self, parameters: Mapping[str, Tensor], sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The used outputs of one sample, ``[1, ...]`` each."""
        given = iter(sample)
        taken = trees.map_tensors(lambda t: next(given).unsqueeze(0) if self._per_sample(t) else t, self.inputs)
        return self._used(self._run(parameters, taken))

    def _largest_activation(self) -> int:
        """How many numbers a sample has in the largest output of a module."""
        sizes = [1]

        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            sizes.extend(leaf.numel() for leaf in trees.leaves(output))

        handles = [module.register_forward_hook(see) for module in self.model.modules()]
        try:
            self.outputs({}, slice(0, 1))
        finally:
            for handle in handles:
                handle.remove()
        return max(sizes)


def rebuilt(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """``tree`` with other tensors, in the order of ``trees.leaves``; its containers keep their classes."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, tuple):
        values = [rebuilt(value, tensors) for value in tree]
        make: Callable[..., Any] = getattr(type(tree), "_make", type(tree))  # a named tuple
        return make(values)
    if isinstance(tree, list):
        return [rebuilt(value, tensors) for value in tree]
    if isinstance(tree, Mapping):
        other: Any = copy.copy(tree)
        for key in list(tree):
            other[key] = rebuilt(tree[key], tensors)
        return other
    return tree
