"""The reverse-time adjoint: the kernel split by training sample or gradient step, in memory that knows neither.

For every window of steps S, and every test functional x, with z = 0 behind the last step (paper, Theorem 3.1, with the
sums over s and i swapped)::

    psi_s = P_s^T phi_s(x)  if s in S else 0
    a_s   = E_s^T ( D_s^T psi_s + B_s^T z )          what g_s is worth to x
    z     = A_s^T z + C_s^T psi_s                    for the step before
    kernel_S(x, k) = - sum_s < a_s, g_{s,k} >

One row of states per (window, layer, test sample, output) as far as these are kept: nothing of the size of the
training set or of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from explaind_core.decomposition import FLAT, StepDecomposition, Tape, term_names, updates_of
from explaind_core.derivatives import climb
from explaind_core.errors import QuestionError
from explaind_core.questions import (
    Contribution,
    Findings,
    Layer,
    Places,
    Question,
    Segment,
    WindowSum,
    finite_values,
    reduced,
)
from explaind_core.rules import FilterState, StepCoefficients, apply_each, is_elementwise
from explaind_core.strategies.reverse import feature_map, rest_change
from explaind_core.strategies.shares import GradientSplitter
from explaind_core.tensors import flattened, to_dense

__all__ = ["AdjointWalk", "State"]

FeatureMap = dict[str, Tensor]
#: What every step's gradient is worth to a window: by layer, parameter name -> ``[R, *shape]``.
Worth = list[dict[str, Tensor]]


@dataclass
class State:
    """One window's adjoint states: (position of the layer, unit) -> z, each ``[R, *shape]``."""

    z: dict[tuple[int, str], FilterState] = field(default_factory=dict)
    peak: float = 0.0

    def size(self) -> float:
        """The 2-norm of all states."""
        return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for z in self.z.values() for t in z))


class AdjointWalk:
    """Answers a question for a block of test samples, walking back along the tape once.

    Args:
        question: the question.
        tape: of its run, up to its last step (None to try single steps).
        block: the test samples.
        outputs: J.
        scale: what the quadrature's tolerance is a fraction of.
        method: ``"materialised"`` or ``"directional"``: how gradients of samples are multiplied.
        splitter: of all walks that belong together; one of its own by default.
    """

    def __init__(
        self,
        question: Question,
        tape: Tape | None,
        block: slice,
        outputs: int,
        scale: float,
        *,
        method: str = "materialised",
        splitter: GradientSplitter | None = None,
    ) -> None:
        self.question, self.tape, self.block, self.scale, self.method = question, tape, block, scale, method
        self.splitter = GradientSplitter(question) if splitter is None else splitter
        self.names, self.places = term_names(question.run), Places(question)
        rows = block.stop - block.start
        self.sums = [WindowSum(question, w, outputs, question.terms, rows) for w in range(len(question.windows))]
        self.ends = {segment.steps[-1]: segment for segment in question.segments}
        self.inside = {s: segment for segment in question.segments for s in segment.steps}
        self.row_of = {s: n for n, s in enumerate(question.gradient_steps)}
        self.alive: dict[int, State] = {}
        #: Window -> the step below which what is left of its states is smaller than rounding, and was dropped.
        self.dropped: dict[int, int] = {}
        self.rung = 0

    def run(self, advanced: Callable[[int], object] = id) -> list[Contribution]:
        """Walk back; ``advanced(1)`` is called after every step."""
        segment: Segment | None = None
        phi: FeatureMap = {}
        edges: dict[int, tuple[Tensor, Tensor]] = {}
        assert self.tape is not None
        for split in self.tape.backwards():
            s = split.step
            if s in self.ends:
                segment = self.ends[s]
                phi, edges[s] = self._feature_map(segment, split)
                self.alive.setdefault(segment.window, State())
            inside = segment is not None and s in segment.steps
            if inside and segment is not None:
                self._add_plain_terms(segment, split, phi)
            if self.alive:
                worth = self.advance(split, segment.window if inside and segment is not None else None, phi)
                self.add_kernel(split, worth)
                self._drop(s)
            advanced(1)
            if not self.alive and s <= self.question.steps[0]:
                advanced(s - 1)
                break
        self._add_gaps(edges)
        self.sums[0].findings = self.splitter.take() | Findings(tail_dropped=self._tails())
        return [total.finish() for total in self.sums]

    # ------------------------------------------------------------------ the test side
    def _feature_map(self, segment: Segment, split: StepDecomposition) -> tuple[FeatureMap, tuple[Tensor, Tensor]]:
        """The feature map of a segment, its rows flattened: name -> ``[R, *shape]``; and f at both ends."""
        question, total = self.question, self.sums[segment.window]
        a, b = segment.steps[0] - 1, segment.steps[-1]
        start = question.run.theta(a) if len(segment.steps) > 1 else split.theta_before
        end = after = reduced(finite_values(question, split.theta, b, self.block), question)
        if question.function.moves:
            after = reduced(finite_values(question, split.theta, b, self.block, buffers=a), question)
        before = reduced(finite_values(question, start, a, self.block), question)
        function = question.function.at(a)
        moved = {n: split.theta[n].double() - start[n].double() for n in start}
        rest = None if question.rest is None else question.rest.share(moved)

        def evaluate(q: int) -> tuple[Tensor, tuple[FeatureMap, Tensor]]:
            points = question.quadrature.points(q)
            phi = feature_map(question, function, start, split.theta, self.places.names, self.block, points)
            outside = torch.zeros_like(before)
            if rest is not None:
                outside = reduced(rest_change(function, start, split.theta, rest, points, self.block), question)
            predicted = outside
            for n, g in phi.items():
                for _, _, mask in self.places.of(n):
                    share = moved[n] if mask is None else moved[n] * mask
                    predicted = predicted + flattened(g, 2).double() @ share.reshape(-1)
            return predicted, (phi, outside)

        climbed = climb(
            question.quadrature, self.rung, question.quadrature.tolerance * self.scale, before, after, evaluate,
            question.function.dtype,
        )  # fmt: skip
        self.rung = climbed.rung
        phi, outside = climbed.best
        total.statistics += end - after
        total.change += end - before
        total.omitted += outside
        total.count(nodes=climbed.nodes, evaluations=climbed.evaluations, converged=climbed.converged)
        return {n: g.flatten(0, 1) for n, g in phi.items()}, (before, end)

    def _add_plain_terms(self, segment: Segment, split: StepDecomposition, phi: FeatureMap) -> None:
        """Regularization and prehistory, which need no adjoint."""
        total = self.sums[segment.window]
        total.note(update_error=split.error, correction=split.correction)
        for term, updates in updates_of(split, [n for n in self.names if n != "kernel"]).items():
            worth = [{n: phi[n] for n in layer.masks if n in updates} for layer in self.question.layers]
            self._add_summed(total, term, 0, worth, updates, masked=True)

    def _add_gaps(self, edges: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """What f changed by between the steps asked for."""
        last: Tensor | None = None
        for segment in self.question.segments:
            before, after = edges[segment.steps[-1]]
            if last is not None:
                self.sums[segment.window].gap += before - last
            last = after

    # ------------------------------------------------------------------ back in time
    def advance(self, split: StepDecomposition, window: int | None, phi: FeatureMap) -> dict[int, Worth]:
        """What this step's gradient is worth to every window; the states move to the step before."""
        flat = FLAT in split.coefficients
        order = list(split.updates)
        found: dict[int, Worth] = {}
        for w, state in self.alive.items():
            found[w] = []
            for position, layer in enumerate(self.question.layers):
                asked = self._asked(layer, phi, order if flat else None, split) if w == window else {}
                worth: dict[str, Tensor] = {}
                for unit, declared in split.coefficients.items():
                    a = _step_back(state, (position, unit), declared, asked.get(unit))
                    if a is not None:
                        self._check_elementwise(unit, declared, split.step)
                        worth |= _unflattened(a, split.theta, order) if flat else {unit: a}
                found[w].append(worth)
            size = sum(float(t.square().sum(dtype=torch.float64)) for worth in found[w] for t in worth.values()) ** 0.5
            state.peak = max(state.peak, size)
        return found

    def _asked(
        self, layer: Layer, phi: FeatureMap, order: list[str] | None, split: StepDecomposition
    ) -> dict[str, Tensor]:
        """A layer's share of phi by unit: by parameter, or over all of them for a flat rule."""
        shares = layer.share(phi)
        if order is None:
            return shares
        rows, reference = len(next(iter(phi.values()))), next(iter(phi.values()))
        parts = [
            flattened(shares[n], 1) if n in shares else reference.new_zeros((rows, split.theta[n].numel()))
            for n in order
        ]
        return {FLAT: torch.cat(parts, 1)}

    def _check_elementwise(self, unit: str, declared: StepCoefficients, step: int) -> None:
        if not self.question.keeps("parameter"):
            return
        filtered = declared.filter
        operators = [declared.preconditioner, declared.gradient_operator, filtered.D, *filtered.B, *filtered.C]
        if not all(map(is_elementwise, [*operators, *(a for row in filtered.A for a in row)])):
            raise QuestionError(
                "the adjoint cannot keep the parameter axis: the optimizer mixes the entries of a tensor",
                where=f"strategy, step {step}, {unit!r}",
                expected="an elementwise preconditioner",
                got=type(declared.preconditioner).__name__,
                remedy="say strategy='features', or keep layers",
            )

    def _drop(self, s: int) -> None:
        """Forget windows whose states have decayed below the rounding of what they were."""
        eps = torch.finfo(self.question.function.dtype).eps
        for w in list(self.alive):
            state = self.alive[w]
            if s > self.question.windows[w].steps[0]:
                continue
            size = state.size()
            if size <= eps * state.peak:
                if size > 0 and s > 1:
                    self.dropped[w] = s
                del self.alive[w]

    def _tails(self) -> str | None:
        """Before which steps the states of windows were dropped."""
        windows = self.question.windows
        if not self.dropped:
            return None
        if len(self.dropped) > 4:  # one by one where steps are kept: that says nothing more
            spans = [windows[w].steps[0] - s for w, s in self.dropped.items()]
            return f"below rounding, {min(spans)} to {max(spans)} steps before each of {len(self.dropped)} windows"
        return "below rounding before step " + ", ".join(
            f"{s} (window {windows[w].name})" for w, s in sorted(self.dropped.items())
        )

    # ------------------------------------------------------------------ the training side
    def add_kernel(self, split: StepDecomposition, worth: dict[int, Worth]) -> None:
        """Multiply this step's gradient, or its samples' gradients, with what they are worth."""
        question = self.question
        gradients = {n: to_dense(g) for n, g in split.gradients.items()}
        row = self.row_of.get(split.step)
        if row is None:
            for w, parts in worth.items():
                self._add_others(self.sums[w], [_inner(part, gradients) for part in parts])
            return
        i = row if question.keeps("gradient_step") else 0
        if question.train is None:
            for w, parts in worth.items():
                self._add_summed(self.sums[w], "kernel", i, parts, gradients, sign=-1)
            return
        names = [n for n in split.gradients if any(n in part for parts in worth.values() for part in parts)]
        if not names:
            return
        samples = self.splitter.shares(split, names)
        positions = question.train.positions(samples.ids)
        asked = positions >= 0
        places = positions[asked] if question.keeps("train") else torch.zeros_like(positions[asked])
        fed = {n: gradients[n] for n in names}
        for w, parts in worth.items():  # less the samples' shares, below
            self._add_summed(self.sums[w], "unattributed", 0, parts, fed, sign=-1)
        if question.keeps("parameter"):
            for part, shares in samples.chunks():
                self._add_by_parameter(worth, shares, positions[part], i)
            return
        flat = [part for parts in worth.values() for part in parts]
        inner = samples.inner([{n: t for n, t in part.items() if n in names} for part in flat], method=self.method)
        inner = -inner.reshape(len(worth), len(question.layers), *self._edge(), -1)
        for w, values in zip(worth, inner, strict=True):
            term = self.sums[w].terms["kernel"]  # [I', L', P', T', n', J']
            by_layer = values if question.keeps("layer") else values.sum(0, keepdim=True)
            term[i, :, 0].index_add_(1, places, by_layer[..., asked].permute(0, 3, 1, 2))
            self.sums[w].omitted += values[..., ~asked].sum((0, -1))
            self.sums[w].terms["unattributed"][0, :, 0, 0] -= by_layer.sum(-1)

    def _edge(self) -> tuple[int, int]:
        """(n', J') of the block."""
        shape = self.sums[0].change.shape
        return shape[0], shape[1]

    def _add_summed(
        self, total: WindowSum, term: str, i: int, worth: Worth, gradients: Mapping[str, Tensor], *, sign: int = 1,
        masked: bool = False,
    ) -> None:  # fmt: skip
        """Add ``sign <worth, gradient>`` by layer, or by parameter."""
        question = self.question
        for position, (layer, part) in enumerate(zip(question.layers, worth, strict=True)):
            where = position if question.keeps("layer") else 0
            for n, a in part.items():
                if n not in gradients:
                    continue
                mask = layer.masks.get(n)
                g = gradients[n].reshape(-1)
                g = g if mask is None or not masked else g * mask.reshape(-1)
                rows = flattened(a, 1).double()
                if question.keeps("parameter"):
                    inside, columns = self.places.columns(n, mask)
                    found = (rows[:, inside] * g[inside]).T.reshape(-1, *self._edge())
                    total.terms[term][i, where, columns, 0] += sign * found
                else:
                    total.terms[term][i, where, 0, 0] += sign * (rows @ g.double()).reshape(self._edge())

    def _add_by_parameter(
        self, worth: dict[int, Worth], shares: Mapping[str, Tensor], positions: Tensor, i: int
    ) -> None:
        question = self.question
        for w, parts in worth.items():
            total = self.sums[w]
            for position, (layer, part) in enumerate(zip(question.layers, parts, strict=True)):
                where = position if question.keeps("layer") else 0
                for n, a in part.items():
                    if n not in shares:
                        continue
                    inside, columns = self.places.columns(n, layer.masks.get(n))
                    rows = flattened(a, 1)[:, inside].double()
                    each = flattened(shares[n].cpu(), 1)[:, inside].double()
                    total.terms["unattributed"][0, where, columns, 0] += (rows * each.sum(0)).T.reshape(
                        -1, *self._edge()
                    )
                    for k, g in zip(positions.tolist(), each, strict=True):
                        found = -(rows * g).T.reshape(-1, *self._edge())
                        if k < 0:
                            total.omitted += found.sum(0)
                        else:
                            total.terms["kernel"][i, where, columns, k if question.keeps("train") else 0] += found

    def _add_others(self, total: WindowSum, inner: list[Tensor | None]) -> None:
        for value in inner:
            if value is not None:
                total.omitted -= value.reshape(self._edge())


def _step_back(state: State, key: tuple[int, str], declared: StepCoefficients, asked: Tensor | None) -> Tensor | None:
    """``a_s`` of one layer and unit, None where nothing is asked of it; moves z to the step before."""
    z = state.z.get(key, ())
    if asked is None and not z:
        return None
    psi = None if asked is None else apply_each(declared.preconditioner.adjoint, asked)  # type: ignore[union-attr]
    like = z[0] if psi is None else psi
    z = (*z, *(torch.zeros_like(like) for _ in range(declared.filter.order - len(z))))
    if psi is None and declared.filter.order == 0:
        # What comes later starts from nothing here: a state that had not appeared yet.
        state.z.pop(key)
        return None
    u, before = declared.filter.adjoint(z, psi)
    if before:
        state.z[key] = before
    else:
        state.z.pop(key, None)
    return apply_each(declared.gradient_operator.adjoint, u)  # type: ignore[union-attr]


def _unflattened(a: Tensor, like: Mapping[str, Tensor], order: list[str]) -> dict[str, Tensor]:
    pieces = torch.split(a, [like[n].numel() for n in order], dim=1)
    return {n: piece.reshape(-1, *like[n].shape) for n, piece in zip(order, pieces, strict=True)}


def _inner(part: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor | None:
    """``<a, g>``: ``[R]`` in float64."""
    total: Tensor | None = None
    for n, a in part.items():
        if n in gradients:
            value = flattened(a, 1).double() @ gradients[n].reshape(-1).double()
            total = value if total is None else total + value
    return total
