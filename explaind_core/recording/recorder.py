"""Records a training loop: what the loop declares, and what its optimizers are seen to do, goes to a run store."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from explaind_core.data import IndexedDataset
from explaind_core.errors import ExplaindError, NonFiniteError, RecordingError
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.declared_clipping import DeclaredClipping
from explaind_core.recording.early_check import EarlyCheck, check_loss_is_function, check_mode
from explaind_core.recording.recomputation_notes import RecomputationNotes
from explaind_core.recording.resume import resume as stand_behind
from explaind_core.recording.run_writer import RunWriter
from explaind_core.recording.scaler_watch import check_scaler
from explaind_core.recording.step_watch import StepWatch
from explaind_core.recording.subject import Subject
from explaind_core.recording.time_first import check_time_first
from explaind_core.recording.trained_loss import check_loss
from explaind_core.recording.wrapped import check_wrappers, scaler_inside
from explaind_core.rules import RegisteredRule, Registry, UpdateRule, default_registry, each_optimizer, each_rule
from explaind_core.run import OptimizerFactory
from explaind_core.store import RunStore, check_space, store_size
from explaind_core.training_step import GradientFunction, InputRows

__all__ = ["Recorder"]


class Recorder:
    """Records an ordinary training loop, step by step, to an append-only store.

    Per step it writes theta_s, every gradient as the optimizer was fed it (cloned before ``step()``), each
    group's hyper-parameters as they stood before the step, which samples the batch held, and buffers that
    changed. Parameters are known by their names in ``model``. Recording starts when the Recorder is made:
    theta_0 and the optimizer's state are those of that moment.

    Args:
        path: a folder that does not exist yet (or is empty).
        model: any module, compiled, in ``nn.DataParallel`` or ``DistributedDataParallel`` of one process, prepared by
            accelerate, or none of that; parameters are known by their names in the plain one.
        optimizer: any optimizer with a registered rule, prepared by accelerate or not; or a list of several, each of
            which trains parameters of its own. Their steps from one gradient of the model are recorded as one.
        loss: ``loss(output, target)``, per-sample or reduced; its name is kept, and torch's own losses can be
            rebuilt when the run is opened.
        train_size: the number of training samples; ids must be below it.
        mode: what is written. ``"steps"``: theta_s and the gradients of every step. ``"parameters"``: theta_s only.
            ``"snapshots"``: theta and the optimizer's state every ``snapshot_every`` steps. What is not written is
            computed again when it is read, and must come out bit by bit; the first step is tried while recording.
        inputs: ``"stored"``: batches are written as they were declared, once per content. ``"reread"``: only ids, draws
            and hashes are, and the run is opened with the dataset. Given that itself (an
            :class:`explaind_core.data.IndexedDataset`), the first batch is read again at once; with
            ``mode="snapshots"`` it must be given.
        snapshot_every: the optimizer's state is kept after every that many steps.
        write_behind: so many steps may wait to be written, by a thread beside the loop, for the one that is written.
            By default every step is written when ``optimizer.step()`` returns; a killed process loses those that wait.
        durable: what a loss of power leaves: ``"snapshots"`` every step up to the last snapshot, ``"steps"`` every step
            (it is on disk when ``optimizer.step()`` returns), ``"close"`` what was closed, or resumed.
        resume: continue the run at ``path``; the model must stand where its last recorded step left it. A number k
            continues it behind step k, where the model must stand; the steps after it are deleted (a training that
            goes on from a checkpoint makes them again).
        overwrite: delete the run at ``path`` first.
        rule: explain the optimizer by this rule, whatever is registered; an :class:`explaind_core.InferredRule` for one
            that nobody has declared. For several optimizers a list, with None for the registered rule.
        scaler: the ``torch.amp.GradScaler`` of the loop. Steps that it skips are seen then, and their batch forgotten.
        registry: the plugins to look for a rule in; all installed ones by default.
        compression: how tensors are packed, without loss: ``"blosc"`` (bit shuffle and LZ4), or None.
        expected_steps: how many steps will be recorded: a run for which the disk has no room is refused at once.
        gradient: ``gradient(model, micro_batch)`` runs a micro-batch's backward pass as the loop does, where that is
            not ``(loss(model(inputs), targets) * weight).backward()``; for the modes that compute gradients again.
        make_optimizer: as for :func:`explaind_core.open_run`, for those modes as well.
        penalty: ``penalty(parameters by name) -> 0-d``: what the loop adds to an optimizer step's loss that depends on
            the parameters alone. Its name is kept; ``open_run(..., penalty=)`` makes it a term of its own.
        train_axis: whether gradients are going to be split by samples. One that is of several calls of the model for
            one batch could not be, and is refused. False records it; only questions that keep ``train`` are refused.

    Raises:
        RuleNotFoundError, AmbiguousRuleError: not exactly one rule speaks for ``optimizer``.
        UnsupportedOptionError: the optimizer uses an option that its rule does not model, or it is one of several and
            can be recorded alone only.
        RecordingError: the optimizer trains tensors that are not parameters of ``model``, or complex ones; two of
            several train the same one; the mode cannot record this training.
        StoreError: ``path`` holds something already, or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> model, loss = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> inputs, targets = torch.randn(8, 2), torch.randn(8, 1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Recorder(f"{folder.name}/run", model, optimizer, loss) as recorder:
        ...     for ids in torch.arange(8).split(4):
        ...         optimizer.zero_grad()
        ...         loss(model(inputs[ids]), targets[ids]).backward()
        ...         recorder.batch(inputs[ids], targets[ids], ids=ids)
        ...         _ = optimizer.step()
        >>> recorder.steps
        2
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loss: Callable[..., Tensor] | None = None,
        *,
        train_size: int | None = None,
        mode: str = "steps",
        inputs: str | IndexedDataset = "stored",
        snapshot_every: int = 100,
        write_behind: int = 0,
        durable: str = "snapshots",
        resume: bool | int = False,
        overwrite: bool = False,
        rule: UpdateRule | Sequence[UpdateRule | None] | None = None,
        scaler: GradScaler | None = None,
        registry: Registry | None = None,
        gradient: GradientFunction | None = None,
        make_optimizer: OptimizerFactory | Sequence[OptimizerFactory | None] | None = None,
        penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        compression: Literal["blosc"] | None = "blosc",
        expected_steps: int | None = None,
        train_axis: bool = True,
    ) -> None:
        check_loss_is_function(loss)
        self._has_loss = loss is not None
        scaler = scaler_inside(optimizer) if scaler is None else scaler
        check_scaler(scaler)
        optimizers = each_optimizer(optimizer)
        check_wrappers(model, optimizers)
        check_loss(loss, optimizers)
        registered = [
            (registry or default_registry()).rule_for(each)
            if given is None
            else RegisteredRule(given, "given", "given", "-")
            for each, given in zip(optimizers, each_rule(rule, len(optimizers)), strict=True)
        ]
        self._subject = Subject(model, optimizers, registered)
        check_mode(mode, self._subject, loss, gradient)
        if compression not in ("blosc", None):
            raise RecordingError(
                "unknown compression", where="compression", expected="'blosc' or None", got=compression
            )
        self._store = RunStore(path, compress=compression is not None)
        self._writer = RunWriter(self._store, self._subject, snapshot_every, mode, write_behind, durable)
        early_check = None if mode == "steps" else EarlyCheck(self._subject, mode, loss, gradient, penalty)
        self._batches = BatchLog(self._store, train_size, inputs)
        self._clipping, self._stopped = DeclaredClipping(), False
        self._expected_size = store_size(
            model, optimizers, expected_steps or 0, mode=mode, snapshot_every=snapshot_every
        )
        if expected_steps is not None:
            check_space(self._store.path, self._expected_size)
        try:
            if resume is not False:
                stand_behind(self._writer, None if resume is True else resume)
            else:
                self._writer.start(loss, train_size, overwrite=overwrite, penalty=penalty)
        except BaseException:  # what refuses the run must not keep others from it
            self._store.unlock()
            raise
        self._recomputation: RecomputationNotes | None = None
        if early_check is not None:
            dataset = inputs if isinstance(inputs, IndexedDataset) else None
            reading = {"rule": rule, "registry": registry, "make_optimizer": make_optimizer, "dataset": dataset}
            self._recomputation = RecomputationNotes(
                early_check, self._subject, self._writer, self._batches, modelled=gradient is None, reading=reading
            )
        self._watch = StepWatch(
            self._store.path,
            model,
            self._subject,
            self._writer,
            self._batches,
            self._clipping,
            self._recomputation,
            scaler,
            train_axis=train_axis,
        )

    @property
    def steps(self) -> int:
        """How many steps are recorded; of several optimizers, how many rounds are over."""
        return self._writer.steps

    @property
    def skipped(self) -> int:
        """How many times a gradient scaler kept the optimizer (all of several) from stepping."""
        return self._watch.skipped

    @property
    def bytes_per_step(self) -> float:
        """The mean size of the files of the steps written so far; before the first, the most that one will need."""
        count, total = self._store.steps_written
        return total / count if count else float(self._expected_size.per_step)

    # ------------------------------------------------------------------ what the loop calls
    def batch(
        self, inputs: Any, targets: Any, *, ids: Any, weight: float = 1.0, scale: float = 1.0, draws: Any = None
    ) -> None:
        """Declare which training samples the coming step's gradient is of; once per micro-batch.

        How the model stood when it was called since the last batch (its modes, autocast, the random state) is kept.

        With several optimizers it is the batch of all that step next from the same gradient, and declaring it ends the
        round before.

        Args:
            inputs: what the model was called with: a tensor, or a tuple, list or dict of tensors.
            targets: the loss's second argument (nested likewise, or None).
            ids: which samples of the training set these are, one integer each, in order.
            weight: the factor by which this micro-batch's loss was multiplied before ``backward()``
                (1/k for an accumulation over k micro-batches).
            scale: the factor by which a ``GradScaler`` multiplied it beyond that (``scaler.get_scale()``), and by which
                the gradient is divided again before the step.
            draws: which draws of these samples (:class:`explaind_core.data.DrawnBatch`), where they are read again.

        Raises:
            RecordingError: ids are not one integer per sample, or out of range; inputs cannot be stored.
        """
        self._watch.end_round()
        self._writer.queue.check()
        if self._recomputation is not None:
            self._recomputation.expect_batch()
        forwards, (plain, _) = self._watch.forwards, InputRows.split(inputs)
        if self.steps == 0 and self._has_loss:
            forwards.check_declared(plain, targets, "batch of step 1")
            check_time_first(self._subject.model, plain, _count(ids), "batch of step 1")
        self._batches.declare(inputs, targets, ids, weight, self.steps + 1, forwards.take(plain), scale, draws)

    def discard_batch(self) -> None:
        """Forget the batches declared since the last step: their gradients will not be used.

        Needed where a ``GradScaler`` skips ``optimizer.step()`` without calling it (no fused optimizer): the
        recorder cannot see that, unless it was given the scaler.
        """
        self._watch.end_round()
        self._watch.forget()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradient of all trained parameters, in the model's order, by their norm, and keep that it was.

        This calls ``torch.nn.utils.clip_grad_norm_``; :meth:`gradient_factor` is told by what it multiplied.

        Args:
            max_norm: the largest norm that is left.
            norm_type: of which norm, 2 for the Euclidean one.

        Returns:
            The norm before clipping, ``[]``.
        """
        total = nn.utils.clip_grad_norm_(self._subject.trained(), max_norm, norm_type)
        self.clipped(norm=max_norm, norm_type=norm_type, found=total)
        return total

    def clip_grad_value_(self, clip_value: float) -> None:
        """Clip every entry of the gradient of all trained parameters to ``[-clip_value, clip_value]``, and keep that.

        This calls ``torch.nn.utils.clip_grad_value_``.

        Args:
            clip_value: the largest size of an entry that is left.
        """
        nn.utils.clip_grad_value_(self._subject.trained(), clip_value)
        self.clipped(value=clip_value)

    def clipped(
        self,
        *,
        norm: float | None = None,
        norm_type: float = 2.0,
        value: float | None = None,
        found: float | Tensor | None = None,
    ) -> None:
        """Declare that somebody else (a training framework) clipped the coming step's gradient as torch does.

        Args:
            norm: by the norm of all trained parameters' gradients: the largest that was left.
            norm_type: of which norm, 2 for the Euclidean one.
            value: entry by entry, after that: the largest size that was left.
            found: the norm before clipping, which ``clip_grad_norm_`` returned, if it is known.

        Raises:
            RecordingError: neither a norm nor a value is given.
        """
        self._clipping.clipped(self.steps + 1, norm=norm, norm_type=norm_type, value=value, found=found)

    def gradient_factor(self, factor: float) -> None:
        """Tell by what the coming step's gradient was multiplied after ``backward()``: a clip coefficient.

        ``clip_grad_norm_(parameters, c)`` returns the norm n it found; its factor is ``min(1, c / (n + 1e-6))``.
        The recorder keeps the gradient as fed; the factor is needed to compare it with the samples' own gradients.

        Args:
            factor: what all gradients were multiplied by.

        Raises:
            NonFiniteError: the factor is NaN or infinite.
            RecordingError: in a mode that computes gradients again: a factor does not tell how it was rounded.
        """
        if self._recomputation is not None and factor != 1.0:
            raise RecordingError(
                "a factor alone does not tell how the gradient was rounded",
                where=f"mode={self._writer.mode!r}, step {self.steps + 1}",
                remedy="use recorder.clip_grad_norm_, or declare clipping with recorder.clipped; or mode='steps'",
            )
        self._clipping.multiplied(self.steps + 1, factor)

    def log(self, **metrics: float | Tensor) -> None:
        """Keep numbers (a loss, an accuracy) with the last finished step; ``run.metrics`` returns them.

        With several optimizers they belong to the round that the last step is part of.

        Args:
            metrics: by name, any number of them; a 0-d tensor counts as a number.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
            RecordingError: one is called ``step``.
        """
        if "step" in metrics:
            raise RecordingError(
                "a metric is called step, as the axis of all metrics is",
                where=f"after step {self.steps}",
                remedy="leave it away: the number of the step is kept anyway; or give it another name",
            )
        values = {n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} is {value}",
                    where=f"after step {self.steps}",
                    remedy=f"training has diverged; the {self.steps} steps recorded so far are intact",
                )
        pending = self._watch.rounds is not None and self._watch.rounds.pending
        self._store.append_line("metrics.jsonl", {"step": self.steps + pending, **values})

    def close(self) -> None:
        """End the recording in order. Leaving the ``with`` block does this."""
        self._detach()
        try:
            self._watch.end_round()
            self._writer.queue.close()
            self._store.close(self.steps)
        finally:
            with suppress(ExplaindError):  # it was raised
                self._writer.queue.close()
            self._store.unlock()

    def stop(self) -> None:
        """Stop recording without ending the run, which can be resumed. An error in the ``with`` block does this."""
        if self._stopped:
            return
        self._detach()
        with suppress(ExplaindError):  # of two errors, the first one is to be seen
            self._watch.end_round()
        with suppress(ExplaindError):
            self._writer.queue.close()
        self._store.unlock()

    def flush(self) -> None:
        """Wait until every finished step can be read: files are written while training goes on.

        Raises:
            StoreError: one could not be written.
        """
        self._writer.queue.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # an interrupted training is a shorter run, not a finished one
            self.stop()

    def _detach(self) -> None:
        self._stopped = True
        self._watch.detach()


def _count(ids: Any) -> int:
    return len(ids) if hasattr(ids, "__len__") else 0
