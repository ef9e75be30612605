"""Derivatives of a piece of a batch: summed over its samples, sample by sample, and along directions.

Each of them is taken in one vectorised pass where the model allows it, and one by one where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from explaind_core.derivatives.batch_point import BatchPoint
from explaind_core.derivatives.differentiable import module_at_fault
from explaind_core.derivatives.differentiator import AUTOGRAD, VECTORISED, not_of_the_way
from explaind_core.derivatives.factored_gradients import Sum, slices
from explaind_core.derivatives.ordinary_autograd import OrdinaryAutograd
from explaind_core.derivatives.plain_layers import PlainLayers, Use
from explaind_core.errors import RecordingError

__all__ = ["Derivatives", "Gradients", "moved", "norm"]

Gradients = dict[str, Tensor]


class Derivatives:
    """The derivatives of a model at ``theta``. Used within ``feature_maps.differentiable_kernels``.

    Args:
        model: its hooks are used while it runs.
        theta: each parameter with its own storage (forward mode costs a view its whole storage).
        names: those whose gradients are wanted.
        memory: bytes that a vectorised block may take.
    """

    def __init__(self, model: nn.Module, theta: Mapping[str, Tensor], names: Sequence[str], memory: int) -> None:
        self._theta, self._names, self._memory = theta, list(names), memory
        self._plain = PlainLayers(model, names)
        self._dtype = next(model.parameters()).dtype
        self._chosen = False
        #: Whether terms are rounded as autocast does: to two or three digits.
        self.coarse = False
        # What vmap cannot vectorise of this model (data-dependent control flow, operators without a batching rule)
        # is done one by one from then on. That gives the same numbers, and a real error shows up there again.
        self._one_by_one: set[str] = set()
        #: For backward passes that torch.autograd.grad refuses.
        self._autograd = OrdinaryAutograd()
        self._recomputes = False

    @property
    def way(self) -> str:
        """How gradients of samples were taken: vectorised by ``torch.func``, or one by one by ordinary autograd."""
        return AUTOGRAD if self._one_by_one & {"each", "pull"} or self._recomputes else VECTORISED

    def fitting(self, names: Sequence[str]) -> int:
        """How many samples' gradients fit the memory, at least 1."""
        return max(1, self._memory // max(1, self._dtype.itemsize * self._size(names)))

    def passes(self, point: BatchPoint, count: int) -> int:
        """How often ``count`` samples may go through the model at once, at least 1: it holds four activations each."""
        return max(1, self._memory // (4 * self._dtype.itemsize * point.activation * count))

    # ------------------------------------------------------------------ sums over samples
    def weighted(self, point: BatchPoint, rows: slice, weights: Tensor) -> Gradients:
        """``sum_k weights[g, k] g_k`` over the samples ``rows``, for weights ``[G, b]``: ``[G, *shape]``.

        Args:
            point: the micro-batch, within its kernels.
            rows: which of its samples, b of them.
            weights: ``[G, b]``.
        """
        size = min(self.passes(point, rows.stop - rows.start), self.fitting(self._names))

        def work(parameters: Gradients) -> Gradients:
            outputs, cotangents = self._forward(point, rows, parameters)
            sums: list[list[Tensor]] = [[] for _ in self._names]
            for block in slices(len(weights), size):
                scaled = [_scaled(c, weights[block]) for c in cotangents]
                each = self._pull_each(outputs, list(parameters.values()), scaled, weights[block])
                for blocks, values in zip(sums, each, strict=True):
                    blocks.append(values)
            return {n: torch.cat(blocks) for n, blocks in zip(self._names, sums, strict=True)}

        def again() -> Gradients:
            scaled = tuple(_scaled(c[rows], weights) for c in point.cotangents)
            primals = {n: self._theta[n] for n in self._names}
            return self._autograd.pull(point.function(rows), primals, scaled)

        return self._passed(point, rows, self._names, work, again)

    def _passed(
        self,
        point: BatchPoint,
        rows: slice,
        names: Sequence[str],
        work: Callable[[Gradients], Gradients],
        again: Callable[[], Gradients],
    ) -> Gradients:
        """What ``work`` makes of a forward pass and its backward passes, the model itself standing at the parameters.

        Activations may be computed again on the way back. Where these accept ``backward()`` alone, or ask for inputs
        with gradients (``use_reentrant=True``), ``again`` does it.
        """
        if not point.cotangents:
            return work({n: self._theta[n] for n in names})
        try:
            if not self._recomputes:
                parameters = {n: self._theta[n].detach().requires_grad_() for n in names}
                try:
                    return point.function(rows).standing(parameters, lambda: work(parameters))
                except RuntimeError as error:
                    if "use_reentrant" not in str(error) and "Checkpoint" not in str(error):
                        raise
                self._recomputes = True
            return again()
        except Exception as error:
            if not_of_the_way(error):
                raise
            module = module_at_fault(point.model, error)
            raise RecordingError(
                "the gradients of samples cannot be taken",
                where=f"batch of {point.n} samples, {module or 'the model'}",
                expected="a forward pass that loss.backward() can go back through, as it did in training",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                remedy="look at the part of the model that is named: what was changed since the run was recorded? Keep "
                "only axes other than train otherwise",
            ) from error

    def _forward(
        self, point: BatchPoint, rows: slice | Tensor, parameters: Gradients
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of some samples that depend on the parameters, and the cotangents of these."""
        with torch.enable_grad():
            outputs = point.outputs(parameters, rows)
        depend = [i for i, output in enumerate(outputs) if output.requires_grad]
        return [outputs[i] for i in depend], [point.cotangents[i][rows] for i in depend]

    def _pull_each(
        self, outputs: list[Tensor], parameters: list[Tensor], cotangents: list[Tensor], weights: Tensor
    ) -> list[Tensor]:
        if len(weights) > 1 and outputs and "pull" not in self._one_by_one:
            try:
                return _pull(outputs, parameters, cotangents, retain_graph=True, is_grads_batched=True)
            except (RuntimeError, NotImplementedError) as error:
                if "use_reentrant" in str(error) or "Checkpoint" in str(error):
                    raise
                self._one_by_one.add("pull")
        each = [_pull(outputs, parameters, [c[g] for c in cotangents], retain_graph=True) for g in range(len(weights))]
        return [torch.stack(values) for values in zip(*each, strict=True)]

    # ------------------------------------------------------------------ sample by sample
    def materialised(self, point: BatchPoint, rows: slice, names: Sequence[str]) -> Gradients:
        """``g_k`` of the samples ``rows``, of any model: ``[b, *shape]``."""
        if point.together:  # the whole batch, as often as there are samples, with the cotangents of one of them
            one_hot = torch.eye(point.n, dtype=self._dtype, device=next(iter(self._theta.values())).device)[rows]
            return self.weighted(point, slice(0, point.n), one_hot)
        primals = {n: self._theta[n] for n in names}

        def one(sample: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Gradients:
            pull: Callable[..., tuple[Gradients]] = vjp(lambda p: point.sample_outputs(p, sample), primals)[1]
            return pull(tuple(c.unsqueeze(0) for c in cotangents))[0]

        if point.cotangents and "each" not in self._one_by_one:
            try:
                return dict(vmap(one)(point.sample_inputs(rows), tuple(c[rows] for c in point.cotangents)))
            except Exception as error:
                if not_of_the_way(error):
                    raise
                self._one_by_one.add("each")
        each = [self._alone(point, slice(k, k + 1), names) for k in range(rows.start, rows.stop)]
        return {n: torch.stack([gradients[n] for gradients in each]) for n in names}

    def _alone(self, point: BatchPoint, row: slice, names: Sequence[str]) -> Gradients:
        """The gradient of one sample, by a backward pass of its own."""

        def work(parameters: Gradients) -> Gradients:
            outputs, cotangents = self._forward(point, row, parameters)
            return dict(zip(names, _pull(outputs, list(parameters.values()), cotangents), strict=True))

        def again() -> Gradients:
            given = tuple(c[row].unsqueeze(0) for c in point.cotangents)
            found = self._autograd.pull(point.function(row), {n: self._theta[n] for n in names}, given)
            return {n: g[0] for n, g in found.items()}

        return self._passed(point, row, names, work, again)

    def contracted(
        self, point: BatchPoint, rows: slice, directions: Gradients
    ) -> Iterator[tuple[str, slice, Tensor, Tensor, Tensor]]:
        """``<d_r, g_k>`` for directions ``{name: [R, *shape]}``, with what :meth:`agree` needs.

        Args:
            point: the micro-batch, within its kernels.
            rows: which of its samples.
            directions: parameter name -> ``[R, *shape]``.

        Yields:
            The name, some of the samples, their products ``[b, R]``, the sum of their gradients, and the squared norm
            of the terms of that sum. A name may come several times.
        """
        self._choose(point)
        b = rows.stop - rows.start
        # Outer products know a sample by its row in what a layer saw. A cotangent that spreads over all rows has none.
        plain = [] if point.together else [n for n in directions if n in self._plain.names]
        uses = self._watched(point, rows, plain)[0] if plain else []
        for name in plain:
            for term in self._plain.factors(name, uses, b):
                products, total = term.inner(directions[name], self._memory)
                yield name, rows, products, total, term.square_norms()
        del uses
        others = [n for n in directions if n not in plain]
        for some in slices(b, self.fitting(others)) if others else ():
            gradients = self.materialised(point, moved(some, rows.start), others)
            for name in others:
                factors = Sum(gradients.pop(name).unsqueeze(1))
                products, total = factors.inner(directions[name], self._memory)
                yield name, moved(some, rows.start), products, total, factors.square_norms()

    def _watched(
        self, point: BatchPoint, rows: slice | Tensor, names: Sequence[str]
    ) -> tuple[list[Use], list[Tensor], list[Tensor], list[Tensor]]:
        """One batched backward pass that sees what the layers saw, and the gradients at their outputs."""
        with self._plain.watched(names) as uses:
            given = {n: self._theta[n].detach().requires_grad_() for n in names}
            outputs, cotangents = self._forward(point, rows, given)
        parameters = list(given.values())
        if outputs and uses:
            edges = [use.edge for use in uses]
            deltas = torch.autograd.grad(outputs, edges, cotangents, retain_graph=True, allow_unused=True)
            for use, delta in zip(uses, deltas, strict=True):
                use.delta = delta
        return uses, parameters, outputs, cotangents

    def _choose(self, point: BatchPoint) -> None:
        """Find the parameters of which factors may be used.

        Those where the first axis of what their layers saw is that of the samples. A plain sum is the same over any
        axis, so the samples that count most are summed with a weight each, and compared with the gradient of the
        batch so weighted. And only if they are most of the numbers: if not, one pass for all is cheaper than two.
        """
        if self._chosen or point.together:
            return
        self._chosen = point.n > 1  # the axis of a single sample cannot be mistaken
        sizes = sum(c.flatten(1).square().sum(1) if c.ndim > 1 else c.square() for c in point.cotangents)
        rows = torch.topk(sizes, min(point.n, 8)).indices if isinstance(sizes, Tensor) else slice(0, 1)
        names = sorted(self._plain.names)
        try:
            uses, parameters, outputs, cotangents = self._watched(point, rows, names)
        except Exception as error:  # activations that are computed again, where the parameters are gone
            if not_of_the_way(error):
                raise
            self._plain.names.clear()
            return
        b = len(cotangents[0]) if cotangents else 1
        weights = torch.linspace(0.5, 1.5, b).to(next(iter(self._theta.values())))
        expected = _pull(outputs, parameters, [_scaled(c, weights) for c in cotangents])
        for use in uses:
            if use.delta is not None and use.fits(b):
                use.delta = _scaled(use.delta, weights.repeat_interleave(len(use.delta) // b))
        for name, value in zip(names, expected, strict=True):
            total, square = torch.zeros_like(value), value.new_zeros(())
            for term in self._plain.factors(name, uses, b):
                total, square = total + term.merged(), square + term.square_norms()
            if square == 0:  # nothing was seen
                self._plain.names.discard(name)
            self._plain_if_same(name, total, value, square)
        if 2 * self._size(self._plain.names) < self._size(self._names):
            self._plain.names.clear()

    def _size(self, names: Iterable[str]) -> int:
        return sum(self._theta[n].numel() for n in names)

    # ------------------------------------------------------------------ along directions
    def along(self, point: BatchPoint, rows: slice, tangents: Gradients) -> Tensor:
        """``<d_r, g_k>`` for ``{name: [R, *shape]}``: ``[R, b]`` in float64.

        One forward-mode derivative of the outputs along each d_r, times the cotangents.

        Args:
            point: the micro-batch, within kernels for forward mode.
            rows: which of its samples, b of them.
            tangents: parameter name -> ``[R, *shape]``.
        """
        primals = {n: self._theta[n] for n in tangents}

        def along(tangent: Gradients) -> Tensor:
            derivatives: tuple[Tensor, ...] = jvp(lambda p: point.outputs(p, rows), (primals,), (tangent,))[1]
            products = [d * c[rows] for d, c in zip(derivatives, point.cotangents, strict=True)]
            return torch.stack([p.reshape(len(p), -1).sum(1, dtype=torch.float64) for p in products]).sum(0)

        count = len(next(iter(tangents.values())))
        blocks = []
        for some in slices(count, self.passes(point, rows.stop - rows.start)):
            block = {n: d[some] for n, d in tangents.items()}
            if count > 1 and "along" not in self._one_by_one:
                try:
                    blocks.append(vmap(along)(block))
                    continue
                except (RuntimeError, NotImplementedError):
                    self._one_by_one.add("along")
            blocks += [along({n: d[r].clone() for n, d in block.items()})[None] for r in range(some.stop - some.start)]
        return torch.cat(blocks)

    # ------------------------------------------------------------------ checks
    def agree(self, sums: Gradients, squares: Gradients, totals: Gradients, *, factored: bool = True) -> bool:
        """Whether the gradients of the samples, summed over all of the batch, are those of the batch.

        False where outer products of a parameter's layers miss something: they will not be used again.

        Args:
            sums: parameter name -> the sum of the samples' gradients.
            squares: parameter name -> the sum of their squared norms, 0-d.
            totals: parameter name -> the gradient of the whole batch.
            factored: whether outer products were used.

        Raises:
            RecordingError: gradients taken sample by sample do not agree, either.
        """
        plain, scale = set(self._plain.names) if factored else set(), norm(totals.values())
        for name, total in sums.items():
            if name in plain:
                self._plain_if_same(name, total, totals[name], squares[name])
            else:
                self.check_sum(f"parameter {name!r}", (total - totals[name]).norm(), squares[name].sqrt(), scale)
        return plain <= self._plain.names

    def _plain_if_same(self, name: str, total: Tensor, expected: Tensor, square: Tensor) -> None:
        # The same terms in another order. Where this is too strict, nothing is lost but time.
        bound = 1000 * torch.finfo(self._dtype).eps * (square.sqrt() + expected.norm())
        if not bool((total - expected).norm() <= bound):
            self._plain.names.discard(name)

    def check_sum(self, where: str, error: Tensor, size: Tensor, scale: Tensor) -> None:
        """Refuse gradients whose sum differs by ``error`` from that of the batch.

        Args:
            where: what the gradients belong to, for the error.
            error: the difference between the sum and the gradient of the batch, 0-d.
            size: of the terms of the sum, as a norm.
            scale: the norm of the gradient of all parameters, as a measure of rounding.

        Raises:
            RecordingError: ``error`` is more than rounding.
        """
        # Rounding of each term, and of their sum. A kink of one sample that rounding decides otherwise may exceed it.
        eps = torch.finfo(self._dtype).eps
        bound = (0.1 if self.coarse else 2000 * eps) * size + 1e4 * eps * scale
        if not bool(error.abs() <= bound):
            raise RecordingError(
                "the gradient of the batch is not the sum of the gradients of its samples",
                where=where,
                expected=f"a difference of at most {float(bound):.3g}",
                got=f"{float(error.abs()):.3g}",
                remedy="something in the model changes gradients on their way back, by the batch that they come from: "
                "an embedding with scale_grad_by_freq, or a backward hook",
            )


def moved(rows: slice, start: int) -> slice:
    """``rows``, counted from elsewhere.

    Example:
        >>> moved(slice(0, 2), 5)
        slice(5, 7, None)
    """
    return slice(start + rows.start, start + rows.stop)


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of tensors taken together: 0-d.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor(4.0)])
        tensor(5.)
    """
    squares: Tensor = torch.stack([t.detach().norm() for t in tensors]).square().sum()
    return squares.sqrt()


def _scaled(cotangent: Tensor, weights: Tensor) -> Tensor:
    """Each sample's rows times its weight: ``[b, ...]`` and ``[..., b]`` to ``[..., b, ...]``."""
    return cotangent * weights.to(cotangent.dtype).view(*weights.shape, *[1] * (cotangent.ndim - 1))


def _pull(outputs: list[Tensor], parameters: list[Tensor], cotangents: list[Tensor], **options: bool) -> list[Tensor]:
    """The gradients of ``<outputs, cotangents>``, dense; zero where nothing depends on a parameter."""
    if not outputs:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True, **options)
    several = (len(cotangents[0]),) if options.get("is_grads_batched") else ()
    return [
        p.new_zeros((*several, *p.shape)) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)
    ]
