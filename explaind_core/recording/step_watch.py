"""What the optimizers of a recorded loop are seen to do: from the gradients that a step was fed to what it left.

A step is seen by hooks before and behind ``optimizer.step()``, and by its closure, if it has one. What happens when::

    state             event                                   next state        action, or refusal
    ----------------  --------------------------------------  ----------------  ------------------------------------
    between steps     step() begins                           fed, or skipped   gradients and groups are taken
    between steps     step(closure) begins                    awaiting closure  groups are taken
    awaiting closure  the closure returns                     fed, or skipped   gradients are taken
    fed               the closure returns again               fed               an optimizer that iterates inside: one
                                                                                evaluation more; any other: refused
    awaiting closure  step() ends                             between steps     refused: it called no closure
    fed               step() ends                             between steps     one optimizer: the step is written, or
                                                                                its iterations are; one of several:
                                                                                the step is handed to the round
    skipped           step() ends                             between steps     the batch is forgotten
    between steps     the scaler's step() has not called      between steps     the batch is forgotten
                      the optimizer's
    inside a step     its own step() begins again, and ends:  as it was         counted, and passed over
                      super().step()
    inside a step     the step() of another one begins        as it was         refused
    inside a step     an error leaves step(), and the next    as between steps  what was seen of it is forgotten
                      one begins

"Inside a step" are the states fed, skipped and awaiting closure. Where gradients are taken, a batch must have been
declared, and every parameter must stand where the last step left it. A step is skipped where a gradient scaler found
an infinity: a fused optimizer is called all the same and does nothing. Of several optimizers, which steps are one is
told in :mod:`explaind_core.recording.rounds`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.hooks import RemovableHandle

from explaind_core.errors import RecordingError
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.declared_clipping import DeclaredClipping
from explaind_core.recording.early_check import no_gradient
from explaind_core.recording.forward_watch import ForwardWatch
from explaind_core.recording.inner_iterations import Evaluation, IterationSplitter
from explaind_core.recording.model_calls import ModelCalls
from explaind_core.recording.recomputation_notes import RecomputationNotes
from explaind_core.recording.rounds import Rounds
from explaind_core.recording.run_writer import RunWriter, SeenStep
from explaind_core.recording.scaler_watch import ScalerWatch
from explaind_core.recording.subject import Subject
from explaind_core.rules import OWNER
from explaind_core.tensors import check_gradients, copied
from explaind_core.training_step import keeps_outputs

__all__ = ["StepWatch"]


@dataclass
class _PendingStep(SeenStep):
    """What was seen of a step that is not over.

    Attributes:
        member: which of several optimizers makes it.
        gradients_taken: whether its gradients are known; with a closure they are once it has returned.
        skipped: whether a gradient scaler found an infinity: the optimizer will do nothing.
        iterations_before: how many iterations it had made, where it iterates inside a step.
        inner_calls: how many calls of its own ``step()`` run inside this one.
    """

    member: int = 0
    gradients_taken: bool = False
    skipped: bool = False
    iterations_before: int = 0
    inner_calls: int = 0


class StepWatch:
    """Sees every step of the recorded optimizers, by their hooks, and hands it to the writer when it is over.

    Args:
        path: of the run.
        model: as the loop calls it.
        subject: the model and its optimizers.
        writer: writes steps.
        batches: the batches that the loop declares for the coming step.
        clipping: what it declares of the coming step's gradient.
        recomputation: in modes that compute gradients again, what notes how.
        scaler: the loop's gradient scaler, if the Recorder was given it.
        train_axis: whether gradients that could not be split by samples are refused.

    Attributes:
        forwards: how the model was called.
        rounds: of several optimizers, what collects their steps.
        skipped: how many times a gradient scaler kept the optimizer (all of several) from stepping.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        subject: Subject,
        writer: RunWriter,
        batches: BatchLog,
        clipping: DeclaredClipping,
        recomputation: RecomputationNotes | None,
        scaler: GradScaler | None,
        *,
        train_axis: bool = True,
    ) -> None:
        self._path, self._subject, self._writer, self._batches = path, subject, writer, batches
        self._clipping, self._recomputation = clipping, recomputation
        self._pending: _PendingStep | None = None
        self.skipped = 0
        optimizers, iterates = subject.optimizers, subject.rule.iterations({}) is not None
        self._splitter = IterationSplitter(subject.rule, optimizers[0], subject.parameters) if iterates else None
        before_pass = tuple if recomputation is None else recomputation.before_pass
        calls = ModelCalls(subject.trained, refused=train_axis)
        self.forwards = ForwardWatch(model, before_pass, calls, self._keeps_outputs)
        self.rounds = Rounds(subject, writer, batches, self._count_skipped) if subject.joint else None
        self._handles: list[RemovableHandle] = []
        for each in optimizers:
            self._handles.append(each.register_step_pre_hook(self._before_step))
            self._handles.append(each.register_step_post_hook(self._after_step))
        self._scaler = None if scaler is None else ScalerWatch(scaler, optimizers, self._end_skipped)

    @property
    def _coming_step(self) -> int:
        """The number of the step that is not over."""
        return self._writer.steps + 1

    def _keeps_outputs(self) -> bool:
        """Whether entries of the outputs of the coming step are kept; inner iterations would all have the first's."""
        return self._splitter is None and keeps_outputs(self._coming_step, self._writer.snapshot_every)

    def end_round(self) -> None:
        """Of several optimizers: no other one steps from the gradients of this round."""
        if self.rounds is not None:
            self.rounds.end()

    def forget(self) -> None:
        """Forget what was declared and seen since the last step."""
        self._batches.clear()
        self.forwards.take()
        self.forwards.calls.forget()
        self._clipping.take()
        if self._recomputation is not None:
            self._recomputation.forget()

    def detach(self) -> None:
        """Leave model, optimizers and gradient scaler as they were."""
        self.forwards.close()
        for handle in self._handles:
            handle.remove()
        if self.rounds is not None:
            self.rounds.close()
        if self._scaler is not None:
            self._scaler.close()

    # ------------------------------------------------------------------ a step begins
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The hook before ``optimizer.step()``."""
        if self._pending is not None and _steps_running(optimizer) > 1:
            self._pending.inner_calls += 1  # super().step(): what counts is what the outer one was fed
            return None
        outer = None if self._pending is None else self._subject.optimizers[self._pending.member]
        if outer is not None and outer is not optimizer and _steps_running(outer):
            raise RecordingError(
                "an optimizer stepped inside the step of another one",
                where=f"step {self._coming_step}: {type(optimizer).__name__}",
                remedy="let closures only compute the loss and its gradient",
            )
        self._writer.check_alive()
        pending = self._pending = _PendingStep(member=self._subject.optimizers.index(optimizer))
        self._subject.check_parameters()  # groups may have been added
        pending.groups = self._subject.groups()
        if self._splitter is not None:
            pending.iterations_before = self._splitter.count(optimizer)
        self._check_untouched("outside optimizer.step()")
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._take_gradients(pending)
            return None

        def watched_closure() -> Any:
            declared_before = len(self._batches.entries)
            result = closure()
            self._after_closure(pending, result, declared_before)
            return result

        if len(args) > 1:
            return (args[0], watched_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched_closure}

    def _after_closure(self, pending: _PendingStep, loss: Any, declared_before: int) -> None:
        """The closure has returned: only now the gradient of this step exists."""
        if not pending.gradients_taken:
            self._check_untouched("inside the closure")
            self._take_gradients(pending, loss)
            return
        if self._splitter is None:
            kind = type(self._subject.optimizers[pending.member]).__name__
            raise RecordingError(
                f"{kind} called its closure more than once in a step",
                where=f"step {self._coming_step}",
                expected="one gradient per step",
                remedy="use an optimizer, or options, that evaluate the closure once",
            )
        self._batches.drop_repeats(declared_before, self._coming_step)
        self._add_evaluation(pending, loss)

    def _check_untouched(self, how: str, *, stepped: int | None = None) -> None:
        """Every parameter must stand where the last step left it, or those before in the round; but of ``stepped``."""
        moved: dict[str, Tensor | None] = {} if self.rounds is None else dict(self.rounds.moved)
        if stepped is not None:
            moved |= dict.fromkeys(n for n in self._subject.parameters if self._subject.owner(n) == stepped)
        self._writer.last.check_untouched(how, moved=moved)

    # ------------------------------------------------------------------ the gradients are there
    def _take_gradients(self, pending: _PendingStep, loss: Any = None) -> None:
        pending.gradients_taken = True
        # A GradScaler with a fused optimizer hands over scaled gradients, and lets step() run on infinities.
        optimizer = self._subject.optimizers[pending.member]
        scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        pending.skipped = found_inf is not None and float(found_inf) > 0
        fed = self._fed_gradients(pending)
        if self.rounds is not None and not pending.skipped:
            self.rounds.begin_step(pending.member, fed, declared=bool(self._clipping))
        if not self._batches.entries:
            raise RecordingError(
                "no batch was declared before optimizer.step()",
                where=f"step {self._coming_step}",
                remedy="call recorder.batch(inputs, targets, ids=ids) between backward() and step()",
            )
        if self.rounds is None or self.rounds.at_beginning:
            pending.calls = self.forwards.calls.check([len(ids) for ids in self._batches.ids], self._coming_step)
            self._batches.assign_passes(self.forwards.take(), None if scale is None else float(scale))
        pending.clips = self._clipping.clips
        if pending.skipped:
            return
        if not fed and self._coming_step == 1 and any(self._batches.forwards) and self.rounds is None:
            raise no_gradient(1)  # later ones may have nothing to learn from, and of several optimizers one be idle
        for name, gradient in fed.items():
            # Looked at only where they are not written: a copy would be for nothing.
            kept = gradient.detach().clone() if self._recomputation is None else gradient.detach()
            pending.gradients[name] = kept if scale is None else kept / scale.to(kept.device)
        if found_inf is None:  # otherwise infinities are the gradient scaler's business
            check_gradients(pending.gradients, self._coming_step)
        if self._recomputation is not None:
            self._recomputation.note(pending)
        if self._splitter is not None:
            self._add_evaluation(pending, loss)

    def _fed_gradients(self, pending: _PendingStep) -> dict[str, Tensor]:
        own = [group for group in pending.groups if group.get(OWNER) == pending.member or self.rounds is None]
        gradients = {n: self._subject.parameters[n].grad for group in own for n in group["params"]}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def _add_evaluation(self, pending: _PendingStep, loss: Any) -> None:
        """One evaluation of the closure among those of an optimizer that iterates inside."""
        theta = self._subject.theta()
        fed = self._fed_gradients(pending)
        gradients = {n: copied(g.to_dense() if g.is_sparse else g) for n, g in fed.items()}
        value = loss.detach().item() if isinstance(loss, Tensor) else float(loss)
        pending.evaluations.append(Evaluation(theta, value, gradients))

    # ------------------------------------------------------------------ a step ends
    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        """The hook behind ``optimizer.step()``."""
        if self._pending is not None and self._pending.inner_calls:
            self._pending.inner_calls -= 1
            return
        pending, self._pending = self._pending, None
        if pending is None:  # the recorder was made inside this very step
            return
        if not pending.gradients_taken:
            raise RecordingError(
                "the optimizer never evaluated its closure",
                where=f"step {self._coming_step}",
                remedy="pass no closure",
            )
        if pending.skipped:
            self._end_skipped(pending.member)
        elif self.rounds is not None:
            self._check_untouched("in the step of another optimizer", stepped=pending.member)
            factor, _ = self._clipping.take()
            self.rounds.end_step(pending.member, pending, factor)
        else:
            self._finish(pending)
            self.forget()

    def _end_skipped(self, member: int) -> None:
        """A gradient scaler kept an optimizer from stepping."""
        if self.rounds is None:
            self._count_skipped()
            self.forget()
        else:
            self.rounds.skip_step(member, *self._clipping.take())

    def _count_skipped(self) -> None:
        self.skipped += 1

    def _finish(self, pending: _PendingStep) -> None:
        """Write the step of the only optimizer."""
        theta = self._writer.last.parameters_now()
        if self._splitter is not None:
            self._finish_iterations(self._splitter, pending, theta)
            return
        self._writer.finish(pending, theta, self._batches, self._clipping.factor)
        if self._recomputation is not None:
            self._recomputation.written(self._path)

    def _finish_iterations(self, splitter: IterationSplitter, pending: _PendingStep, theta: dict[str, Tensor]) -> None:
        """Write each iteration of the step as one of its own."""
        count = splitter.count(self._subject.optimizers[0]) - pending.iterations_before
        snapshot_every = self._writer.snapshot_every
        iterations = splitter.split(pending.evaluations, pending.groups, count, self._coming_step, snapshot_every)
        reached = iterations[-1].theta if iterations else pending.evaluations[0].theta
        for name, value in theta.items():
            if not torch.equal(reached[name], value):
                raise RecordingError(
                    "the parameters do not stand where the iterations inside the step lead",
                    where=f"parameter {name!r}, step {self._coming_step}",
                    remedy="let the closure change no parameter",
                )
        for iteration in iterations:
            gradients, evaluations = dict(iteration.evaluations[0].gradients), list(iteration.evaluations)
            single = SeenStep(gradients, iteration.groups, evaluations, pending.clips, calls=pending.calls)
            self._writer.finish(single, iteration.theta, self._batches, self._clipping.factor, iteration.state)


def _steps_running(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of ``optimizer.step`` are on the stack. Hooks run for each; an earlier one that raised is gone."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        hooked = frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer"
        count += hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count
