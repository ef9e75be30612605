"""What the optimizers of a recorded loop are seen to do: from the gradients that a step was fed to what it left."""

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
from explaind_core.recording.declared_clipping import Declared
from explaind_core.recording.forward_watch import ForwardWatch
from explaind_core.recording.inner_iterations import Evaluation, IterationSplitter
from explaind_core.recording.recomputation import Recomputation
from explaind_core.recording.rounds import Rounds
from explaind_core.recording.run_writer import RunWriter
from explaind_core.recording.scaler_watch import ScalerWatch
from explaind_core.recording.seen_step import SeenStep
from explaind_core.recording.subject import Subject
from explaind_core.rules import OWNER
from explaind_core.tensors import check_gradients, copied

__all__ = ["StepWatch"]


@dataclass
class PendingStep(SeenStep):
    """What was seen before ``optimizer.step()``, until the step is over."""

    member: int = 0  # which of several optimizers
    seen: bool = False  # whether gradients were taken (with a closure this happens inside step())
    skipped: bool = False  # a gradient scaler found an infinity: the optimizer will do nothing
    iterations: int = 0  # that it had made before
    nested: int = 0  # how many inner calls of step() are running


class StepWatch:
    """Sees every step of the recorded optimizers, by their hooks, and hands it to the writer when it is over.

    Args:
        path: of the run. model: as the loop calls it. subject: model and optimizers. writer: writes steps.
        batches, declared: what the loop says of the coming step.
        again: in modes that compute gradients again, what notes how. scaler: the loop's gradient scaler.

    Attributes:
        forwards: how the model was called. rounds: of several optimizers, what collects their steps.
        skipped: how many times a gradient scaler kept the optimizer (all of several) from stepping.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        subject: Subject,
        writer: RunWriter,
        batches: BatchLog,
        declared: Declared,
        again: Recomputation | None,
        scaler: GradScaler | None,
    ) -> None:
        self._path, self._subject, self._writer, self._batches = path, subject, writer, batches
        self._declared, self._again = declared, again
        self._pending: PendingStep | None = None
        self.skipped = 0
        optimizers, iterates = subject.optimizers, subject.rule.iterations({}) is not None
        self._splitter = IterationSplitter(subject.rule, optimizers[0], subject.parameters) if iterates else None
        self.forwards = ForwardWatch(model, tuple if again is None else again.before_pass)
        self.rounds = Rounds(subject, writer, batches, self._discarded) if subject.joint else None
        self._handles: list[RemovableHandle] = []
        for each in optimizers:
            self._handles.append(each.register_step_pre_hook(self._before_step))
            self._handles.append(each.register_step_post_hook(self._after_step))
        self._scaler = None if scaler is None else ScalerWatch(scaler, optimizers, self._skipped)

    @property
    def _coming(self) -> int:
        """The number of the step that is not over."""
        return self._writer.steps + 1

    def end_round(self) -> None:
        """Of several optimizers: no other one steps from the gradients of this round."""
        if self.rounds is not None:
            self.rounds.end()

    def forget(self) -> None:
        """Forget what was declared and seen since the last step."""
        self._batches.clear()
        self.forwards.take()
        self._declared.take()
        if self._again is not None:
            self._again.forget()

    def detach(self) -> None:
        """Leave model, optimizers and gradient scaler as they were."""
        self.forwards.close()
        for handle in self._handles:
            handle.remove()
        if self.rounds is not None:
            self.rounds.close()
        if self._scaler is not None:
            self._scaler.close()

    # ------------------------------------------------------------------ hooks of the optimizer
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
                where=f"step {self._coming}: {type(optimizer).__name__}",
                remedy="let closures only compute the loss and its gradient",
            )
        self._writer.check_alive()
        pending = self._pending = PendingStep(member=self._subject.optimizers.index(optimizer))
        self._subject.check_parameters()  # groups may have been added
        pending.groups = self._subject.groups()
        if self._splitter is not None:
            pending.iterations = self._splitter.count(optimizer)
        self._writer.last.check_untouched("outside optimizer.step()", moved=self._moved())
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
                        where=f"step {self._coming}",
                        expected="one gradient per step",
                        remedy="use an optimizer, or options, that evaluate the closure once",
                    )
                self._batches.drop_repeats(declared, self._coming)
                self._see_again(pending, result)
            else:
                self._writer.last.check_untouched("inside the closure", moved=self._moved())
                self._see_gradients(pending, result)
            return result

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _moved(self) -> dict[str, Tensor | None]:
        """The parameters that earlier optimizers moved in the round that is not over, and where to."""
        return {} if self.rounds is None else dict(self.rounds.moved)

    def _see_gradients(self, pending: PendingStep, loss: Any = None) -> None:
        pending.seen = True
        # A GradScaler with a fused optimizer hands over scaled gradients, and lets step() run on infinities.
        optimizer = self._subject.optimizers[pending.member]
        scale, found = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        pending.skipped = found is not None and float(found) > 0
        if self.rounds is not None and not pending.skipped:
            self.rounds.enter(pending.member, self._fed(pending), told=bool(self._declared))
        if not self._batches.entries:
            raise RecordingError(
                "no batch was declared before optimizer.step()",
                where=f"step {self._coming}",
                remedy="call recorder.batch(inputs, targets, ids=ids) between backward() and step()",
            )
        if self.rounds is None or self.rounds.fresh:
            self._batches.settle(self.forwards.take(), None if scale is None else float(scale))
        pending.clips = self._declared.clips
        if pending.skipped:
            return
        for name, gradient in self._fed(pending).items():
            # Looked at only where they are not written: a copy would be for nothing.
            given = gradient.detach().clone() if self._again is None else gradient.detach()
            pending.gradients[name] = given if scale is None else given / scale.to(given.device)
        if found is None:  # otherwise infinities are the gradient scaler's business
            check_gradients(pending.gradients, self._coming)
        if self._again is not None:
            self._again.note(pending)
        if self._splitter is not None:
            self._see_again(pending, loss)

    def _fed(self, pending: PendingStep) -> dict[str, Tensor]:
        own = [group for group in pending.groups if group.get(OWNER) == pending.member or self.rounds is None]
        gradients = {n: self._subject.parameters[n].grad for group in own for n in group["params"]}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def _see_again(self, pending: PendingStep, loss: Any) -> None:
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
                "the optimizer never evaluated its closure",
                where=f"step {self._coming}",
                remedy="pass no closure",
            )
        if pending.skipped:
            self._skipped(pending.member)
            return
        if self.rounds is not None:
            own = dict.fromkeys(n for n in self._subject.parameters if self._subject.owner(n) == pending.member)
            self._writer.last.check_untouched("in the step of another optimizer", moved=self._moved() | own)
            self.rounds.add(pending.member, pending, self._declared.take())
            return
        theta = self._writer.last.parameters_now()
        if self._splitter is None:
            self._writer.finish(pending, theta, self._batches, self._declared.factor)
            if self._again is not None:
                self._again.written(self._path)
        else:
            self._finish_iterations(self._splitter, pending, theta)
        self.forget()

    def _skipped(self, member: int) -> None:
        """A gradient scaler kept an optimizer from stepping."""
        if self.rounds is None:
            self._discarded()
            self.forget()
        else:
            self.rounds.skip(member, self._declared.take())

    def _discarded(self) -> None:
        self.skipped += 1

    def _finish_iterations(self, splitter: IterationSplitter, pending: PendingStep, theta: dict[str, Tensor]) -> None:
        count = splitter.count(self._subject.optimizers[0]) - pending.iterations
        found = splitter.split(pending.evaluations, pending.groups, count, self._coming, self._writer.snapshot_every)
        reached = found[-1].theta if found else pending.evaluations[0].theta
        for name, value in theta.items():
            if not torch.equal(reached[name], value):
                raise RecordingError(
                    "the parameters do not stand where the iterations inside the step lead",
                    where=f"parameter {name!r}, step {self._coming}",
                    remedy="let the closure change no parameter",
                )
        for iteration in found:
            gradients, evaluations = dict(iteration.evaluations[0].gradients), list(iteration.evaluations)
            single = SeenStep(gradients, iteration.groups, evaluations, pending.clips)
            self._writer.finish(single, iteration.theta, self._batches, self._declared.factor, iteration.state)


def _steps_running(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of ``optimizer.step`` are on the stack. Hooks run for each; an earlier one that raised is gone."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        hooked = frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer"
        count += hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count
