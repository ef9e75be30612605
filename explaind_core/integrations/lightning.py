"""Records what a ``lightning.pytorch.Trainer`` trains: a callback, and a loader whose batches name their samples.

::

    trainer = Trainer(callbacks=[RecorderCallback("runs/demo", loss)])
    trainer.fit(module, named(loader))
    run = explaind.open_run("runs/demo", model=module)
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from explaind_core.data import Collated, IndexedDataset, split_targets, with_ids
from explaind_core.errors import RecordingError
from explaind_core.integrations.calls import CallWatch
from explaind_core.recording import Recorder
from explaind_core.training_step import LossFunction

__all__ = ["NamedBatch", "RecorderCallback", "named"]


class NamedBatch(NamedTuple):
    """A loader's own batch, and its samples; ``training_step`` is given ``data`` alone.

    Attributes:
        ids: the positions of its samples in the dataset, int64 ``[n]``.
        draws: which draw of each, int64 ``[n]``.
        data: what the loader's collator made.
    """

    ids: Tensor
    draws: Tensor
    data: Any


def named(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader, its batches' samples named for the callback (see :func:`explaind_core.data.with_ids`).

    Args:
        loader: of any dataset whose samples have positions.

    Returns:
        A loader of :class:`NamedBatch`.

    Example:
        >>> data = [(torch.tensor([float(i)]), i % 2) for i in range(3)]
        >>> [batch.ids.tolist() for batch in named(DataLoader(data, batch_size=2))]
        [[0, 1], [2]]
    """
    return with_ids(loader, NamedBatch)


class RecorderCallback(Callback):
    """Records the training of a ``LightningModule``: with one optimizer, or, in manual optimization, several.

    What the model was called with is seen where it is called; by which factor its loss was multiplied (accumulated
    batches, loss terms of one's own scale) is measured at its outputs, where the declared loss is checked as well.

    Args:
        path: a folder that does not exist yet (or is empty), as for :class:`explaind_core.Recorder`.
        loss: ``loss(output, targets)`` that the model is trained on.
        module: the name of the submodule that is recorded and seen when it is called, with all trained parameters:
            ``"net"`` where ``training_step`` calls ``self.net(x)``. By default the LightningModule itself: ``self(x)``.
        targets: the key, or keys, of the targets in a batch that is a mapping, or a function of the batch. By default
            the second of a pair (inputs, targets).
        options: further ones of the Recorder: ``mode``, ``inputs``, ``snapshot_every``, ``resume``, ``overwrite``, ...

    Attributes:
        recorder: the Recorder of the training that runs, or ran.

    Raises:
        RecordingError: in ``trainer.fit()``: several processes; no optimizer; fp16; a loader that names no samples;
            the declared loss is not the one that is trained on.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        loss: LossFunction,
        *,
        module: str = "",
        targets: str | Sequence[str] | Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.path, self.loss, self.module, self.targets, self.options = path, loss, module, targets, options
        self.recorder: Recorder | None = None
        self._watch: CallWatch | None = None
        self._model: nn.Module | None = None
        self._lightning: LightningModule | None = None
        self._batch: NamedBatch | None = None
        self._loss: Tensor | None = None

    # ------------------------------------------------------------------ what the Trainer calls
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the model and start the recording."""
        self._detach()
        if trainer.world_size > 1:
            raise RecordingError(
                "several processes cannot be recorded", where="Trainer", expected="devices=1", got=trainer.world_size
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise RecordingError(
                "a scaled loss cannot be recorded by the callback",
                where="Trainer",
                expected="precision='bf16-mixed', or none that is mixed",
                got=trainer.precision,
            )
        if not trainer.optimizers:
            raise RecordingError("there is no optimizer", where="configure_optimizers", expected="at least one")
        self._model = pl_module.get_submodule(self.module)
        self._watch = CallWatch(self._model)
        self._lightning = pl_module
        # A function in the instance, in front of the class's own: Lightning takes it for an overridden method.
        pl_module.training_step = self._unnamed(pl_module.training_step)  # type: ignore[method-assign]
        if self.recorder is not None:  # of a training that was interrupted
            self.recorder.stop()
        options = dict(self.options)
        if options.get("inputs") == "reread":
            options["inputs"] = self._dataset(trainer.train_dataloader)
        if options.get("resume") is True and _counts_alike(trainer, pl_module):
            options["resume"] = trainer.global_step  # steps after the checkpoint were lost, and will be made again
        optimizers = trainer.optimizers if len(trainer.optimizers) > 1 else trainer.optimizers[0]
        self.recorder = Recorder(self.path, self._model, optimizers, self.loss, **options)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """See the loss that is trained on."""
        self._loss = loss.detach()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Declare the micro-batch whose gradient has just been taken."""
        assert self._watch is not None
        assert self._model is not None
        assert self.recorder is not None
        where = f"batch of step {self.recorder.steps + 1}"
        calls = self._watch.finished()
        if len(calls) != 1:
            name = f"self.{self.module}(...)" if self.module else "self(...)"
            raise RecordingError(
                "not exactly one call of the model belongs to this micro-batch",
                where=where,
                expected=f"one {name} in training_step",
                got=f"{len(calls)} calls with gradients",
                remedy="say which submodule training_step calls: RecorderCallback(..., module='net')",
            )
        [call] = calls
        if self._batch is None:
            raise RecordingError(
                "the loader does not name its samples",
                where=where,
                expected="batches of named(loader)",
                remedy="trainer.fit(module, named(loader)), or return named(loader) from train_dataloader",
            )
        targets = self.targets(self._batch.data) if callable(self.targets) else self._split(self._batch.data)
        weight = call.weight(self.loss, targets, where, total=self._loss)
        ids, draws = self._batch.ids, self._batch.draws
        self.recorder.batch(call.inputs(self._model), targets, ids=ids, weight=weight, draws=draws)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Declare the clipping that follows."""
        clip, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        own = type(pl_module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
        if self.recorder is None or not clip or own or not pl_module.automatic_optimization:
            return  # where the module clips by itself, the gradient is kept as it was fed
        if algorithm is not None and str(getattr(algorithm, "value", algorithm)) == "value":
            self.recorder.clipped(value=clip)
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.recorder.clipped(norm=clip, found=nn.utils.get_total_norm(gradients))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the recording in order."""
        if self.recorder is not None:
            self.recorder.close()
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model; the run is shorter, and can be read."""
        if self.recorder is not None:
            self.recorder.stop()
        self._detach()

    # ------------------------------------------------------------------ batches
    def _unnamed(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._batch = batch if isinstance(batch, NamedBatch) else None
            return step(batch if self._batch is None else self._batch.data, *args, **kwargs)

        return training_step

    def _dataset(self, loader: Any) -> IndexedDataset | str:
        """Where the loader's batches can be read again, if that is known."""
        dataset, collated = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        if not isinstance(dataset, IndexedDataset) or not isinstance(collated, Collated) or callable(self.targets):
            return "reread"
        return IndexedDataset(dataset.dataset, seed=dataset.seed, collate=collated.collate, targets=self.targets)

    def _split(self, data: Any) -> Any:
        assert not callable(self.targets)
        return split_targets(data, self.targets)[1]

    def _detach(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        if self._lightning is not None:
            self._lightning.__dict__.pop("training_step", None)
        self._watch, self._lightning, self._batch = None, None, None


def _counts_alike(trainer: Trainer, module: LightningModule) -> bool:
    """Whether a step of the Trainer is a recorded step: not where optimizers iterate inside, or are several."""
    one = len(trainer.optimizers) == 1 and module.automatic_optimization
    return one and not isinstance(trainer.optimizers[0], torch.optim.LBFGS)
