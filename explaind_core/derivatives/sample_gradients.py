r"""The gradient that an optimizer step was fed, split into the shares of its training samples.

The loss of a batch is a function of the model's outputs, ``L(o_1, ..., o_n)``, and its normaliser may belong to the
whole batch: class weights, tokens that are not padding. Where the model treats samples independently, the chain rule
splits its gradient all the same, and no loss of a single sample is ever asked for:

    g = sum_k g_k,    g_k = (d o_k / d theta)^T c_k,    c = d (weight * L) / d o, taken of the whole batch

with ``o_k`` the rows of the outputs that belong to sample k, and ``c_k`` its rows of the cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core.derivatives.batch_point import BatchPoint
from explaind_core.derivatives.differentiator import VECTORISED
from explaind_core.derivatives.factored_gradients import slices
from explaind_core.derivatives.gradient_factor import fit_factor, nearest_factor
from explaind_core.derivatives.kernels import differentiable_kernels
from explaind_core.derivatives.sample_derivatives import Derivatives, Gradients, moved, norm
from explaind_core.errors import QuestionError, RecordingError
from explaind_core.tensors import flattened
from explaind_core.training_step import Batch, LossFunction

__all__ = ["SampleGradients"]

#: So many gradients at each end of what is wanted are compared with the batch's, by random weights, before any is used.
_CONFIRMED = 8
#: Larger blocks of per-sample gradients cost more per sample: they leave the processor's cache. In bytes.
BLOCK = 2**26


class SampleGradients:
    """The gradients ``g_k`` of the samples of one step's batch, unscaled: :meth:`fit` finds the factor.

    Args:
        model: the architecture, in the mode that it was trained in, not requiring gradients; its weights are not read.
        loss: ``loss(output, target)``, 0-d or one number per sample (then their mean is meant).
        batch: the step's micro-batches. A sample that stands twice has two gradients.
        theta: the parameters where the gradient was taken.
        buffers: the model's buffers then.
        names: the parameters whose gradients are wanted; the others are constants.
        chunk: samples in one pass through the model.
        memory: bytes that a block of per-sample gradients may take.
        **how: ``loss_in_autocast`` and ``shares``, see :class:`explaind_core.derivatives.batch_point.BatchPoint`.

    Attributes:
        ids: int64 ``[n]``, the samples' ids, in order over all micro-batches.

    Raises:
        RecordingError: the batch cannot be split: an output that the loss depends on has no row per sample, or what
            the model returns for a sample depends on the other samples.
        QuestionError: the loss returns neither one number nor one per sample.

    Example:
        >>> from explaind_core.run.run import Batch, MicroBatch
        >>> model = nn.Linear(1, 1, bias=False).requires_grad_(False)
        >>> inputs = torch.tensor([[1.0], [2.0]])
        >>> batch = Batch((MicroBatch(torch.tensor([7, 3]), inputs, torch.zeros(2, 1), 1.0),))
        >>> gradients = SampleGradients(model, nn.MSELoss(), batch, {"weight": torch.tensor([[3.0]])}, {}, ["weight"])
        >>> gradients.total(), gradients.fit({"weight": torch.tensor([[7.5]])}, step=1)
        ({'weight': tensor([[15.]])}, 0.5)
        >>> gradients.inner([{"weight": torch.ones(1, 1, 1)}]).tolist()  # the mean of (w x)^2: g_k = w x^2
        [[[3.0, 12.0]]]
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        batch: Batch,
        theta: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        names: Sequence[str],
        *,
        chunk: int = 500,
        memory: int = 2**29,
        **how: Any,
    ) -> None:
        reference = next(model.parameters())
        self._device, self._dtype = reference.device, reference.dtype
        self._theta = {n: _own_storage(t.detach().to(self._device)) for n, t in theta.items()}
        self.names, self.ids = list(names), batch.ids.to(torch.int64)
        self._chunk, self._memory = chunk, min(memory, BLOCK)
        self._derivatives = Derivatives(model, self._theta, self.names, self._memory)
        self._forward_mode = True  # False once an operator of the model had no forward-mode derivative
        self._sums: dict[str, Gradients] = {}
        self._points: list[BatchPoint] = []
        # The same batch at other parameters.
        self._elsewhere: Callable[[Gradients], SampleGradients] = lambda theta: SampleGradients(
            model, loss, batch, theta, buffers, names, chunk=chunk, memory=memory, **how
        )
        state = {**self._theta, **{n: b.to(self._device) for n, b in buffers.items()}}
        for micro in batch.micro:
            start = sum(p.n for p in self._points)
            self._points.append(BatchPoint(model, loss, micro, state, start, **how))
        self._derivatives.coarse = any(point.coarse for point in self._points)
        self._weights = torch.rand(len(self.ids), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5

    # ------------------------------------------------------------------ sums of gradients, by ordinary backward passes
    def total(self) -> Gradients:
        """``sum_k g_k``, unscaled, by ordinary backward passes: name -> tensor of the parameter's shape."""
        return dict(self._summed("total", torch.ones(len(self.ids))))

    def fit(
        self,
        recorded: Mapping[str, Tensor],
        *,
        step: int,
        factor: float = 1.0,
        limit: float | None = None,
        names: Sequence[str] | None = None,
    ) -> float:
        """The factor c with ``recorded = c * total``: a clip coefficient, 1 for most runs.

        Args:
            recorded: the gradients that the step was fed, dense or sparse; a parameter may have none.
            step: for the error.
            factor: what c is declared to be (:meth:`explaind_core.Run.gradient_factor`). It counts only where gradients
                cancel so far that c cannot be told from them.
            limit: the largest entry of ``recorded``, where single entries were clipped.
            names: the parameters to look at, all by default.

        Raises:
            RecordingError: no factor makes the recorded gradient that of the samples, to 1e-9 of each tensor's norm
                (float32: 1e-3) and the rounding of the sum.
        """

        def tried() -> float:
            total = {n: t for n, t in self.total().items() if names is None or n in names}
            return fit_factor(recorded, total, self._rounding, step=step, declared=factor, limit=limit)

        try:
            return tried()
        except RecordingError:
            # Pieces of a large batch may be coupled by what no output of some of its samples shows.
            if not any(point.n > self._chunk and not point.together for point in self._points):
                raise
            self._go_together()
            return tried()

    def nearest(self, recorded: Mapping[str, Tensor], *, factor: float = 1.0, limit: float | None = None) -> float:
        """As :meth:`fit`, by least squares alone, whether it fits or not."""
        return nearest_factor(recorded, self.total(), declared=factor, limit=limit)

    def _rounding(self) -> dict[str, float]:
        """How large the rounding errors of :meth:`total` may be, by parameter.

        Two things are measured, with signs drawn at random. What rounding makes of each sample's gradient moves their
        sum as ``eps sum_k +-g_k`` does. And the gradient moves with the weights: a dot product in finite arithmetic is
        an exact one of numbers that are off by eps, so weights off by eps show what the rounding of the outputs does to
        the cotangents. The factor 64 is for the lengths of the dot products, and for luck.
        """
        generator = torch.Generator().manual_seed(0)
        eps = torch.finfo(self._dtype).eps

        def signs(t: Tensor) -> Tensor:
            return (torch.randint(2, t.shape, generator=generator) * 2 - 1).to(self._device, self._dtype)

        beside = self._elsewhere({n: t * (1 + eps * signs(t)) for n, t in self._theta.items()}).total()
        signed = self.weighted(signs(self.ids).unsqueeze(0))
        return {n: 64 * float((beside[n] - t).norm() + eps * signed[n].norm()) for n, t in self.total().items()}

    def weighted(self, weights: Tensor) -> Gradients:
        """``sum_k weights[g, k] g_k`` for weights ``[G, n]``, by one backward pass a row: name -> ``[G, *shape]``.

        Raises:
            QuestionError: not one weight per sample.
        """
        if weights.ndim != 2 or weights.shape[1] != len(self.ids):
            raise QuestionError("not one weight per sample", expected=f"(G, {len(self.ids)})", got=tuple(weights.shape))
        weights = weights.to(self._device, self._dtype)
        result = {n: self._theta[n].new_zeros(len(weights), *self._theta[n].shape) for n in self.names}
        for point, rows, positions in self._pieces(self._chunk):
            here = weights[:, positions]
            groups = here.any(1).nonzero().flatten()
            if not len(groups):  # a group need not have a sample in every piece
                continue
            with point.kernels():
                found = self._derivatives.weighted(point, rows, here[groups])
            for name, sums in found.items():
                result[name][groups] += sums
        return result

    def _summed(self, key: str, weights: Tensor) -> Gradients:
        if key not in self._sums:
            self._sums[key] = {n: t[0] for n, t in self.weighted(weights[None]).items()}
        return self._sums[key]

    @property
    def together(self) -> bool:
        """Whether there are samples that only pass through the model together."""
        return any(point.together for point in self._points)

    @property
    def way(self) -> str | None:
        """How gradients of single samples were taken, None where vectorised by ``torch.func``."""
        return None if self._derivatives.way == VECTORISED else self._derivatives.way

    def loss_couples(self) -> bool:
        """Whether the loss couples samples, so that a share through a sample's outputs is not its own loss term's."""
        with differentiable_kernels():
            return any(point.loss_couples() for point in self._points)

    def _go_together(self) -> bool:
        """Take no sample for independent of the others any more; False where none was."""
        for point in (apart := [point for point in self._points if not point.together]):
            point.go_together()
        self._sums.clear()
        return bool(apart)

    def _pieces(self, size: int, *, apart: bool = False) -> Iterator[tuple[BatchPoint, slice, slice]]:
        """The batch by pieces: of which micro-batch, which of its samples, and their positions in the batch.

        Samples that only go together are not cut, unless they are wanted ``apart``.
        """
        for point in self._points:
            for rows in slices(point.n, point.n if point.together and not apart else size):
                yield point, rows, moved(rows, point.start)

    # ------------------------------------------------------------------ gradients of single samples
    def chunks(self, wanted: Tensor | None = None) -> Iterator[tuple[slice, Gradients]]:
        """The gradients themselves, by blocks of at most ``memory`` bytes (and at least one sample).

        Args:
            wanted: bool ``[n]``: blocks in which no sample is wanted are left out.

        Yields:
            The positions of the samples in the batch, and name -> ``[b, *shape]``.

        Raises:
            RecordingError: the gradient of the batch is not the sum of its samples' gradients.
        """
        self._confirm(wanted)
        sums, squares = self._zeros(self.names)
        given = torch.zeros(len(self.ids))
        size = min(self._chunk, self._derivatives.fitting(self.names))
        for point, rows, positions in self._pieces(size, apart=True):
            if wanted is not None and not bool(wanted[positions].any()):
                continue
            given[positions] = 1
            with point.kernels():
                gradients = self._derivatives.materialised(point, rows, self.names)
            for name, values in gradients.items():
                sums[name] += values.sum(0)
                squares[name] += values.norm() ** 2
            yield positions, gradients
        expected = self.total() if bool(given.all()) else self._summed("given", given)
        self._derivatives.agree(sums, squares, expected, factored=False)

    def _confirm(self, wanted: Tensor | None) -> None:
        """Compare some samples' gradients with the batch's before any is handed out, which could not be taken back.

        Where they are others alone than among the others of the batch, they all go together from then on.
        """
        for point in self._points:
            asked = torch.arange(point.n) if wanted is None else wanted[point.start :][: point.n].nonzero().flatten()
            if point.together or not len(asked):
                continue
            sums, squares = self._zeros(self.names)
            weights = torch.zeros(len(self.ids), dtype=torch.float64)
            first, last = int(asked[0]), int(asked[-1])
            for rows in {(first, min(first + _CONFIRMED, point.n)), (max(last + 1 - _CONFIRMED, first), last + 1)}:
                some = slice(*rows)
                weight = self._weights[moved(some, point.start)].to(self._device, self._dtype)
                with point.kernels():
                    found = self._derivatives.materialised(point, some, self.names)
                for name, values in found.items():
                    sums[name] += torch.tensordot(weight, values, 1)
                    squares[name] += values.norm() ** 2
                weights[moved(some, point.start)] += weight.cpu()
            try:
                self._derivatives.agree(
                    sums, squares, {n: t[0] for n, t in self.weighted(weights[None]).items()}, factored=False
                )
            except RecordingError:
                self._go_together()
                return

    def _zeros(self, names: Iterable[str]) -> tuple[Gradients, Gradients]:
        """For sums of gradients by parameter, and of squared norms."""
        return (
            {n: torch.zeros_like(self._theta[n]) for n in names},
            {n: self._theta[n].new_zeros(()) for n in names},
        )

    def inner(self, parts: Sequence[Mapping[str, Tensor]], *, method: str = "materialised") -> Tensor:
        """``<d_r, g_k>`` for directions over some parameters each, ``{name: [R, *shape]}`` with R the same for all.

        Args:
            parts: for instance, one per layer. A parameter may be in several parts.
            method: ``"materialised"`` costs a backward pass and the gradients, or the factors of which they are
                made, for all directions together; ``"directional"`` a forward-mode derivative per part and
                direction, which is cheaper for one or two. Where the model has none, gradients are materialised.

        Returns:
            float64 ``[len(parts), R, n]``, in main memory.

        Raises:
            QuestionError: no such method; directions of other parameters or shapes.
            RecordingError: the gradient of the batch is not the sum of its samples' gradients.
        """
        if method not in ("materialised", "directional"):
            raise QuestionError("there is no such method", expected="'materialised' or 'directional'", got=method)
        stacked, R = self._directions(parts)
        result = torch.zeros(len(parts), R, len(self.ids), dtype=torch.float64)
        if not result.numel():
            return result
        try:
            return self._products(parts, stacked, result, method)
        except RecordingError:
            if not self._go_together():
                raise
            return self._products(parts, stacked, result.zero_(), method)

    def _products(
        self,
        parts: Sequence[Mapping[str, Tensor]],
        stacked: Mapping[str, tuple[list[int], Tensor]],
        result: Tensor,
        method: str,
    ) -> Tensor:
        R = result.shape[1]
        if self.together and not any(point.coarse for point in self._points):
            # A sample's gradient costs as much as the whole batch's here, and so does a direction.
            method = "directional" if R * sum(map(bool, parts)) < len(self.ids) else method
        if method == "directional" and self._forward_mode:
            try:
                with differentiable_kernels():
                    return self._directional(parts, result)
            except (RuntimeError, RecordingError):
                # An operator without a forward-mode derivative, or with one that is not its gradient (the padding
                # row of an embedding has no gradient, and moves all the same); a real error shows up again.
                self._forward_mode = False
                result.zero_()
        while not self._materialised(stacked, result):
            result.zero_()
        return result

    def _materialised(self, stacked: Mapping[str, tuple[list[int], Tensor]], result: Tensor) -> bool:
        """False where another way was found to be needed for a parameter: try again."""
        sums, squares = self._zeros(stacked)
        directions = {name: d for name, (_, d) in stacked.items()}
        for point, rows, _ in self._pieces(self._chunk):
            with point.kernels():
                for name, some, products, total, square in self._derivatives.contracted(point, rows, directions):
                    owners = stacked[name][0]
                    blocks = products.double().cpu().view(-1, len(owners), result.shape[1])
                    result[owners, :, moved(some, point.start)] += blocks.permute(1, 2, 0)
                    sums[name] += total
                    squares[name] += square
        return self._derivatives.agree(sums, squares, self.total())

    def _directions(self, parts: Sequence[Mapping[str, Tensor]]) -> tuple[dict[str, tuple[list[int], Tensor]], int]:
        """By parameter: which parts it is in, and all their directions ``[parts * R, *shape]``; and R."""
        counts = {len(d) for part in parts for d in part.values()}
        named = [(n, d) for part in parts for n, d in part.items()]
        wrong = [n for n, d in named if n not in self.names or d.shape[1:] != self._theta[n].shape]
        if wrong or len(counts) > 1:
            raise QuestionError(
                "directions do not fit the parameters",
                where=f"parameter {wrong[0]!r}" if wrong else None,
                expected=f"[R, *shape] for some of {self.names}, with the same R for all",
                got=[(n, tuple(d.shape)) for n, d in named],
            )
        found = {}
        for name in self.names:
            owners = [i for i, part in enumerate(parts) if name in part]
            if owners:
                found[name] = owners, torch.cat([parts[i][name].to(self._device, self._dtype) for i in owners])
        return found, max(counts, default=0)

    def _directional(self, parts: Sequence[Mapping[str, Tensor]], result: Tensor) -> Tensor:
        R = result.shape[1]
        sums = self._summed("weighted", self._weights)
        for index, part in enumerate(parts):
            tangents = {n: d.to(self._device, self._dtype) for n, d in part.items()}
            for point in self._points if tangents else ():
                # All directions at once for fewer samples, unless these would be too few to be worth their calls.
                size = min(self._chunk, max(64, self._derivatives.passes(point, R)))
                size = point.n if point.together else size
                for rows in slices(point.n, size) if point.cotangents else ():
                    block = self._derivatives.along(point, rows, tangents)
                    result[index, :, moved(rows, point.start)] = block.cpu()
            products = [(flattened(d, 1) @ sums[n].flatten(), flattened(d, 1).norm(dim=1)) for n, d in tangents.items()]
            for r in range(R) if products else ():
                each = result[index, r] * self._weights
                error = each.sum() - sum(float(product[r]) for product, _ in products)
                scale = norm(sums.values()) * norm(size[r] for _, size in products)
                self._derivatives.check_sum(f"part {index}, direction {r}", error, each.abs().sum(), scale)
        return result


def _own_storage(t: Tensor) -> Tensor:
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
