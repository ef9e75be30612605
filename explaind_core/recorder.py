"""Watches an optimizer step and writes what it saw."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.hooks import RemovableHandle

from explaind_core.batches import BatchLog, copied
from explaind_core.coefficients import UpdateRule
from explaind_core.data import IndexedDataset
from explaind_core.early import EarlyCheck, check_mode, no_pass
from explaind_core.errors import ExplaindError, NonFiniteError, RecordingError
from explaind_core.fingerprints import fingerprint
from explaind_core.finite import check_gradients
from explaind_core.forwards import ForwardWatch
from explaind_core.iterations import Evaluation, IterationSplitter
from explaind_core.joint import OWNER, each_optimizer, each_rule
from explaind_core.microbatches import MicroBatch
from explaind_core.plugins import RegisteredRule, Registry, default_registry
from explaind_core.recipes import GradientFunction
from explaind_core.rounds import Rounds
from explaind_core.run_rules import OptimizerFactory
from explaind_core.scaling import ScalerWatch, check_scaler
from explaind_core.sizes import check_space, store_size
from explaind_core.store import RunStore
from explaind_core.subject import Subject
from explaind_core.writer import RunWriter, SeenStep

__all__ = ["Recorder"]


@dataclass
class _Pending(SeenStep):
    """What was seen before ``optimizer.step()``, until the step is over."""

    member: int = 0  # which of several optimizers
    seen: bool = False  # whether gradients were taken (with a closure this happens inside step())
    skipped: bool = False  # a gradient scaler found an infinity: the optimizer will do nothing
    iterations: int = 0  # that it had made before
    nested: int = 0  # how many inner calls of step() are running


class Recorder:
    """Records an ordinary training loop, step by step, to an append-only store.

    Per step it writes theta_s, every gradient as the optimizer was fed it (cloned before ``step()``), each
    group's hyper-parameters as they stood before the step, which samples the batch held, and buffers that
    changed. Parameters are known by their names in ``model``. Recording starts when the Recorder is made:
    theta_0 and the optimizer's state are those of that moment.

    Args:
        path: a folder that does not exist yet (or is empty).
        model: any module, compiled or not; parameters are known by their names in the plain one.
        optimizer: any optimizer with a registered rule; or a list of several, each of which trains parameters of its
            own. Their steps from one gradient of the model are recorded as one.
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
            By default every step is on disk when ``optimizer.step()`` returns; a killed process loses those that wait.
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

    Attributes:
        skipped: how many times a gradient scaler kept the optimizer (all of several) from stepping.

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
    ) -> None:
        check_scaler(scaler)
        optimizers = each_optimizer(optimizer)
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
        self._writer = RunWriter(self._store, self._subject, snapshot_every, mode, write_behind)
        self._early = None if mode == "steps" else EarlyCheck(self._subject, mode, loss, gradient, penalty)
        self._modelled = gradient is None  # the model is called as it is, by the default recipe
        self._reading: dict[str, Any] = {"rule": rule, "registry": registry, "make_optimizer": make_optimizer}
        self._reading["dataset"] = inputs if isinstance(inputs, IndexedDataset) else None
        # Where a step is computed again: the buffers before its pass, None before it was called.
        self._buffers: dict[str, Tensor] | None = None
        self._moved: dict[str, Tensor] = {}  # those of them that the last step left otherwise
        self._batches = BatchLog(self._store, train_size, inputs)
        self._factor = 1.0
        self._clips: list[list[Any]] = []
        self._pending: _Pending | None = None
        self.skipped, self._stopped = 0, False
        self._expected_size = store_size(
            model, optimizers, expected_steps or 0, mode=mode, snapshot_every=snapshot_every
        )
        if expected_steps is not None:
            check_space(self._store.path, self._expected_size)
        try:
            if resume is not False:
                self._writer.resume(None if resume is True else resume)
            else:
                self._writer.start(loss, train_size, overwrite=overwrite, penalty=penalty)
        except BaseException:  # what refuses the run must not keep others from it
            self._store.unlock()
            raise
        self._threads = self._writer.threads
        iterates = self._subject.rule.iterations({}) is not None
        parameters = self._subject.parameters
        self._splitter = IterationSplitter(self._subject.rule, optimizers[0], parameters) if iterates else None
        self._watch = ForwardWatch(model, self._before_pass)
        self._rounds: Rounds | None = None
        if self._subject.joint:
            self._rounds = Rounds(self._subject, self._writer, self._batches, self._discarded)
        self._handles: list[RemovableHandle] = []
        for each in optimizers:
            self._handles.append(each.register_step_pre_hook(self._before_step))
            self._handles.append(each.register_step_post_hook(self._after_step))
        self._scaler = None if scaler is None else ScalerWatch(scaler, optimizers, self._skipped)

    @property
    def steps(self) -> int:
        """How many steps are recorded; of several optimizers, how many rounds are over."""
        return self._writer.steps

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
        if self._rounds is not None:
            self._rounds.end()
        self._writer.queue.check()
        self._batches.keeps = self._early is not None and self._early.due(self.steps + 1)
        self._batches.declare(inputs, targets, ids, weight, self.steps + 1, self._watch.take(), scale, draws)

    def discard_batch(self) -> None:
        """Forget the batches declared since the last step: their gradients will not be used.

        Needed where a ``GradScaler`` skips ``optimizer.step()`` without calling it (no fused optimizer): the
        recorder cannot see that, unless it was given the scaler.
        """
        if self._rounds is not None:
            self._rounds.end()
        self._batches.clear()
        self._watch.take()
        self._factor, self._clips, self._buffers = 1.0, [], None

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the gradient of all trained parameters, in the model's order, by their norm, and keep that it was.

        This calls ``torch.nn.utils.clip_grad_norm_``; :meth:`gradient_factor` is told by what it multiplied.

        Returns:
            The norm before clipping, ``[]``.
        """
        total = nn.utils.clip_grad_norm_(self._subject.trained(), max_norm, norm_type)
        self.clipped(norm=max_norm, norm_type=norm_type, found=total)
        return total

    def clip_grad_value_(self, clip_value: float) -> None:
        """Clip every entry of the gradient of all trained parameters to ``[-clip_value, clip_value]``, and keep that.

        This calls ``torch.nn.utils.clip_grad_value_``.
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
            norm: by the norm of all trained parameters' gradients, of type ``norm_type``. value: entry by entry, after
                that. found: the norm before clipping, which ``clip_grad_norm_`` returned, if it is known.

        Raises:
            RecordingError: neither a norm nor a value is given.
        """
        if norm is None and value is None:
            raise RecordingError(
                "clipping has a norm or a value",
                where=f"step {self.steps + 1}",
                remedy="recorder.clipped(norm=1.0), or recorder.clipped(value=1.0)",
            )
        if norm is not None:
            self._clips.append(["norm", float(norm), float(norm_type)])
            # A norm that is not finite leaves no finite gradient: the step is refused, or a gradient scaler skips it.
            if found is not None and math.isfinite(found):
                self._factor *= min(1.0, float(norm) / (float(found) + 1e-6))
        if value is not None:
            self._clips.append(["value", float(value)])

    def gradient_factor(self, factor: float) -> None:
        """Tell by what the coming step's gradient was multiplied after ``backward()``: a clip coefficient.

        ``clip_grad_norm_(parameters, c)`` returns the norm n it found; its factor is ``min(1, c / (n + 1e-6))``.
        The recorder keeps the gradient as fed; the factor is needed to compare it with the samples' own gradients.

        Raises:
            NonFiniteError: the factor is NaN or infinite.
            RecordingError: in a mode that computes gradients again: a factor does not tell how it was rounded.
        """
        if self._early is not None and factor != 1.0:
            raise RecordingError(
                "a factor alone does not tell how the gradient was rounded",
                where=f"mode={self._writer.mode!r}, step {self.steps + 1}",
                remedy="use recorder.clip_grad_norm_, or declare clipping with recorder.clipped; or mode='steps'",
            )
        if not math.isfinite(factor):
            raise NonFiniteError("the gradient factor is not finite", where=f"step {self.steps + 1}", got=factor)
        self._factor *= float(factor)

    def log(self, **metrics: float | Tensor) -> None:
        """Keep numbers (a loss, an accuracy) with the last finished step; ``run.metrics`` returns them.

        With several optimizers they belong to the round that the last step is part of.

        Raises:
            NonFiniteError: one of them is NaN or infinite. RecordingError: one is called ``step``.
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
        pending = self._rounds is not None and self._rounds.pending
        self._store.append_line("metrics.jsonl", {"step": self.steps + pending, **values})

    def close(self) -> None:
        """End the recording in order. Leaving the ``with`` block does this."""
        self._detach()
        try:
            if self._rounds is not None:
                self._rounds.end()
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
        if self._rounds is not None:
            with suppress(ExplaindError):  # of two errors, the first one is to be seen
                self._rounds.end()
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
        self._watch.close()
        for handle in self._handles:
            handle.remove()
        if self._rounds is not None:
            self._rounds.close()
        if self._scaler is not None:
            self._scaler.close()

    # ------------------------------------------------------------------ what the optimizer calls
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._pending is not None and _steps_running(optimizer) > 1:
            self._pending.nested += 1  # a step() that calls super().step(): what counts is what the outer one was fed
            return None
        outer = None if self._pending is None else self._subject.optimizers[self._pending.member]
        if outer is not None and outer is not optimizer and _steps_running(outer):
            raise RecordingError(
                "an optimizer stepped inside the step of another one",
                where=f"step {self.steps + 1}: {type(optimizer).__name__}",
                remedy="let closures only compute the loss and its gradient",
            )
        self._writer.check_alive()
        pending = self._pending = _Pending(member=self._subject.optimizers.index(optimizer))
        self._subject.check_parameters()  # groups may have been added
        pending.groups = self._subject.groups()
        if self._splitter is not None:
            pending.iterations = self._splitter.count(optimizer)
        self._check_untouched("outside optimizer.step()")
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._see_gradients(pending)
            return None

        def watched() -> Any:
            # The gradient of this step exists only once the closure has run.
            declared = len(self._batches.entries)
            result = closure()
            if pending.seen:
                if self._splitter is None:
                    raise RecordingError(
                        f"{type(optimizer).__name__} called its closure more than once in a step",
                        where=f"step {self.steps + 1}",
                        expected="one gradient per step",
                        remedy="use an optimizer, or options, that evaluate the closure once",
                    )
                self._batches.drop_repeats(declared, self.steps + 1)
                self._see_again(pending, result)
            else:
                self._check_untouched("inside the closure")
                self._see_gradients(pending, result)
            return result

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _before_pass(self) -> None:
        """The model is about to be called: note buffers that something changed since the last step."""
        if self._early is None or self._buffers is not None:
            return
        self._moved = self._writer.buffers_moved()
        self._buffers = self._subject.buffers() if self._early.due(self.steps + 1) else {}

    def _check_untouched(self, how: str, *, but: int | None = None) -> None:
        """Every parameter must stand where the last step left it; those of optimizer ``but`` may have moved."""
        if self._writer.marks is not None:
            self._writer.marks.check(how, self.steps)
            return
        same = self._subject.untouched if self._early is None else torch.equal
        left = self._writer.last if self._rounds is None else self._rounds.theta
        for name, parameter in self._subject.parameters.items():
            if but is not None and self._subject.owner(name) == but:
                continue
            if not same(left[name], parameter.detach().cpu()):
                raise RecordingError(
                    f"a parameter changed {how}",
                    where=f"parameter {name!r}, between step {self.steps} and step {self.steps + 1}",
                    expected="the value that the last step left",
                    remedy="make the Recorder after the model is initialised, and change parameters in step() only",
                )

    def _see_gradients(self, pending: _Pending, loss: Any = None) -> None:
        pending.seen = True
        # A GradScaler with a fused optimizer hands over scaled gradients, and lets step() run on infinities.
        optimizer = self._subject.optimizers[pending.member]
        scale, found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        pending.skipped = found is not None and float(found) > 0
        if self._rounds is not None and not pending.skipped:
            self._rounds.enter(pending.member, self._fed(pending), told=self._factor != 1 or bool(self._clips))
        if not self._batches.entries:
            raise RecordingError(
                "no batch was declared before optimizer.step()",
                where=f"step {self.steps + 1}",
                remedy="call recorder.batch(inputs, targets, ids=ids) between backward() and step()",
            )
        if self._rounds is None or self._rounds.fresh:
            self._batches.settle(self._watch.take(), None if scale is None else float(scale))
        pending.clips = self._clips
        if pending.skipped:
            return
        for name, gradient in self._fed(pending).items():
            # Looked at only where they are not written: a copy would be for nothing.
            given = gradient.detach().clone() if self._early is None else gradient.detach()
            pending.gradients[name] = given if scale is None else given / scale.to(given.device)
        if found is None:  # otherwise infinities are the gradient scaler's business
            check_gradients(pending.gradients, self.steps + 1)
        if self._early is not None:
            self._prepare_again(self._early, pending)
        if self._splitter is not None:
            self._see_again(pending, loss)

    def _prepare_again(self, early: EarlyCheck, pending: _Pending) -> None:
        """Note what it takes to compute this step's gradient again, and try it where that is due."""
        batches, step, mode = self._batches, self.steps + 1, self._writer.mode
        if self._modelled and None in batches.forwards:
            raise no_pass(mode, step)
        if any(gradient.is_sparse for gradient in pending.gradients.values()):
            raise RecordingError("a gradient is sparse", where=f"mode={mode!r}, step {step}", remedy="use mode='steps'")
        if self._buffers is None:  # gradient= does without calling the model
            self._before_pass()
        pending.buffers_before = self._moved
        if batches.keeps and batches.contents:
            batch = [
                MicroBatch(ids, content["inputs"], content["targets"], entry["weight"], forward)
                for ids, content, entry, forward in zip(
                    batches.ids, batches.contents, batches.entries, batches.forwards, strict=True
                )
            ]
            early.check(batch, self._buffers or {}, pending.gradients, pending.clips, step)
        pending.again = {"unfed": [n for g in pending.groups for n in g["params"] if n not in pending.gradients]}
        if mode == "parameters":
            pending.again["gradient_hash"] = fingerprint(pending.gradients)
        if early.recipe.header():
            pending.again["recipe"] = early.recipe.header()
        if (threads := torch.get_num_threads()) != self._threads:
            pending.again["threads"] = threads

    def _fed(self, pending: _Pending) -> dict[str, Tensor]:
        own = [group for group in pending.groups if group.get(OWNER) == pending.member or self._rounds is None]
        gradients = {n: self._subject.parameters[n].grad for group in own for n in group["params"]}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def _see_again(self, pending: _Pending, loss: Any) -> None:
        """One evaluation of the closure among those of an optimizer that iterates inside."""
        theta = self._subject.theta()
        gradients = {n: copied(g.to_dense() if g.is_sparse else g) for n, g in self._fed(pending).items()}
        value = loss.detach().item() if isinstance(loss, Tensor) else float(loss)
        pending.evaluations.append(Evaluation(theta, value, gradients))

    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if self._pending is not None and self._pending.nested:
            self._pending.nested -= 1
            return
        pending, self._pending = self._pending, None
        if pending is None:  # the recorder was made inside this very step
            return
        if not pending.seen:
            raise RecordingError(
                "the optimizer never evaluated its closure", where=f"step {self.steps + 1}", remedy="pass no closure"
            )
        if pending.skipped:
            self._skipped(pending.member)
            return
        if self._rounds is not None:
            self._check_untouched("in the step of another optimizer", but=pending.member)
            self._rounds.add(pending.member, pending, self._told())
            return
        if self._writer.marks is None:
            theta = self._subject.theta()
        else:  # only looked at
            theta = {name: parameter.detach() for name, parameter in self._subject.parameters.items()}
        if self._splitter is None:
            self._writer.finish(pending, theta, self._batches, self._factor)
            if self._early is not None and self._writer.marks is not None and self.steps == 1:
                self._early.check_reading(self._store.path, **self._reading)
        else:
            self._finish_iterations(self._splitter, pending, theta)
        self.discard_batch()

    def _skipped(self, member: int) -> None:
        """A gradient scaler kept an optimizer from stepping."""
        if self._rounds is None:
            self._discarded()
            self.discard_batch()
        else:
            self._rounds.skip(member, self._told())

    def _told(self) -> tuple[float, list[list[Any]]]:
        """What was declared of the gradient since the last step: its factor, and how it was clipped."""
        factor, clips = self._factor, self._clips
        self._factor, self._clips = 1.0, []
        return factor, clips

    def _discarded(self) -> None:
        self.skipped += 1

    def _finish_iterations(self, splitter: IterationSplitter, pending: _Pending, theta: dict[str, Tensor]) -> None:
        count = splitter.count(self._subject.optimizers[0]) - pending.iterations
        found = splitter.split(pending.evaluations, pending.groups, count, self.steps + 1, self._writer.snapshot_every)
        reached = found[-1].theta if found else self._writer.last
        for name, value in theta.items():
            if not torch.equal(reached[name], value):
                raise RecordingError(
                    "the parameters do not stand where the iterations inside the step lead",
                    where=f"parameter {name!r}, step {self.steps + 1}",
                    remedy="let the closure change no parameter",
                )
        for iteration in found:
            gradients, evaluations = dict(iteration.evaluations[0].gradients), list(iteration.evaluations)
            single = SeenStep(gradients, iteration.groups, evaluations, pending.clips)
            self._writer.finish(single, iteration.theta, self._batches, self._factor, iteration.state)


def _steps_running(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of ``optimizer.step`` are on the stack. Hooks run for each; an earlier one that raised is gone."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        hooked = frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer"
        count += hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count
