"""Recording in modes that compute gradients again: what is noted of every step for that, and tried where it is due.

The computing itself, when a run is read, is :class:`explaind_core.run.recompute.Recomputation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explaind_core.errors import RecordingError
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.early_check import EarlyCheck, no_pass
from explaind_core.recording.run_writer import RunWriter, SeenStep
from explaind_core.recording.subject import Subject
from explaind_core.training_step import MicroBatch, fingerprint

__all__ = ["RecomputationNotes"]


class RecomputationNotes:
    """Notes, step by step, what it takes to compute a gradient again.

    Args:
        early_check: computes steps again while they are recorded.
        subject: the model and its optimizer.
        writer: writes the steps.
        batches: those of the coming step.
        modelled: whether the model is called as it is, by the default recipe (no ``gradient=``).
        reading: options of :func:`explaind_core.open_run` with which the first step is read back.
    """

    def __init__(
        self,
        early_check: EarlyCheck,
        subject: Subject,
        writer: RunWriter,
        batches: BatchLog,
        *,
        modelled: bool,
        reading: dict[str, Any],
    ) -> None:
        self._early_check, self._subject, self._writer, self._batches = early_check, subject, writer, batches
        self._modelled, self._reading, self._threads = modelled, reading, writer.threads
        # The buffers before the pass of the step, None before the model was called.
        self._buffers_before: dict[str, Tensor] | None = None
        self._moved_buffers: dict[str, Tensor] = {}  # those of them that the last step left otherwise

    def expect_batch(self) -> None:
        """A batch of the coming step is about to be declared: its contents are needed if the step is to be tried."""
        self._batches.keeps_contents = self._early_check.due(self._writer.steps + 1)

    def before_pass(self) -> None:
        """The model is about to be called: note buffers that something changed since the last step."""
        if self._buffers_before is not None:
            return
        self._moved_buffers = self._writer.last.moved_buffers()
        self._buffers_before = self._subject.buffers() if self._early_check.due(self._writer.steps + 1) else {}

    def note(self, seen: SeenStep) -> None:
        """Note what it takes to compute this step's gradient again, and try it where that is due.

        Args:
            seen: the step, before it is made; the notes are added to it.

        Raises:
            RecordingError: it cannot be computed again, or is another one then.
        """
        batches, step, mode = self._batches, self._writer.steps + 1, self._writer.mode
        if self._modelled and None in batches.forwards:
            raise no_pass(mode, step)
        if any(gradient.is_sparse for gradient in seen.gradients.values()):
            raise RecordingError("a gradient is sparse", where=f"mode={mode!r}, step {step}", remedy="use mode='steps'")
        self.before_pass()  # gradient= does without calling the model
        seen.buffers_before = self._moved_buffers
        if batches.keeps_contents and batches.contents:
            batch = [
                MicroBatch(ids, content.inputs, content.targets, entry["weight"], forward, rows)
                for ids, content, entry, forward, rows in zip(
                    batches.ids, batches.contents, batches.entries, batches.forwards, batches.rows, strict=True
                )
            ]
            self._early_check.check(batch, self._buffers_before or {}, seen.gradients, seen.clips, step)
        seen.recomputation = {"unfed": [n for g in seen.groups for n in g["params"] if n not in seen.gradients]}
        if mode == "parameters":
            seen.recomputation["gradient_hash"] = fingerprint(seen.gradients)
        if self._early_check.recipe.header():
            seen.recomputation["recipe"] = self._early_check.recipe.header()
        if (threads := torch.get_num_threads()) != self._threads:
            seen.recomputation["threads"] = threads

    def written(self, path: Any) -> None:
        """A step was written: where parameters are not, the first one is read back at once.

        Args:
            path: of the run.

        Raises:
            RecordingError: it does not come out as it was recorded.
        """
        if self._writer.mode == "snapshots" and self._writer.steps == 1:
            self._early_check.check_reading(path, **self._reading)

    def forget(self) -> None:
        """The step is over."""
        self._buffers_before = None
