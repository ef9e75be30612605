"""Writes a run, step by step, so that it can be read and continued whenever it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.errors import ExplaindError, RecordingError, StoreError
from explaind_core.naming import plain, qualified_name
from explaind_core.recording.batch_log import BatchLog
from explaind_core.recording.seen_step import SeenStep
from explaind_core.recording.state_hashes import Marks
from explaind_core.recording.subject import Subject
from explaind_core.store import FORMAT, VERSION, RunStore, WriteQueue
from explaind_core.tensors import check_parameters, copied
from explaind_core.training_step import describe_loss, environment, provenance

if TYPE_CHECKING:
    pass  # reading is the next stage

__all__ = ["RunWriter"]


class RunWriter:
    """Appends steps to a run store.

    Args:
        mode: what is written of a step: see :class:`explaind_core.Recorder`.

    Attributes:
        steps: how many are finished. queue: the files of these that are not written yet.
        threads: torch's, when the run was begun.
        last: the parameters that the last one left, where they are written at every step.
    """

    def __init__(
        self, store: RunStore, subject: Subject, snapshot_every: int, mode: str = "steps", write_behind: int = 0
    ) -> None:
        self.store, self.subject, self.snapshot_every, self.mode = store, subject, snapshot_every, mode
        self.steps, self.threads = 0, torch.get_num_threads()
        self.queue = WriteQueue(store.path, write_behind)
        self.marks = Marks(subject) if mode == "snapshots" else None
        self.last: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        # What a step file holds: all that ever was trained, or changed, so that one file tells a whole state.
        self.ever_trained: set[str] = set()
        self.ever_changed: set[str] = set()
        self._outside: dict[str, Tensor] = {}
        self._failure: ExplaindError | None = None
        self.data = ""  # the fingerprint of all batches so far

    def start(
        self,
        loss: Callable[..., Tensor] | None,
        train_size: int | None,
        *,
        overwrite: bool,
        penalty: Callable[..., Tensor] | None = None,
    ) -> None:
        """Write theta_0, the optimizer's state and the manifest.

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
        if self.marks is None:
            self.last, self.buffers = theta, buffers
        # The start holds the manifest, too: it is small, and without it nothing could be read.
        self.store.write_tensors(self.store.start_path, header | {"manifest": manifest}, start | tensors)
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
            "model": qualified_name(type(plain(subject.model))),
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

    def buffers_moved(self) -> dict[str, Tensor]:
        """Copies of the buffers that do not stand where the last step left them."""
        if self.marks is not None:
            return self.subject.buffers() if self.marks.moved_buffers() else {}
        return {n: b for n, b in self.subject.buffers().items() if not torch.equal(b, self.buffers[n])}

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
            seen: the step. theta: the parameters after it. batches: its samples. factor: what multiplied its gradient.
            state, buffers: the optimizer's state and the model's buffers after it, where not the present ones.

        Raises:
            NonFiniteError: a parameter became NaN or infinite. StoreError: it cannot be written.
        """
        try:
            check_parameters({name: theta[name] for name in seen.gradients}, self.steps + 1)
            self._write(seen, theta, batches, factor, buffers)
        except ExplaindError as error:  # the model has moved on, so that no later step can be recorded behind this one
            self._failure = error
            raise
        self.steps += 1
        if self.marks is None:
            self.last = theta
        if self.steps % self.snapshot_every == 0:
            self.snapshot(state)

    def _write(
        self,
        seen: SeenStep,
        theta: dict[str, Tensor],
        batches: BatchLog,
        factor: float,
        buffers: dict[str, Tensor] | None,
    ) -> None:
        self.ever_trained.update(name for group in seen.groups for name in group["params"])
        tensors, again = batches.tensors(), dict(seen.again)
        if self.marks is None:
            tensors |= self._position(theta, self.subject.buffers() if buffers is None else buffers)
        else:
            self.marks.set(self.ever_trained)
            again |= self.marks.header
        if self.mode == "steps":
            tensors |= _gradients(seen.gradients)
        tensors |= {f"before/{n}": b for n, b in seen.buffers_before.items()}
        if seen.buffers_before:
            again["buffers_before"] = list(seen.buffers_before)
        outside = self.subject.outside(self._outside)
        self._outside |= outside
        tensors |= {f"outside/{key}": t for key, t in outside.items()}
        for k, evaluation in enumerate(seen.evaluations[1:], 1):
            tensors |= {f"closure/{k}/{name}": gradient for name, gradient in evaluation.gradients.items()}
        structure, group_tensors = trees.flatten(seen.groups, "the parameter groups")
        s = self.steps + 1
        header = {"step": s, "groups": structure, "batches": batches.headers(), "gradient_factor": factor} | again
        if seen.clips:
            header["clips"] = seen.clips
        if seen.stepped:
            header["stepped"] = seen.stepped
        header["lines"] = self.store.count_lines("metrics.jsonl")
        header["data"] = self.data = batches.fingerprint(self.data)
        if seen.evaluations:
            header["closure_losses"] = [evaluation.loss for evaluation in seen.evaluations]
        tensors |= {f"group/{k}": t for k, t in group_tensors.items()}
        self._behind(self.store.step_path(s), header, tensors)

    def _behind(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, a large one while training goes on; all of its tensors are copies."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self.queue.put(lambda: self.store.write_tensors(path, header, tensors), size)

    def _position(self, theta: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """What tells where the model stands after the coming step."""
        for name in self.subject.parameters.keys() - self.ever_trained:
            if not torch.equal(theta[name], self.last[name]):
                raise RecordingError(
                    "a parameter that the optimizer does not train changed", where=f"{name!r}, step {self.steps + 1}"
                )
        tensors = {f"theta/{name}": theta[name] for name in self.ever_trained}
        for name, buffer in buffers.items():
            if name not in self.buffers or not torch.equal(buffer, self.buffers[name]):
                self.ever_changed.add(name)
        tensors |= {f"buffer/{name}": buffers[name] for name in self.ever_changed & buffers.keys()}
        self.buffers = buffers
        return tensors | {f"evaluated/{n}": t for n, t in self.subject.evaluated(theta).items()}

    def _state(self, state: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Any, dict[str, Tensor]]:
        state = self.subject.state() if state is None else state
        structure, tensors = trees.flatten(state, "the optimizer's state")
        return {"state": structure}, {f"state/{key}": tensor for key, tensor in tensors.items()}

    def snapshot(self, state: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Write where the model and the optimizers stand: what a later replay, or training, goes on from."""
        header, tensors = self._state(state)
        if self.marks is not None:
            self.marks.check_frozen(self.steps)
            subject = self.subject
            theta = {n: copied(p) for n, p in subject.parameters.items() if n in self.ever_trained}
            header["trained"] = sorted(self.ever_trained)
            tensors |= {f"theta/{n}": t for n, t in theta.items()}
            tensors |= {f"buffer/{n}": b for n, b in subject.buffers().items()}
            tensors |= {f"evaluated/{n}": t for n, t in subject.evaluated(theta).items()}
        tensors = {n: t if n.startswith(("theta/", "buffer/", "evaluated/")) else copied(t) for n, t in tensors.items()}
        self._behind(self.store.snapshot_path(self.steps), header, tensors)


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
