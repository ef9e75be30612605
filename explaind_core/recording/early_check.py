"""Modes that store less than every step: what they take, and a check, while training, that nothing is lost by them.

What is not stored must come out the same when it is computed again. Whether it does is not left to be found out when
the run is read: the first step is computed again before the optimizer makes it, on a private copy of the model, and
further ones as training goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core.copies import plain_copy
from explaind_core.errors import ExplaindError, RecordingError
from explaind_core.naming import qualified_name
from explaind_core.recording.subject import Subject
from explaind_core.run import open_run
from explaind_core.training_step import GradientFunction, MicroBatch, Recipe, candidates, different

__all__ = ["MODES", "EarlyCheck", "check_loss_is_function", "check_mode", "no_gradient", "no_pass"]

#: What is stored of a step: parameters and gradients, parameters, or neither but for snapshots.
MODES = ("steps", "parameters", "snapshots")
#: Steps with these distances are checked however long training takes; before, those whose number is a power of two.
_EVERY = 1000


def check_mode(
    mode: str, subject: Subject, loss: Callable[..., Tensor] | None, gradient: GradientFunction | None
) -> None:
    """Refuse a mode that cannot record this training.

    Args:
        mode: as the Recorder was given it.
        subject: the model and its optimizers.
        loss: as the Recorder was given it.
        gradient: likewise.

    Raises:
        RecordingError: there is no such mode; in a mode that computes gradients again, the optimizer iterates inside a
            step, there are several, the model's gradients are sparse, or there is no loss.
    """
    if mode not in MODES:
        raise RecordingError("there is no such mode of recording", expected=f"one of {list(MODES)}", got=repr(mode))
    if mode == "steps":
        return
    where, remedy = f"mode={mode!r}", "record with mode='steps'"
    if subject.joint:
        raise RecordingError(
            "steps of several optimizers cannot be computed again in this mode",
            where=where,
            got=subject.described()["optimizer"],
            remedy=remedy,
        )
    if subject.rule.iterations({}) is not None:
        raise RecordingError(
            f"{qualified_name(type(subject.optimizers[0]))} iterates inside a step, which this mode cannot make again",
            where=where,
            remedy=remedy,
        )
    for name, module in subject.model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise RecordingError(
                "sparse gradients cannot be compared in this mode", where=f"{where}, module {name!r}", remedy=remedy
            )
    if loss is None and gradient is None:
        raise RecordingError(
            "this mode computes gradients again, which takes the loss",
            where=where,
            remedy="Recorder(path, model, optimizer, loss, ...), or gradient=",
        )


class EarlyCheck:
    """Computes steps again while they are recorded.

    Args:
        subject: the model and its optimizer.
        mode: of the recording, not ``"steps"``.
        loss: as the Recorder was given it.
        gradient: likewise.
        penalty: likewise.

    Attributes:
        recipe: how the loop rounds, as the last checked step showed.
    """

    def __init__(
        self,
        subject: Subject,
        mode: str,
        loss: Callable[..., Tensor] | None,
        gradient: GradientFunction | None,
        penalty: Callable[..., Tensor] | None = None,
    ) -> None:
        self._subject, self._mode, self._loss, self._gradient = subject, mode, loss, gradient
        self._penalty = penalty
        self._checked = False
        self.recipe = Recipe()

    def due(self, step: int) -> bool:
        """Whether a step is to be computed again: the first one seen, powers of two, every thousandth.

        Args:
            step: its number.

        Returns:
            Whether it is.
        """
        return not self._checked or step & (step - 1) == 0 or step % _EVERY == 0

    def check(
        self,
        batch: Sequence[MicroBatch],
        buffers: Mapping[str, Tensor],
        fed: Mapping[str, Tensor],
        clips: Sequence[Sequence[Any]],
        step: int,
    ) -> None:
        """Compute the gradient of the coming step again; its parameters must not have moved.

        Args:
            batch: the micro-batches that were declared.
            buffers: copies of the buffers before the pass.
            fed: the gradients that the optimizer is about to be fed.
            clips: how they were clipped, as declared.
            step: the number of the coming step, for errors.

        Raises:
            RecordingError: it comes out as another one.
        """
        try:
            model = plain_copy(self._subject.model)  # what it computes if nothing is compiled
        except Exception as error:
            raise RecordingError(
                f"the model cannot be copied: {error}", where=f"mode={self._mode!r}", remedy="record with mode='steps'"
            ) from error
        trained = [self._subject.names[id(p)] for p in self._subject.trained()]
        names = [n for n in trained if n in fed]
        attempts: list[tuple[list[str], dict[str, Tensor]]] = []
        for recipe in [self.recipe, *candidates(batch)] if self._gradient is None else [self.recipe]:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])
            try:
                found = recipe.gradients(
                    model, batch, self._loss, fed=names, trained=trained, clips=clips, gradient=self._gradient,
                    penalty=self._penalty,
                )  # fmt: skip
            except ExplaindError:
                raise
            except Exception as error:
                raise self._refused(step, f"it raises {type(error).__name__}: {error}") from error
            differing = different(found, fed)
            if not differing:
                self.recipe, self._checked = recipe, True
                return
            attempts.append((differing, found))
        raise self._refused(step, *_compared(*attempts[0], fed))

    def check_reading(self, path: Any, **options: Any) -> None:
        """Read the first step back as :func:`explaind_core.open_run` will: the optimizer's part of it as well.

        Args:
            path: of the run.
            options: further ones of ``open_run``.

        Raises:
            RecordingError: it does not come out as it was recorded.
        """
        run = open_run(path, model=self._subject.model, loss=self._loss, gradient=self._gradient,
                       penalty=self._penalty, until=1, **options)  # fmt: skip
        try:
            run.theta(1)
        except ExplaindError as error:
            raise RecordingError(
                "the first step does not come out the same when it is made again, so that snapshots will not do",
                where=f"mode={self._mode!r}, step 1",
                got=error.what,
                remedy=f"{error.remedy or ''}; mode='steps' records any loop",
            ) from error
        finally:
            run.close()

    def _refused(self, step: int, got: str, hint: str = "") -> RecordingError:
        loop = (
            "gradient(model, micro_batch)" if self._gradient else "(loss(model(inputs), targets) * weight).backward()"
        )
        return RecordingError(
            "computed again from what was declared, the gradient of this step is another one",
            where=f"mode={self._mode!r}, step {step}",
            expected=f"bit by bit what {loop} gives for every declared micro-batch, then the declared clipping",
            got=got,
            remedy=f"{hint}declare what the loop does otherwise (recorder.batch(weight=, scale=), "
            "recorder.clip_grad_norm_, recorder.clipped), or pass gradient=callable(model, micro_batch), which runs a "
            "backward pass as the loop does, to the Recorder and to open_run; mode='steps' records any loop",
        )


def _compared(differing: Sequence[str], found: Mapping[str, Tensor], fed: Mapping[str, Tensor]) -> tuple[str, str]:
    """How the gradient differs, and what that looks like."""
    both = [n for n in fed if n in found]
    a, b = (torch.cat([t[n].detach().double().reshape(-1).cpu() for n in both]) for t in (fed, found))
    error, size = float((a - b).norm()), float(a.norm())
    factor = float(a @ b) / float(b @ b) if float(b @ b) else 0.0
    rest = float((a - factor * b).norm())
    got = f"{len(differing)} of {len(fed)} tensors differ, {differing[0]!r} first; |difference| / |gradient| = "
    got += f"{error / size if size else float('inf'):.3g}"
    if error and rest <= 1e-4 * error:
        return got, f"the loop multiplied the gradient by {factor:.6g} (a weight, a clip coefficient?): "
    if error <= 1e-3 * size:
        return got, (
            "the difference is as small as rounding (a compiled model, another memory layout of the inputs, an "
            "algorithm that is not deterministic, a loss taken in another precision?): "
        )
    return got, "the loop seems to add something to the loss or to its gradient (a penalty, noise?): "


def check_loss_is_function(loss: object) -> None:
    """Refuse a loss that is no function, most likely the value of one.

    Args:
        loss: as the Recorder was given it.

    Raises:
        RecordingError: it cannot be called.
    """
    if loss is None or callable(loss):
        return
    value = isinstance(loss, Tensor | float | int)
    raise RecordingError(
        "the loss is a value, and no function" if value else "the loss is no function",
        where="Recorder(path, model, optimizer, loss)",
        expected="loss(output, target) -> one number, or one per sample; such as nn.CrossEntropyLoss()",
        got=f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
        remedy="pass what the loop calls, not what it returned",
    )


def no_gradient(step: int) -> RecordingError:
    """The error for a step that was fed no gradient at all.

    Args:
        step: its number.

    Returns:
        The error, to be raised.
    """
    return RecordingError(
        "no parameter has a gradient, so that there is nothing to explain in this step",
        where=f"step {step}",
        expected="loss.backward() before optimizer.step(), of a loss that depends on what the optimizer trains",
        got="every .grad is None",
        remedy="call optimizer.zero_grad() before backward(), not behind it; look for a detach() or no_grad() between "
        "the parameters and the loss; skip optimizer.step() where a batch has nothing to learn from",
    )


def no_pass(mode: str, step: int) -> RecordingError:
    """The error for a model that was not seen being called.

    Args:
        mode: of the recording.
        step: the number of the coming step.

    Returns:
        The error, to be raised.
    """
    return RecordingError(
        "the model was not called between the last step and this one, so that it cannot be computed again",
        where=f"mode={mode!r}, step {step}",
        expected="a call of the recorded module with gradients enabled, for every declared micro-batch",
        remedy="call the module that the Recorder was given (compiled or wrapped, give it that one), or pass "
        "gradient=; mode='steps' records any loop",
    )
