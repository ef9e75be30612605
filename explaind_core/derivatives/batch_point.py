"""A micro-batch at a point of training: outputs as functions of the parameters, and what the loss says to them.

The cotangents ``c = d (weight * loss) / d outputs`` are taken of the whole micro-batch, so that a normaliser which
belongs to it (class weights, tokens that are not padding) is in every sample's share.

Where a layer couples the samples (batch normalisation in training) or draws random numbers (dropout), or where sums are
rounded coarsely (autocast), outputs are those of the whole micro-batch, passed through the model as it was in training.
A sample's share is then the gradient through its own outputs, with everybody's inputs in the forward pass,
``(d (o_1, ..., o_n) / d theta)^T (0, ..., c_k, ..., 0)``: the shares add up to the gradient all the same. Where the
loss couples samples, its own loss term's gradient, ``sum_i (d o_i / d theta)^T d term_k / d o_i``, is another share of
the same sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from explaind_core import trees
from explaind_core.derivatives.differentiable import Differentiable
from explaind_core.derivatives.kernels import differentiable_kernels
from explaind_core.derivatives.loss_coupling import couples, one_per_sample
from explaind_core.errors import QuestionError, RecordingError
from explaind_core.tensors import tolerance
from explaind_core.training_step import LossFunction, MicroBatch, run_model
from explaind_core.trees import rebuilt

__all__ = ["BatchPoint"]


class BatchPoint:
    """A micro-batch of n samples at ``theta``. Used within its :meth:`kernels`, or those for forward mode.

    Args:
        model: the architecture, in the mode that it was trained in.
        loss: returns 0-d, or one number per sample (their mean is meant).
        micro: the micro-batch.
        state: all parameters and buffers.
        start: where its samples begin in the batch.
        loss_in_autocast: whether the loss, too, was computed under the autocast that the model ran in.
        shares: ``"outputs"``: what is differentiated of a sample are its outputs, by the whole loss; ``"loss_terms"``:
            its own loss term, by everybody's outputs.

    Attributes:
        used: which tensors of the output the loss depends on.
        cotangents: the loss's derivatives with respect to these, ``[n, ...]`` each.
        activation: how many numbers a sample has in the largest output of a module.
        together: whether samples cannot be passed through the model without the others.
        coarse: whether the model ran under autocast.

    Raises:
        RecordingError: an output that the loss depends on has no row per sample, or the model draws random numbers and
            it was not recorded which.
        QuestionError: the loss returns neither one number nor one per sample.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        micro: MicroBatch,
        state: Mapping[str, Tensor],
        start: int,
        *,
        loss_in_autocast: bool = True,
        shares: str = "outputs",
    ) -> None:
        self.model, self.state, self.start, self.n = model, state, start, len(micro.ids)
        self.forward, self.rows = micro.forward, micro.rows
        self.coarse = self.forward is not None and self.forward.autocast is not None
        self._takes_gradients = False
        self.together = False  # until something shows that samples are not independent
        device = next(model.parameters()).device
        self.inputs, targets = (
            trees.map_tensors(lambda t: t.detach().to(device), t) for t in (micro.inputs, micro.targets)
        )
        self._loss, self._targets, self._weight = loss, targets, micro.weight
        self._loss_in_autocast, self._of_terms = loss_in_autocast, shares == "loss_terms"
        with self.kernels():
            self._see()

    def _first_result(self) -> Any:
        try:
            return self._run({}, self.inputs)
        except RuntimeError:  # a model that takes gradients itself, as physics-informed ones do
            self._takes_gradients = True
            found = self._run({}, self.inputs)
            return rebuilt(found, iter([t.detach() for t in trees.leaves(found)]))

    def _see(self) -> None:
        """Pass the batch through the model once: cotangents, and whether its samples are independent."""
        result = self._first_result()
        leaves = trees.leaves(result)
        inexact = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() or leaf.is_complex()]
        # Cut from each other: an output may be computed from another one, and would be counted twice.
        cut = {i: leaves[i].detach().requires_grad_() for i in inexact}
        with torch.enable_grad():
            terms = self._lost(result, {i: leaf.clone() for i, leaf in cut.items()})
            value = self._one_number(terms)
            value = value if self._weight == 1 else self._weight * value
        found: dict[int, Tensor] = {}
        if cut and value.requires_grad:
            gradients = torch.autograd.grad(value, list(cut.values()), allow_unused=True)
            found = {i: g for i, g in zip(cut, gradients, strict=True) if g is not None and bool((g != 0).any())}
        if self._of_terms:
            self._take_terms(terms)
            return
        if self.n == 1:  # its axis may have been squeezed
            found = {i: g if g.ndim and len(g) == 1 else g.unsqueeze(0) for i, g in found.items()}
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
        self._whole, self._result = list(self._used(result, self.n)), result
        if self._certainly_coupled() or not self._independent(self._whole):
            self.go_together()
        self.activation = self._largest_activation()

    def _take_terms(self, terms: Tensor) -> None:
        """Let each sample's own loss term be what is differentiated, whoever's outputs it depends on."""
        if not one_per_sample(terms, self.n):
            raise QuestionError(
                "the loss returns one number, so that no sample has a loss term of its own",
                where="shares",
                expected=f"one number per sample, ({self.n},)",
                got=tuple(terms.shape),
                remedy="pass open_run(..., loss=) one that returns each sample's (reduction='none'), or say "
                "shares='outputs'",
            )
        self.used, self._result = [0], None
        self.cotangents = [torch.full((self.n,), self._weight / self.n, dtype=terms.dtype, device=terms.device)]
        self._whole = [terms.detach().reshape(self.n)]
        self.go_together()
        self.activation = self._largest_activation()

    def _lost(self, result: Any, leaves: Mapping[int, Tensor]) -> Tensor:
        """The loss as it was called, of outputs some of whose tensors are replaced by ``leaves``."""
        given = iter([leaves.get(i, leaf) for i, leaf in enumerate(trees.leaves(result))])
        with self.standing() if self._loss_in_autocast else nullcontext():
            found: Tensor = self._loss(rebuilt(result, given), self._targets)
        return found

    def loss_couples(self) -> bool:
        """Whether the loss couples samples, as far as it can be seen here (see :func:`couples`)."""
        result = self._result
        if result is None:
            return False
        return couples(lambda o: self._lost(result, dict(zip(self.used, o, strict=True))), self._whole)

    def go_together(self) -> None:
        """Pass the samples through the model with the others from now on, whichever are asked for.

        Raises:
            RecordingError: the model draws random numbers and it was not recorded which.
        """
        self.together = True
        self._check_repeatable(self._whole)

    def _certainly_coupled(self) -> bool:
        return self.coarse or self.rows.ragged or self._draws() or self._takes_statistics()

    def _draws(self) -> bool:
        """Whether random numbers were drawn in the pass: a sample alone would be given those of another one."""
        return self.forward is not None and bool(self.forward.rng)

    def _takes_statistics(self) -> bool:
        """Whether a normalisation takes the batch's own statistics, whatever its scale makes of them now."""
        with self.standing():
            return any(
                isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
                for module in self.model.modules()
            )

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

    def _independent(self, whole: list[Tensor]) -> bool:
        """Whether the first sample alone, and some others without it, give what they give in the whole batch.

        The others are spread over the batch, its last one among them: what is shared out by order (the capacity of an
        expert) is gone there. Branches that are multiplied by zero now show in gradients only, whose sum is compared
        with the batch's (:meth:`explaind_core.derivatives.sample_derivatives.Derivatives.agree`).
        """
        spread = torch.tensor(sorted({round(1 + k * (self.n - 2) / 14) for k in range(15)}))
        for rows in (slice(0, 1), spread) if self.n > 1 else ():
            try:
                part = self.outputs({}, rows)
            except (RuntimeError, ValueError, IndexError):  # statistics of one sample, a fixed batch size, edges
                return False
            for expected, found in zip((t[rows] for t in whole), part, strict=True):
                if _difference(found, expected) is not None:
                    return False
        return True

    def _check_repeatable(self, whole: list[Tensor]) -> None:
        for expected, found in zip(whole, self.outputs({}, slice(0, self.n)), strict=True):
            got = _difference(found, expected)
            if got is not None:
                raise RecordingError(
                    "the model's outputs depend on chance, and it was not recorded which random numbers it drew",
                    where=f"batch of {self.n} samples",
                    expected="the same outputs when the batch is passed through the model again",
                    got=got,
                    remedy="let the model draw from torch's own generators, whose state is recorded before every pass "
                    "through it; give the Recorder the module that the loop calls (a compiled or wrapped one); or keep "
                    "only axes other than train",
                )

    # ------------------------------------------------------------------ the outputs as functions of the parameters
    def kernels(self) -> AbstractContextManager[None]:
        """For backward passes: those of training where other ones would round, or draw random numbers, otherwise."""
        as_trained = self.forward is not None and (self.coarse or bool(self.forward.rng))
        return differentiable_kernels(forward_mode=not as_trained)

    def standing(self) -> AbstractContextManager[Any]:
        """The model as it stood in training: modes of its modules, random state, autocast."""
        return nullcontext() if self.forward is None else self.forward.applied(self.model)

    def _run(self, parameters: Mapping[str, Tensor], inputs: Any) -> Any:
        state = {**self.state, **parameters}
        with self.standing(), torch.enable_grad() if self._takes_gradients else nullcontext():
            if self.model.training:  # in which mode a model may write to its buffers
                state |= {n: state[n].clone() for n, _ in self.model.named_buffers() if n in state}
            return run_model(lambda *a, **k: functional_call(self.model, state, a, k), inputs)

    def _used(self, result: Any, samples: int) -> tuple[Tensor, ...]:
        """The used outputs of so many samples; the axis of a single one is put back where the model squeezes it."""
        if self._of_terms:
            return (self._lost(result, {}).reshape(self.n),)
        leaves = trees.leaves(result)
        found = [leaves[i] for i in self.used]
        if samples > 1:
            return tuple(found)
        shapes = [(1, *c.shape[1:]) for c in self.cotangents]
        same = [t.numel() == math.prod(shape) for t, shape in zip(found, shapes, strict=True)]
        return tuple(t.reshape(s) if fits else t for t, s, fits in zip(found, shapes, same, strict=True))

    def _per_sample(self) -> list[bool]:
        """Of every tensor of the inputs; what has no row per sample is the same for all of them."""
        return [self.rows.per_sample(i, t, self.n) for i, t in enumerate(trees.leaves(self.inputs))]

    def outputs(self, parameters: Mapping[str, Tensor], rows: slice | Tensor) -> tuple[Tensor, ...]:
        """The used outputs of the samples ``rows``, the parameters that are not given held constant.

        Samples that go together are all passed through the model, whichever rows are asked for.

        Args:
            parameters: those that the outputs are a function of, by name.
            rows: which samples.
        """
        if self.n == (rows.stop - rows.start if isinstance(rows, slice) else -1):
            return self._used(self._run(parameters, self.inputs), self.n)
        if self.together:
            return tuple(t[rows] for t in self._used(self._run(parameters, self.inputs), self.n))
        taken = self.rows.take(self.inputs, rows, self.n)
        return self._used(
            self._run(parameters, taken), len(range(self.n)[rows]) if isinstance(rows, slice) else len(rows)
        )

    def function(self, rows: slice | Tensor) -> Differentiable:
        """:meth:`outputs` of some samples as a function that backward passes may run again.

        Args:
            rows: which samples.
        """
        return Differentiable(self.model, self.state, lambda p: self.outputs(p, rows), around=self.standing)

    def sample_inputs(self, rows: slice) -> tuple[Tensor, ...]:
        """What :meth:`sample_outputs` is to be mapped over."""
        leaves = zip(trees.leaves(self.inputs), self._per_sample(), strict=True)
        return tuple(t[rows] for t, owned in leaves if owned)

    def sample_outputs(self, parameters: Mapping[str, Tensor], sample: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The used outputs of one sample, ``[1, ...]`` each.

        Args:
            parameters: those that the outputs are a function of, by name.
            sample: its inputs, one element of :meth:`sample_inputs`.
        """
        given, owned = iter(sample), iter(self._per_sample())
        taken = trees.map_tensors(lambda t: next(given).unsqueeze(0) if next(owned) else t, self.inputs)
        return self._used(self._run(parameters, taken), 1)

    def _largest_activation(self) -> int:
        """How many numbers a sample has in the largest output of a module."""
        sizes = [1]
        samples = self.n if self.together else 1

        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            sizes.extend(-(-leaf.numel() // samples) for leaf in trees.leaves(output))

        handles = [module.register_forward_hook(see) for module in self.model.modules()]
        try:
            self.outputs({}, slice(0, self.n if self.together else 1))
        finally:
            for handle in handles:
                handle.remove()
        return max(sizes)


def _difference(found: Tensor, expected: Tensor) -> str | None:
    """How outputs differ that should be the same, in words; None where they do not, but for rounding."""
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)}"
    difference = torch.where(found == expected, 0, (found - expected).abs()).amax()
    same = bool(difference <= tolerance(expected.dtype) * expected.abs().amax())
    return None if same else f"a difference of {difference:.3g}"
