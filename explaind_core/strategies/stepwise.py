"""What the strategies have in common that go forwards in time, segment by segment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from explaind_core.decomposition import StepDecomposition, UpdateSplit, decompose, term_names
from explaind_core.derivatives import FunctionAtStep
from explaind_core.progress import counted
from explaind_core.questions import (
    Contribution,
    Ends,
    Findings,
    Places,
    Question,
    Segment,
    WindowSum,
    finite_values,
    reduced,
)
from explaind_core.strategies.entry_features import EntryFeatures, horizon
from explaind_core.strategies.probe import Estimate, Probe, first_needed, timed
from explaind_core.strategies.strategy import Choice, Strategy

__all__ = ["Stepwise", "WalkedSegment", "covered", "few_outputs", "gradient_work", "joined", "passes_together"]

Features = Mapping[str, Tensor]


def joined(splits: Sequence[StepDecomposition]) -> StepDecomposition:
    """The steps of one segment as one: updates are added up, and theta goes from the first to the last."""
    if len(splits) == 1:
        return splits[0]
    updates: dict[str, UpdateSplit] = {}
    for split in splits:
        for name, u in split.updates.items():
            known = updates.get(name)
            updates[name] = u if known is None else UpdateSplit(
                kernel=known.kernel + u.kernel,
                regularization=known.regularization + u.regularization,
                prehistory=_added(known.prehistory, u.prehistory),
                displacement=known.displacement + u.displacement,
                penalty=_added(known.penalty, u.penalty),
            )  # fmt: skip
    return replace(
        splits[-1],
        updates=updates,
        theta_before=splits[0].theta_before,
        error=max(s.error for s in splits),
        correction=max(s.correction for s in splits),
    )


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _entry_features(question: Question) -> EntryFeatures | None:
    """Those of all entries, where gradients are split."""
    if not question.splits_gradients:
        return None
    return EntryFeatures(question, [n for n in question.run.parameters if any(n in x.masks for x in question.layers)])


def _segments(
    question: Question, first: int, start: int, entries: EntryFeatures | None
) -> Iterator[tuple[Segment, StepDecomposition, Features | None]]:
    """The segments from window ``first`` on, each with its update and the features of entries fed from ``start`` on."""
    wanted = {s: segment for segment in question.segments if segment.window >= first for s in segment.steps}
    start = min(wanted) if entries is None else start
    held: list[StepDecomposition] = []
    features: dict[str, Tensor] | None = None
    for split in decompose(question.run, first=start, last=question.steps[-1]):
        segment = wanted.get(split.step)
        if segment is None:
            if entries is not None:
                entries.feed(split)
            continue
        question.check_update(split)
        held.append(split)
        if entries is not None:
            found = entries.advance(split)
            if len(segment.steps) > 1:  # they are added up, while the next step's are written over them
                found = {n: h.clone() for n, h in found.items()}
            known = features or {}
            features = {**known, **{n: h + known[n] if n in known else h for n, h in found.items()}}
        if split.step == segment.steps[-1]:
            yield segment, joined(held), features
            held, features = [], None


@dataclass(frozen=True)
class WalkedSegment:
    """A segment, when the walk has come to its end.

    Attributes:
        function: f with the buffers that the segment begins with: along it, these are held.
        split: its update, of all steps together.
        names: the terms of the update.
        features: of every entry, where gradients are split: parameter name -> ``[entries, *shape]``.
        before: f where it begins, ``[n, J]``.
        after: f where it ends, with the buffers that it began with.
        bound: what its residual may be at most.
    """

    function: FunctionAtStep
    split: StepDecomposition
    names: tuple[str, ...]
    features: Features | None
    before: Tensor
    after: Tensor
    bound: float


class Stepwise(Strategy):
    """A strategy that goes forwards in time and answers segment by segment."""

    @abstractmethod
    def add(self, question: Question, places: Places, total: WindowSum, walked: WalkedSegment, rung: int) -> int:
        """Add what a segment added to the explained function to its window's sum.

        Args:
            question: the question.
            places: of its parameters.
            total: the window's sum.
            walked: the segment.
            rung: where the search for the order starts.

        Returns:
            Where the next search starts.
        """

    @abstractmethod
    def node_seconds(self, probe: Probe) -> float:
        """Seconds that one node of one segment takes.

        Args:
            probe: the step to time it on.
        """

    def contributions(
        self, question: Question, ends: Ends, choice: Choice, *, done: int = 0, block: int, progress: bool = True
    ) -> Iterator[Contribution]:
        """One window after the other, behind the first ``done``."""
        del choice  # all test samples in one pass
        last_values = ends.initial
        if done:
            reached = question.windows[done - 1].steps[-1]
            last_values = finite_values(question, question.run.theta(reached), reached)
        scale = self.scale(question, ends)
        steps = sum(len(window.steps) for window in question.windows[done:])
        with counted(steps, "attributing", enabled=progress) as advance:
            yield from self._walk(question, ends.outputs, scale, done, last_values, block, advance)

    def _walk(
        self, question: Question, outputs: int, scale: float, first: int, last_values: Tensor, block: int,
        advanced: Callable[[int], object],
    ) -> Iterator[Contribution]:  # fmt: skip
        """What each window, from window ``first`` on, added to the explained function.

        The search for the order begins afresh every ``block`` windows, so that what is taken up there gets the same
        nodes as in one go.
        """
        names, places = term_names(question.run), Places(question)
        bound = question.quadrature.tolerance * scale
        rung = 0
        total: WindowSum | None = None
        following: tuple[int, Tensor] | None = None
        entries = _entry_features(question)
        start = 1 if entries is None else horizon(question)
        found = Findings(tail_dropped=f"below rounding before step {start}" if start > 1 else None)
        for segment, split, features in _segments(question, first, start, entries):
            if total is not None and total.window != segment.window:
                yield _finished(total, entries)
                total = None
            if total is None:
                total = WindowSum(question, segment.window, outputs, question.terms, findings=found)
                found = Findings()
                rung = rung if (segment.window - first) % block else 0
            a, b = segment.steps[0] - 1, segment.steps[-1]
            known = following is not None and following[0] == a
            before = following[1] if known and following is not None else finite_values(question, split.theta_before, a)
            # f moves along the segment with the buffers that it began with. What these then add comes at its end.
            after = end = finite_values(question, split.theta, b, buffers=a)
            rung = self.add(
                question,
                places,
                total,
                WalkedSegment(question.function.at(a), split, names, features, before, after, bound),
                rung,
            )
            if question.function.moves:
                end = finite_values(question, split.theta, b)
                total.statistics += reduced(end - after, question)
            total.change += reduced(end - before, question)
            total.gap += reduced(before - last_values, question)
            total.note(update_error=split.error, correction=split.correction)
            last_values, following = end, (b, end)
            advanced(len(segment.steps))
        if total is not None:
            yield _finished(total, entries)

    def probe(self, probe: Probe, choice: Choice) -> Estimate:
        """Values of f, features where gradients are split, and one node."""
        del choice
        question, split = probe.question, probe.split
        last, segments = question.steps[-1], len(question.segments)
        values = timed(lambda: probe.function.values(split.theta))
        total = probe.replay * last + values * segments
        samples = 0
        if question.splits_gradients:  # forward-time features are fed from where gradients matter on
            first = first_needed(split, question.steps[0], question.function.dtype)
            walked = last - first + 1
            entries = EntryFeatures(question, probe.places.names)
            fed = walked if entries.others else sum(first <= s <= last for s in entries.steps)
            entries.steps.setdefault(split.step, 0)
            total += fed * timed(lambda: entries.advance(split))
            if fed < walked:
                entries.steps.clear()
                total += (walked - fed) * timed(lambda: entries.advance(split))
            samples = sum(first <= s <= last for s in question.gradient_steps) if question.train is not None else 0
        return Estimate(total + probe.nodes * segments * self.node_seconds(probe), samples)


def _finished(total: WindowSum, entries: EntryFeatures | None) -> Contribution:
    """A window's contribution, with all that was found since the one before."""
    if entries is not None:
        total.findings |= entries.splitter.take()
    return total.finish()


def few_outputs(question: Question, outputs: int) -> bool:
    """Whether backward passes (3 forwards each) are fewer than forward-mode derivatives (2 and more each)."""
    kept = outputs if question.keeps("output") else 1
    return 3 * kept * passes_together(question) < 2 * 2 * len(question.layers)


def passes_together(question: Question) -> int:
    """How many samples a backward pass of one test sample goes through: all that are coupled with it."""
    return question.function.given if question.function.together and question.keeps("test") else 1


def covered(question: Question) -> int:
    """Entries of all tensors that a layer touches, once for every layer."""
    return sum(question.run.parameters[n].shape.numel() for layer in question.layers for n in layer.masks)


def gradient_work(question: Question) -> float:
    """Multiplications that the gradients of a step's samples take, roughly; none where these are not told apart."""
    if question.train is None:
        return 0.0
    batch = len(question.run.sample_ids(question.steps[-1]))
    return 6.0 * batch * sum(p.shape.numel() for p in question.run.parameters.values())
