"""Writes a run, step by step, so that it can be read and continued whenever it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.errors import ExplaindError, RecordingError, StoreError
from explaind_core.naming import qualified_name
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.inner_iterations import Evaluation
from explaind_core.recording.last_state import LastState, state_at_start
from explaind_core.recording.subject import Subject
from explaind_core.store import FORMAT, VERSION, RunStore, WriteQueue
from explaind_core.tensors import check_parameters, copied
from explaind_core.training_step import describe_loss, environment, model_parts, provenance

__all__ = ["DURABLE", "RunWriter", "SeenStep"]

#: After what everything before it is on disk.
DURABLE = ("steps", "snapshots", "close")


@dataclass
class SeenStep:
    """What was seen of a step.

    Attributes:
        gradients: by parameter, as the optimizer was fed them.
        groups: the hyper-parameters of every group, before it.
        evaluations: the calls of its closure, where the optimizer iterates inside a step.
        clips: how the gradients were clipped, in order.
        buffers_before: buffers that did not stand where the last step left them when the model was called.
        recomputation: what else is needed to compute the gradients again, as JSON.
        stepped: which of several optimizers made it; empty for one.
        calls: of how many calls of the model its gradient is, where these are more than its batches; else 0.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    clips: list[list[Any]] = field(default_factory=list)
    buffers_before: dict[str, Tensor] = field(default_factory=dict)
    recomputation: dict[str, Any] = field(default_factory=dict)
    stepped: list[int] = field(default_factory=list)
    calls: int = 0


class RunWriter:
    """Appends steps to a run store.

    Args:
        store: the run's files.
        subject: the model and its optimizers.
        snapshot_every: the optimizer's state is kept after every that many steps.
        mode: what is written of a step: see :class:`explaind_core.Recorder`.
        write_behind: so many steps may wait to be written.
        durable: what a loss of power leaves: see :class:`explaind_core.Recorder`.

    Attributes:
        last: where the last finished step left the model; set by :meth:`start`, or where a run is resumed.
        queue: the files of finished steps that are not written yet.
        threads: torch's, when the run was begun.
        data: the fingerprint of all batches so far.
    """

    last: LastState

    def __init__(
        self,
        store: RunStore,
        subject: Subject,
        snapshot_every: int,
        mode: str = "steps",
        write_behind: int = 0,
        durable: str = "snapshots",
    ) -> None:
        if durable not in DURABLE:
            raise RecordingError(
                "what is to survive a loss of power?", where="durable", expected=f"one of {DURABLE}", got=durable
            )
        self.durable = durable
        self.store, self.subject, self.snapshot_every, self.mode = store, subject, snapshot_every, mode
        self.threads = torch.get_num_threads()
        self.queue = WriteQueue(store.path, write_behind)
        self._outside: dict[str, Tensor] = {}
        self._failure: ExplaindError | None = None
        self.data = ""  # the fingerprint of all batches so far

    @property
    def steps(self) -> int:
        """How many steps are finished."""
        return self.last.step

    def start(
        self,
        loss: Callable[..., Tensor] | None,
        train_size: int | None,
        *,
        overwrite: bool,
        penalty: Callable[..., Tensor] | None = None,
    ) -> None:
        """Write theta_0, the optimizer's state and the manifest.

        Args:
            loss: the training loss, whose name is kept.
            train_size: the number of training samples, if it is known.
            overwrite: whether a run that is there already is deleted.
            penalty: what the loop adds to the loss, whose name is kept.

        Raises:
            StoreError: there is something at the path already, or it cannot be written.
        """
        self._claim(overwrite)
        subject = self.subject
        trained = {name for group in subject.groups() for name in group["params"]}
        theta, buffers = subject.theta(), subject.buffers()
        manifest = {"run": self.store.begin(), **self._manifest(loss, penalty, train_size, trained)}
        start = {f"theta/{n}": t for n, t in theta.items()} | {f"buffer/{n}": t for n, t in buffers.items()}
        header, tensors = self._state()
        start |= {f"evaluated/{n}": t for n, t in subject.evaluated(theta).items()}
        self.last = state_at_start(self.mode, subject, theta, buffers)
        # The start holds the manifest, too: it is small, and without it nothing could be read.
        self.store.write_tensors(self.store.start_path, header | {"manifest": manifest}, start | tensors)
        self.store.sync()
        self.store.sync_name()
        # The manifest comes last: a folder without one is not a run.
        self.store.write_json("manifest.json", manifest)

    def _claim(self, overwrite: bool) -> None:
        """Become the only writer of a folder with nothing in it."""
        store = self.store
        for locked in (False, True):  # looked at again when nobody else can write there any more
            if locked:
                store.lock()
            if store.is_unbegun():
                continue
            if not overwrite:
                raise StoreError(
                    "there is something at this path already",
                    where=store.path,
                    expected="a new or empty folder",
                    remedy="choose another path; or pass resume=True to continue the run, overwrite=True to delete it",
                )
            store.read_manifest()  # never delete what is not a run
            if locked:
                store.delete()

    def _manifest(
        self,
        loss: Callable[..., Tensor] | None,
        penalty: Callable[..., Tensor] | None,
        train_size: int | None,
        trained: set[str],
    ) -> dict[str, Any]:
        subject, rule = self.subject, self.subject.rule
        return {
            "format": FORMAT,
            "version": VERSION,
            "created_with": version("explaind-core"),
            "torch": torch.__version__,
            "mode": self.mode,
            "snapshot_every": self.snapshot_every,
            "environment": environment(subject.device),
            "provenance": provenance(),
            "model": qualified_name(type(subject.model)),
            "modules": model_parts(subject.model),
            **subject.described(),
            "loss": describe_loss(loss),
            "evaluates_elsewhere": rule.evaluates_elsewhere,
            "outside": list(rule.outside),
            "penalty": None if penalty is None else describe_loss(penalty),
            "train_size": train_size,
            "parameters": [
                {"name": n, "shape": list(p.shape), "dtype": str(p.dtype), "trained": n in trained}
                for n, p in subject.parameters.items()
            ],
            "buffers": sorted(subject.buffers()),
        }

    def check_alive(self) -> None:
        """Refuse to go on behind a step that could not be written.

        Raises:
            RecordingError: there was one.
        """
        if self._failure is not None:
            raise RecordingError(
                "recording has ended: a step could not be recorded",
                where=self._failure.where,
                got=self._failure.what,
                remedy="put that right, then explaind.open_run(...).restore(model, optimizer) and go on with "
                "Recorder(..., resume=True)",
            )

    def finish(
        self,
        seen: SeenStep,
        theta: dict[str, Tensor],
        batches: BatchLog,
        factor: float,
        state: Mapping[str, Mapping[str, Any]] | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        """Write one finished step.

        Args:
            seen: the step.
            theta: the parameters after it; those that are left out stand where they stood before.
            batches: the batches that its gradient is of.
            factor: what multiplied its gradient.
            state: the optimizer's state after it, where that is not the present one.
            buffers: copies of the model's buffers after it, where these are not the present ones.

        Raises:
            NonFiniteError: a parameter became NaN or infinite.
            RecordingError: a parameter changed that no optimizer trains.
            StoreError: it cannot be written.
        """
        try:
            check_parameters({name: theta[name] for name in seen.gradients}, self.steps + 1)
            left = self.last.after({n for group in seen.groups for n in group["params"]}, theta, buffers)
            self._write(seen, left, batches, factor)
        except ExplaindError as error:  # the model has moved on, so that no later step can be recorded behind this one
            self._failure = error
            raise
        self.last = left
        if self.steps % self.snapshot_every == 0:
            self.snapshot(state)

    def _write(self, seen: SeenStep, left: LastState, batches: BatchLog, factor: float) -> None:
        tensors, more = batches.tensors() | left.tensors(), seen.recomputation | left.header
        if self.mode == "steps":
            tensors |= _gradients(seen.gradients)
        tensors |= {f"before/{n}": b for n, b in seen.buffers_before.items()}
        if seen.buffers_before:
            more["buffers_before"] = list(seen.buffers_before)
        outside = self.subject.outside(self._outside)
        self._outside |= outside
        tensors |= {f"outside/{key}": t for key, t in outside.items()}
        for k, evaluation in enumerate(seen.evaluations[1:], 1):
            tensors |= {f"closure/{k}/{name}": gradient for name, gradient in evaluation.gradients.items()}
        structure, group_tensors = trees.flatten(seen.groups, "the parameter groups")
        s = left.step
        header = {"step": s, "groups": structure, "batches": batches.headers(), "gradient_factor": factor} | more
        if seen.clips:
            header["clips"] = seen.clips
        if seen.stepped:
            header["stepped"] = seen.stepped
        if seen.calls:
            header["calls"] = seen.calls
        header["lines"] = self.store.count_lines("metrics.jsonl")
        header["data"] = self.data = batches.fingerprint(self.data)
        if seen.evaluations:
            header["closure_losses"] = [evaluation.loss for evaluation in seen.evaluations]
        tensors |= {f"group/{k}": t for k, t in group_tensors.items()}
        self._behind(self.store.step_path(s), header, tensors)
        if self.durable == "steps":
            self.queue.put(self.store.sync)

    def _behind(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, a large one while training goes on; all of its tensors are copies."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self.queue.put(lambda: self.store.write_tensors(path, header, tensors), size)

    def _state(self, state: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Any, dict[str, Tensor]]:
        state = self.subject.state() if state is None else state
        structure, tensors = trees.flatten(state, "the optimizer's state")
        return {"state": structure}, {f"state/{key}": tensor for key, tensor in tensors.items()}

    def snapshot(self, state: Mapping[str, Mapping[str, Any]] | None, *, again: bool = False) -> None:
        """Write where the model and the optimizers stand: what a later replay, or training, goes on from.

        Args:
            state: the optimizer's state; None for the present one.
            again: recording goes on from here, and nothing else tells this state.
        """
        header, tensors = self._state(state)
        kept_header, kept_tensors = self.last.snapshot()
        copies = {name: copied(tensor) for name, tensor in tensors.items()}
        if begun := self.store.generations.begun:  # it is small, and without it no later file could be read
            header["generations"] = list(begun)
        self._behind(self.store.snapshot_path(self.steps), header | kept_header, copies | kept_tensors)
        if self.durable != "close" or again:
            self.queue.put(self.store.sync)


def _gradients(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, gradient in gradients.items():
        if gradient.is_sparse:
            # As fed: coalescing is the optimizer's business.
            tensors[f"sparse_indices/{name}"] = gradient._indices()
            tensors[f"sparse_values/{name}"] = gradient._values()
        else:
            tensors[f"gradient/{name}"] = gradient
    return tensors
