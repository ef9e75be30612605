"""Records what a ``transformers.Trainer`` trains: a callback, and nothing else to change.

::

    trainer = Trainer(model, args, train_dataset=data, callbacks=[RecorderCallback("runs/demo")])
    trainer.train()
    run = explaind.open_run("runs/demo", model=returning_logits(model))
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.generic import find_labels

from explaind_core.copies import plain_copy
from explaind_core.data import IndexedDataset, split_targets, with_ids
from explaind_core.errors import RecordingError
from explaind_core.integrations.calls import CallWatch
from explaind_core.naming import plain_optimizer
from explaind_core.recording import Recorder
from explaind_core.training_step import LossFunction, loss_of, returned

__all__ = ["RecorderCallback", "returning_logits"]

#: What travels with a batch, among the model's own arguments, until the model is called.
_KEY = "explaind"


class RecorderCallback(TrainerCallback):
    """Records the training of a ``transformers.Trainer``.

    Batches are seen where the model is called; ids are the positions of the samples in ``train_dataset``, and travel
    with them through the collator. By which factor the Trainer multiplies a micro-batch's loss (gradient accumulation,
    ``num_items_in_batch``) is measured at the model's outputs, where the declared loss is checked as well.

    Args:
        path: a folder that does not exist yet (or is empty), as for :class:`explaind_core.Recorder`.
        loss: ``loss(output, targets)`` that the model is trained on, a mean over one batch; ``output`` is what the
            model returns, or its logits if it names them. The model's own by default
            (:mod:`explaind_core.training_step.transformers_losses`).
        targets: the keys of the targets in a batch; by default ``args.label_names``, or those of the model.
        id_column: take the ids from this column of the batch, which the collator must keep, for a dataset without
            positions. ``remove_unused_columns=False`` lets it pass.
        options: further ones of the Recorder: ``mode``, ``inputs``, ``snapshot_every``, ``resume``, ``overwrite``, ...

    Attributes:
        recorder: the Recorder of the training that runs, or ran.

    Raises:
        RecordingError: in ``trainer.train()``: several processes or devices, shards; a compiled model; fp16; a dataset
            without positions; the declared loss is not the one that is trained on.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        loss: LossFunction | None = None,
        *,
        targets: str | list[str] | None = None,
        id_column: str | None = None,
        **options: Any,
    ) -> None:
        self.path, self.loss, self.options = path, loss, options
        self.targets, self.id_column = targets, id_column
        self.recorder: Recorder | None = None
        self._loss: LossFunction | None = None
        self._watch: CallWatch | None = None
        self._model: nn.Module | None = None
        self._handles: list[Any] = []

    # ------------------------------------------------------------------ what the Trainer calls
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the model, name the samples of the loader's batches, start the recording."""
        self._detach()
        if self.recorder is not None:  # of a training that was interrupted
            self.recorder.stop()
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        _check_supported(args)
        self._loss = loss_of(model) if self.loss is None else self.loss
        names = self.targets or args.label_names or find_labels(type(model))  # type: ignore[no-untyped-call]
        self._targets = names[0] if isinstance(names, list) and len(names) == 1 else names
        options = {"train_size": _size(loader), **self.options}
        if self.id_column is None:
            dataset = self._name_samples(loader)
            if options.get("inputs") == "reread":
                options["inputs"] = dataset
        if options.get("resume") is True:  # steps after the checkpoint were lost, and will be made again
            options["resume"] = state.global_step
        self._model = model
        self._handles = _under_autocast(model, args)  # before the Recorder's own hooks, which look at it
        self._watch = CallWatch(model, self._take, returned)
        self.recorder = Recorder(self.path, model, plain_optimizer(kwargs["optimizer"]), self._loss, **options)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Declare a micro-batch whose gradient is accumulated."""
        self._declare()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Declare the step's last micro-batch, and the clipping behind it."""
        self._declare()
        if self.recorder is not None and args.max_grad_norm > 0:
            self.recorder.clipped(norm=args.max_grad_norm)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the logged numbers with the last finished step."""
        logs = {n: v for n, v in (kwargs.get("logs") or {}).items() if isinstance(v, int | float)}
        if self.recorder is not None and self._watch is not None and logs:
            self.recorder.log(**logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the recording in order."""
        if self.recorder is not None:
            self.recorder.close()
        self._detach()

    # ------------------------------------------------------------------ batches
    def _name_samples(self, loader: Any) -> IndexedDataset:
        base = getattr(loader, "base_dataloader", None)  # accelerate wraps the loader that makes the batches
        if not isinstance(base, DataLoader):
            raise RecordingError(
                "the Trainer's loader cannot be told which samples it reads",
                where=type(loader).__name__,
                expected="a DataLoader that accelerate has wrapped",
                remedy="let batches carry their ids: RecorderCallback(..., id_column='id')",
            )
        if isinstance(base.dataset, IterableDataset):
            raise RecordingError(
                "the samples of an iterable dataset have no positions",
                where="train_dataset",
                got=type(base.dataset).__name__,
                remedy="let batches carry their ids: RecorderCallback(..., id_column='id')",
            )
        loader.base_dataloader = with_ids(base, self._pack)
        given = base.dataset
        inner, seed = (given.dataset, given.seed) if isinstance(given, IndexedDataset) else (given, None)
        return IndexedDataset(inner, seed=seed, collate=base.collate_fn, targets=self._targets)

    def _pack(self, ids: Tensor, draws: Tensor, batch: Any) -> Any:
        if not isinstance(batch, MutableMapping):
            raise RecordingError(
                "the collator does not return a mapping", expected="names and tensors", got=type(batch).__name__
            )
        # The targets as well: with label smoothing, the Trainer does not hand them to the model.
        targets = split_targets(batch, self._targets)[1]
        batch[_KEY] = {"ids": ids, "draws": draws, "targets": targets}
        return batch

    def _take(self, kwargs: dict[str, Any]) -> Any:
        """Take out of the model's arguments what is not the model's."""
        if self.id_column is None:
            return kwargs.pop(_KEY, None)
        ids = kwargs.pop(self.id_column, None)
        names = [self._targets] if isinstance(self._targets, str) else self._targets
        if ids is None or any(n not in kwargs for n in names):
            return None
        return {"ids": ids, "targets": split_targets(kwargs, self._targets)[1]}

    def _declare(self) -> None:
        """Declare the batch whose gradient has just been taken."""
        assert self._watch is not None
        assert self.recorder is not None
        assert self._model is not None
        assert self._loss is not None
        where = f"batch of step {self.recorder.steps + 1}"
        calls = self._watch.finished()
        if len(calls) != 1 or calls[0].extra is None:
            raise RecordingError(
                "not exactly one call of the model belongs to this micro-batch"
                if len(calls) != 1
                else "the model was called with a batch whose samples are not named",
                where=where,
                expected="one call with the batch's ids in a pass forward and backward",
                got=f"{len(calls)} calls" if len(calls) != 1 else f"no {self.id_column or _KEY!r} among its arguments",
                remedy="let the Trainer call the model once on each batch, as model(**inputs)"
                if self.id_column is None
                else "pass remove_unused_columns=False, and let the collator keep the column",
            )
        [call] = calls
        names = [self._targets] if isinstance(self._targets, str) else self._targets
        given = call.inputs(self._model)
        if isinstance(given, dict):
            given = {n: v for n, v in given.items() if n not in (*names, "num_items_in_batch")}
        weight = call.weight(self._loss, call.extra["targets"], where)
        ids, draws = call.extra["ids"], call.extra.get("draws")
        self.recorder.batch(given, call.extra["targets"], ids=ids, weight=weight, draws=draws)

    def _detach(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        for handle in self._handles:
            handle.remove()
        self._watch, self._handles = None, []


def returning_logits(model: nn.Module) -> nn.Module:
    """A copy of the model that returns its logits alone, for :func:`explaind_core.open_run`.

    Then outputs and losses need no further word: ``verify(run, inputs)``, ``Chosen(labels)``. Parameters keep their
    names.

    Args:
        model: of ``transformers``; it is left as it is.

    Returns:
        The copy.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
        >>> model = returning_logits(BertForSequenceClassification(config))
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 2])
    """
    own = plain_copy(model)
    own.register_forward_hook(_logits)
    return own


def _logits(_module: nn.Module, _args: Any, output: Any) -> Any:
    return returned(output)


def _check_supported(args: TrainingArguments) -> None:
    refused: Mapping[str, tuple[bool, str]] = {
        "several processes": (args.world_size > 1, f"world_size={args.world_size}"),
        "several devices": (args.n_gpu > 1, f"n_gpu={args.n_gpu}"),
        "parameters in shards": (bool(args.deepspeed or args.fsdp), "deepspeed or fsdp"),
        "a compiled model": (bool(args.torch_compile), "torch_compile=True"),
        "a scaled loss": (bool(args.fp16), "fp16=True"),
    }
    for what, (found, got) in refused.items():
        if found:
            raise RecordingError(
                f"{what} cannot be recorded by the callback",
                where="TrainingArguments",
                expected="one process and device, a plain model, single, double or bfloat16 precision",
                got=got,
            )


def _size(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except TypeError:
        return None


def _under_autocast(model: nn.Module, args: TrainingArguments) -> list[Any]:
    """Hooks that enter autocast around the model's ``forward``: accelerate does so inside it, where nobody sees it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if dtype is None:
        return []
    stack = ExitStack()

    def enter(*_: Any) -> None:
        stack.enter_context(torch.autocast(args.device.type, dtype=dtype))

    def leave(*_: Any) -> None:
        stack.close()

    return [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
