"""Forward-time features: every entry's own part of every update.

An entry is a training sample, a group of them, the gradient of one step, or a pair of these. Its features are
``h_{s,e} = - P_s [ what the filter reads out of e's gradients alone ]``, so that ``phi_s h_{s,e}`` is what e added.
They take (entries) x (parameters asked for) numbers a filter state: the adjoint does without.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from explaind_core.decomposition import FLAT, StepDecomposition, decompose, split_flat
from explaind_core.derivatives import slices
from explaind_core.questions import Question
from explaind_core.rules import FilterState, apply_each
from explaind_core.strategies.shares import GradientSplitter
from explaind_core.tensors import flattened, to_dense

__all__ = ["HELD", "STATES", "EntryFeatures", "horizon"]

#: Filter states assumed per parameter: momentum has one, some optimizers two.
STATES = 2
#: What an entry holds, times the parameters: its gradient, and its states.
HELD = 1 + STATES
#: Larger blocks of features leave the processor's cache. In bytes.
BLOCK = 2**20


class EntryFeatures:
    """The filter states of all entries of a question, fed step by step.

    The entries are those of (gradient_step, train) as far as kept, in this order, one more for what is not asked
    for where gradients are restricted, and one for what no sample explains where that is carried.

    Args:
        question: the question.
        names: the parameters whose features are wanted.
        others: whether what is not asked for is wanted, too, where there is something.
        splitter: of the walk that they belong to; one of their own by default.
    """

    def __init__(
        self, question: Question, names: list[str], *, others: bool = True, splitter: GradientSplitter | None = None
    ) -> None:
        self.question = question
        self.splitter = GradientSplitter(question) if splitter is None else splitter
        self.names = names
        keep = question.keep
        self.steps = {s: n for n, s in enumerate(question.gradient_steps)}
        self.shape = (
            len(self.steps) if "gradient_step" in keep else 1,
            len(question.train.labels) if question.train is not None and "train" in keep else 1,
        )
        self.asked = self.shape[0] * self.shape[1]
        self.others = others and question.restricts_gradients
        self.remainder = others and question.carries
        self.count = self.asked + self.others + self.remainder
        self._states: dict[str, FilterState] = {}
        self._fed: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def advance(self, split: StepDecomposition) -> dict[str, Tensor]:
        """Feed one step; the features by parameter name: ``[entries, *shape]``, in the model's dtype.

        The next step's are written over them: new memory for all entries would cost as much as what is done there.
        """
        found: dict[str, Tensor] = {}
        for rows, name, h in self.blocks(split):
            if name not in self._found:
                self._found[name] = h.new_empty((self.count, *h.shape[1:]))
            found[name] = self._found[name]
            found[name][rows] = h
        return found

    def feed(self, split: StepDecomposition) -> None:
        """Feed one step whose features nobody reads."""
        for _ in self.blocks(split, read=False):
            pass

    def blocks(self, split: StepDecomposition, *, read: bool = True) -> Iterator[tuple[slice, str, Tensor]]:
        """Feed one step; its features block by block of entries, which are not all held at once.

        States are overwritten a block at a time: what is done to a block then stays in the processor's cache.

        Yields:
            Some entries, a parameter's name, and its features ``[b, *shape]``. Nothing where they are not ``read``,
            but all blocks must be asked for all the same.
        """
        fed = self._gradients(split)
        flat, order = FLAT in split.coefficients, list(split.updates)
        for unit, declared in split.coefficients.items():
            parts = [fed[n] for n in order] if flat else [fed[unit]] if unit in fed else []
            if not parts:
                continue
            size = sum(t[0].numel() for t in parts)
            state, k = self._states.get(unit, ()), declared.filter.order
            shape = (self.count, size) if flat else parts[0].shape
            state = (*state, *(parts[0].new_zeros(shape) for _ in range(k - len(state))))
            self._states[unit] = state
            for rows in slices(self.count, BLOCK // (size * parts[0].itemsize)):
                u = torch.cat([flattened(t[rows], 1) for t in parts], 1) if flat else parts[0][rows]
                u = apply_each(declared.gradient_operator, u)  # type: ignore[arg-type]
                out, following = declared.filter.advance_each(tuple(z[rows] for z in state), u, read=read)
                for z, new in zip(state, following, strict=True):
                    z[rows] = new
                if out is None:
                    continue
                h = -apply_each(declared.preconditioner, out)  # type: ignore[arg-type]
                if not flat:
                    yield rows, unit, h
                    continue
                split_rows = [split_flat(row, split.theta, order) for row in h]
                for n in order:
                    if n in self.names:
                        yield rows, n, torch.stack([part[n] for part in split_rows])

    def _zeros(self, name: str, like: Tensor) -> Tensor:
        """``[entries, *shape]``, in the same memory at every step."""
        if name not in self._fed:
            self._fed[name] = like.new_empty((self.count, *like.shape))
        return self._fed[name].zero_()

    def _gradients(self, split: StepDecomposition) -> dict[str, Tensor]:
        """Every entry's share of the gradient that one step was fed: ``[entries, *shape]``."""
        names = list(split.updates) if FLAT in split.coefficients else [n for n in self.names if n in split.updates]
        if not names:  # another optimizer's turn
            return {}
        like = {n: split.theta[n] for n in names}
        fed = {n: self._zeros(n, t) for n, t in like.items()}
        train, asked = self.question.train, split.step in self.steps
        row = self.steps.get(split.step, 0) * self.shape[1] if self.shape[0] > 1 else 0
        if not asked and not self.others:
            return fed
        if not asked or train is None:
            place = row if asked else self.asked
            for n in names:
                if n in split.gradients:
                    fed[n][place] = to_dense(split.gradients[n])
            return fed
        samples = self.splitter.shares(split, names)
        positions = train.positions(samples.ids)
        if self.shape[1] == 1:  # not told apart
            positions = torch.where(positions >= 0, torch.zeros_like(positions), positions)
        places = torch.where(positions >= 0, positions + row, self.asked if self.others else -1)
        present = torch.unique(places[places >= 0])
        if not len(present):
            return self._with_remainder(fed, split)
        if 4 * len(present) <= int((places >= 0).sum()):  # few groups: one backward pass each
            weights = (places == present[:, None]).to(next(iter(fed.values())).dtype)
            for n, g in samples.weighted(weights).items():
                fed[n][present] = g.cpu()
            return self._with_remainder(fed, split)
        for part, gradients in samples.chunks(places >= 0):
            here = places[part]
            wanted = here >= 0
            for n, g in gradients.items():
                fed[n].index_add_(0, here[wanted], g.cpu() if bool(wanted.all()) else g.cpu()[wanted])
        return self._with_remainder(fed, split)

    def _with_remainder(self, fed: dict[str, Tensor], split: StepDecomposition) -> dict[str, Tensor]:
        """What the samples leave of the gradient that was fed, as the last entry."""
        for n, parts in fed.items() if self.remainder else ():
            if n in split.gradients:
                parts[-1] = to_dense(split.gradients[n]).to(parts) - parts[:-1].sum(0)
        return fed


def horizon(question: Question) -> int:
    """The first step whose gradient still matters, to rounding, at the first step explained.

    With one filter state a gradient's weight shrinks by ``|A_s|`` a step; where filters have more, or operators for
    coefficients, every step matters.
    """
    first = question.steps[0]
    shrinking: list[float] = []
    known: set[str] = set()
    for split in decompose(question.run, last=first - 1) if first > 1 else ():
        factors = [0.0]
        for declared in split.coefficients.values():
            plain = all(isinstance(a, float) for row in declared.filter.A for a in row)
            factors.append(abs(declared.filter.A[0][0]) if declared.filter.order == 1 and plain else 1.0)  # type: ignore[arg-type]
        known |= split.coefficients.keys()
        # A parameter without gradient forgets nothing.
        shrinking.append(max(factors) if len(split.coefficients) == len(known) else 1.0)
    left, step = 1.0, first
    bound = torch.finfo(question.function.dtype).eps / first
    while step > 1 and left > bound:
        step -= 1
        left *= shrinking[step - 1]
    return step
