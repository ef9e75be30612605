r"""The gradient that a step was fed, as the shares of its samples and what is left of it.

    fed = sum_k  M * g_k  +  rest

M is one number, the clip coefficient (1 for most runs; one for each of several optimizers that were clipped apart), or,
where single entries were clipped, one number an entry, ``clamp(c g) / g``: a frozen diagonal operator in front of the
filter. ``rest`` is what the samples' gradients do not
explain: rounding, as a rule. More than that is refused, or carried as a term of its own where that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind_core.decomposition import StepDecomposition
from explaind_core.derivatives import SampleGradients
from explaind_core.errors import ExplaindError, RecordingError
from explaind_core.questions import Findings, Question
from explaind_core.rules import OWNER
from explaind_core.run import Run
from explaind_core.tensors import to_dense
from explaind_core.training_step import Batch

__all__ = ["GradientSplitter", "Shares"]

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Shares:
    """The shares ``M * g_k`` of one step's samples; see :class:`explaind_core.derivatives.SampleGradients`.

    Args:
        samples: the samples' gradients.
        factors: M of every parameter, 0-d or of its shape.
    """

    samples: SampleGradients
    factors: Mapping[str, Tensor]

    @property
    def ids(self) -> Tensor:
        """int64 ``[n]``: the samples' ids."""
        return self.samples.ids

    def _times(self, gradients: Gradients) -> Gradients:
        return {n: g * self.factors[n].to(g) for n, g in gradients.items()}

    def inner(self, parts: Sequence[Mapping[str, Tensor]], *, method: str = "materialised") -> Tensor:
        """``<d_r, M * g_k>``: float64 ``[len(parts), R, n]``."""
        plain = {float(f) for f in self.factors.values() if f.ndim == 0}
        if len(plain) == 1 and all(f.ndim == 0 for f in self.factors.values()):
            return plain.pop() * self.samples.inner(parts, method=method)
        return self.samples.inner([self._times(dict(part)) for part in parts], method=method)

    def weighted(self, weights: Tensor) -> Gradients:
        """``sum_k weights[g, k] M * g_k``: name -> ``[G, *shape]``."""
        return self._times(self.samples.weighted(weights))

    def chunks(self, wanted: Tensor | None = None) -> Iterator[tuple[slice, Gradients]]:
        """The shares themselves, by blocks of samples: their positions, and name -> ``[b, *shape]``."""
        for part, gradients in self.samples.chunks(wanted):
            yield part, self._times(gradients)


class GradientSplitter:
    """Splits the gradients of steps into the shares of their samples, and remembers what it learns of the run.

    It lives for one walk over the run (or for several that belong together).

    Args:
        question: whose run it is about.
    """

    def __init__(self, question: Question) -> None:
        self._run, self._forgives = question.run, question.forgives
        self._reading, self._seen = question.shares, 0
        #: In which mode the model's gradients are the recorded ones, as far as is known: it is tried first.
        self._training = True
        self._found = Findings()
        self._last: SampleGradients | None = None

    def take(self) -> Findings:
        """What was found since this was last asked."""
        self._note_coupling()
        found, self._found = self._found, Findings()
        return found

    def _note_coupling(self) -> None:
        """Samples may turn out to be coupled only when their gradients are taken: the step before is asked late."""
        if self._last is not None:
            self._found |= Findings(samples_together=self._last.together, gradients_by=self._last.way)

    def shares(self, split: StepDecomposition, names: list[str]) -> Shares:
        """The shares of one step's samples.

        The model is run as it was when the batch was passed through it; where that was not recorded, in training mode,
        or else in evaluation mode, as a fine-tuned one may have been: the one whose gradients are those that were
        recorded is right. So it is with a loss that was, or was not, computed under the model's autocast.

        Args:
            split: the step.
            names: the parameters whose gradients are wanted.

        Raises:
            RecordingError: no way to pass the batch through the model gives the gradient that was recorded, or it was
                recorded that it is of several calls of the model for one batch.
        """
        run = self._run
        self._check_calls(split.step)
        recorded = {n: split.gradients[n] for n in names if n in split.gradients}
        limit = None
        if any(kind == "value" for kind, *_ in run.clips(split.step)) and recorded:
            limit = max(float(to_dense(g).abs().max()) for g in recorded.values() if g.numel())
        batch, declared = run.batch(split.step), run.gradient_factor(split.step)
        buffers, ways = run.buffers(split.step - 1), self._ways(batch)
        first: ExplaindError | None = None
        for mode, inside in ways:
            try:
                samples = self._samples(split, batch, names, buffers, mode, inside)
                scales = _fitted(run, samples, recorded, names, step=split.step, factor=declared, limit=limit)
            except RecordingError as error:
                first = first or error
                continue
            except ValueError as error:  # torch's own, of batch normalisation that is given a single sample
                first = first or RecordingError(
                    f"the model cannot be run on the batch: {error}",
                    where=f"step {split.step}",
                    remedy="a gradient has no share per sample there: keep only axes other than train",
                )
                continue
            self._training = mode
            return self._shares(samples, scales, limit, recorded, names)
        assert first is not None
        if not self._forgives:
            raise first
        samples = self._samples(split, batch, names, buffers, *ways[0])
        nearest = dict.fromkeys(names, samples.nearest(recorded, limit=limit))
        return self._shares(samples, nearest, limit, recorded, names)

    def _check_calls(self, step: int) -> None:
        calls = self._run.step_header(step).get("calls", 0)
        if calls and not self._forgives:
            raise RecordingError(
                "the gradient is of several calls of the model for one declared batch, and has no share per sample",
                where=f"step {step}",
                expected="one call for each declared batch",
                got=f"{calls} calls",
                remedy="keep only axes other than train; or record a module that makes all calls in one forward, as "
                'Recorder(..., train_axis=True) tells; or say unattributed="carry": what the samples of the declared '
                "batch do not explain is then a term of its own, with its size",
            )

    def _ways(self, batch: Batch) -> list[tuple[bool, bool]]:
        """(training mode, whether the loss is computed under autocast) as they may have been, the likeliest first."""
        states = [m.forward for m in batch.micro]
        modes = [self._training, not self._training]
        if all(state is not None for state in states):
            modes = [all(state.training for state in states if state is not None)]
        autocast = any(state is not None and state.autocast is not None for state in states)
        return [(mode, inside) for mode in modes for inside in ((True, False) if autocast else (True,))]

    def _samples(
        self, split: StepDecomposition, batch: Batch, names: list[str], buffers: Mapping[str, Tensor], mode: bool,
        inside: bool,
    ) -> SampleGradients:  # fmt: skip
        run = self._run
        assert run.loss is not None
        return SampleGradients(
            run.model_in(mode), run.loss, batch, split.taken_at, buffers, names, loss_in_autocast=inside,
            shares=self._reading,
        )  # fmt: skip

    def _shares(
        self,
        samples: SampleGradients,
        scales: Mapping[str, float],
        limit: float | None,
        recorded: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> Shares:
        total, entries_clipped, unattributed = samples.total(), None, None
        factors = {n: torch.tensor(scales[n], dtype=torch.float64) for n in names}
        if limit is not None:
            clipped = {n: (scales[n] * total[n].double()).abs() > limit for n in names}
            factors = {
                n: torch.where(clipped[n], limit / total[n].double().abs(), scales[n])
                if bool(clipped[n].any())
                else factors[n]
                for n in names
            }
            entries_clipped = sum(int(c.sum()) for c in clipped.values())
        if self._forgives:
            rest = [to_dense(recorded[n]).double().cpu() - factors[n] * total[n].double().cpu() for n in recorded]
            size = sum(float(r.square().sum()) for r in rest) ** 0.5
            fed = sum(float(to_dense(g).double().square().sum()) for g in recorded.values()) ** 0.5
            unattributed = size / fed if fed else 0.0
        self._found |= Findings(
            gradient_factor=(min(scales.values()), max(scales.values())),
            entries_clipped=entries_clipped,
            unattributed_gradient=unattributed,
        )
        self._note_coupling()
        self._last, self._seen = samples, self._seen + 1
        if self._reading == "outputs" and self._seen & (self._seen - 1) == 0:  # of a loss that is the same all along
            self._found |= Findings(loss_couples=samples.loss_couples())
        return Shares(samples, factors)


def _fitted(
    run: Run, samples: SampleGradients, recorded: Mapping[str, Tensor], names: Sequence[str], *, step: int, **told: Any
) -> dict[str, float]:
    """Each parameter's factor: one for all, or one for those of each optimizer, where these were clipped apart."""
    try:
        return dict.fromkeys(names, samples.fit(recorded, step=step, **told))
    except RecordingError:
        if len(run.optimizers) == 1:
            raise
        owners = {name: group[OWNER] for group in run.groups(step) for name in group["params"]}
        found: dict[str, float] = {}
        for member in range(len(run.optimizers)):
            own = [name for name in names if owners.get(name, member) == member]
            found |= dict.fromkeys(own, samples.fit(recorded, step=step, names=own, **told) if own else 1.0)
        return found
