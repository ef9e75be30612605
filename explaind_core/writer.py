"""Writes a run, step by step, so that it can be read and continued whenever it stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from explaind_core import trees
from explaind_core.batches import BatchLog, copied
from explaind_core.coefficients import qualified_name
from explaind_core.environment import environment
from explaind_core.errors import ExplaindError, RecordingError, StoreError
from explaind_core.finite import check_parameters
from explaind_core.iterations import Evaluation
from explaind_core.losses import describe_loss
from explaind_core.marks import Marks
from explaind_core.plain import plain
from explaind_core.provenance import provenance
from explaind_core.queued import WriteQueue
from explaind_core.store import FORMAT, VERSION, RunStore
from explaind_core.subject import Subject

if TYPE_CHECKING:
    from explaind_core.run import Run  # reading is the next stage

__all__ = ["RunWriter", "SeenStep"]


@dataclass
class SeenStep:
    """What was seen of a step.

    Attributes:
        gradients: as fed. groups: before it. evaluations: closure calls, if it iterates.
        clips: how the gradients were clipped, in order. stepped: which of several optimizers made it; empty for one.
        buffers_before: buffers that did not stand where the last step left them when the model was called.
        again: what else is needed to compute the gradients again, as JSON.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    clips: list[list[Any]] = field(default_factory=list)
    buffers_before: dict[str, Tensor] = field(default_factory=dict)
    again: dict[str, Any] = field(default_factory=dict)
    stepped: list[int] = field(default_factory=list)


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
        self._store, self._subject, self.snapshot_every, self.mode = store, subject, snapshot_every, mode
        self.steps, self.threads = 0, torch.get_num_threads()
        self.queue = WriteQueue(store.path, write_behind)
        self.marks = Marks(subject) if mode == "snapshots" else None
        self.last: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        # What a step file holds: all that ever was trained, or changed, so that one file tells a whole state.
        self._ever_trained: set[str] = set()
        self._ever_changed: set[str] = set()
        self._outside: dict[str, Tensor] = {}
        self._failure: ExplaindError | None = None
        self._data = ""  # the fingerprint of all batches so far

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
        subject = self._subject
        trained = {name for group in subject.groups() for name in group["params"]}
        theta, buffers = subject.theta(), subject.buffers()
        manifest = {"run": self._store.begin(), **self._manifest(loss, penalty, train_size, trained)}
        start = {f"theta/{n}": t for n, t in theta.items()} | {f"buffer/{n}": t for n, t in buffers.items()}
        header, tensors = self._state()
        start |= {f"evaluated/{n}": t for n, t in subject.evaluated(theta).items()}
        if self.marks is None:
            self.last, self._buffers = theta, buffers
        # The start holds the manifest, too: it is small, and without it nothing could be read.
        self._store.write_tensors(self._store.start_path, header | {"manifest": manifest}, start | tensors)
        # The manifest comes last: a folder without one is not a run.
        self._store.write_json("manifest.json", manifest)

    def _claim(self, overwrite: bool) -> None:
        """Become the only writer of a folder with nothing in it."""
        store = self._store
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
        subject, rule = self._subject, self._subject.rule
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

    def resume(self, after: int | None = None) -> None:
        """Stand behind the last step of the run that is there, or behind step ``after``: later ones are deleted then.

        Raises:
            RecordingError: another optimizer recorded it, or the model does not stand where it ended.
        """
        subject = self._subject
        from explaind_core.run import open_run  # reading is the next stage; only resuming needs it here

        self._store.read_manifest()
        self._store.check_writable(self._store.path)
        self._store.lock()
        recorded = self._store.found_steps()
        later = after is not None and bool(recorded) and after < recorded[-1]
        run = open_run(self._store.path, model=subject.model, until=after if later else None)
        trained_by, given = run.manifest["optimizer"], subject.described()["optimizer"]
        if trained_by != given:
            raise RecordingError(
                "the run was recorded with another optimizer",
                where=self._store.path,
                expected=trained_by,
                got=given,
                remedy="resume with the recorded one, or start a new run",
            )
        if run.mode != self.mode:
            raise RecordingError(
                "the run was recorded in another mode",
                where=self._store.path,
                expected=f"mode={run.mode!r}",
                got=f"mode={self.mode!r}",
                remedy="resume in the recorded one, or start a new run",
            )
        self.steps = len(run.steps)
        self.threads = run.manifest.get("environment", {}).get("threads", self.threads)
        self._ever_trained = {n for s in run.steps for group in run.step_header(s)["groups"] for n in group["params"]}
        self._data = run.step_header(self.steps).get("data", "") if self.steps else ""
        self._stand_behind(run)
        (self._store.path / "closed.json").unlink(missing_ok=True)
        if later:  # the model stands where it must: not before is anything deleted
            self._store.delete_after(self.steps)
        self._snapshot(None)

    def _stand_behind(self, run: Run) -> None:
        """Compare where the model stands with where the run ended."""
        subject, start, moved = self._subject, run.start_tensors("buffer/"), None
        if self.marks is None:
            self.last, self._buffers = run.theta(self.steps), run.buffers(self.steps)
            for name, parameter in subject.parameters.items():
                if not subject.untouched(self.last[name], copied(parameter)):
                    moved = f"parameter {name!r}"
                    break
            buffers = self._buffers
        else:
            self.marks.set_starts(run.start_tensors("theta/"))
            self.marks.set(self._ever_trained or [n for g in subject.groups() for n in g["params"]])
            buffers = subject.buffers()
            if self.steps:
                left = run.step_header(self.steps)
                moved = next((key for key, value in self.marks.header.items() if left[key] != value), None)
                self.marks.check_frozen(self.steps)
        if moved is not None:
            raise RecordingError(
                f"the model does not stand where step {self.steps} of the run left it",
                where=moved,
                remedy="load that state first: explaind.open_run(...).restore(model, optimizer)",
            )
        self._ever_changed = {n for n, b in buffers.items() if n not in start or not torch.equal(b, start[n])}

    def buffers_moved(self) -> dict[str, Tensor]:
        """Copies of the buffers that do not stand where the last step left them."""
        if self.marks is not None:
            return self._subject.buffers() if self.marks.moved_buffers() else {}
        return {n: b for n, b in self._subject.buffers().items() if not torch.equal(b, self._buffers[n])}

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
            self._snapshot(state)

    def _write(
        self,
        seen: SeenStep,
        theta: dict[str, Tensor],
        batches: BatchLog,
        factor: float,
        buffers: dict[str, Tensor] | None,
    ) -> None:
        self._ever_trained.update(name for group in seen.groups for name in group["params"])
        tensors, again = batches.tensors(), dict(seen.again)
        if self.marks is None:
            tensors |= self._position(theta, self._subject.buffers() if buffers is None else buffers)
        else:
            self.marks.set(self._ever_trained)
            again |= self.marks.header
        if self.mode == "steps":
            tensors |= _gradients(seen.gradients)
        tensors |= {f"before/{n}": b for n, b in seen.buffers_before.items()}
        if seen.buffers_before:
            again["buffers_before"] = list(seen.buffers_before)
        outside = self._subject.outside(self._outside)
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
        header["lines"] = self._store.count_lines("metrics.jsonl")
        header["data"] = self._data = batches.fingerprint(self._data)
        if seen.evaluations:
            header["closure_losses"] = [evaluation.loss for evaluation in seen.evaluations]
        tensors |= {f"group/{k}": t for k, t in group_tensors.items()}
        self._behind(self._store.step_path(s), header, tensors)

    def _behind(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write a file, a large one while training goes on; all of its tensors are copies."""
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        self.queue.put(lambda: self._store.write_tensors(path, header, tensors), size)

    def _position(self, theta: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """What tells where the model stands after the coming step."""
        for name in self._subject.parameters.keys() - self._ever_trained:
            if not torch.equal(theta[name], self.last[name]):
                raise RecordingError(
                    "a parameter that the optimizer does not train changed", where=f"{name!r}, step {self.steps + 1}"
                )
        tensors = {f"theta/{name}": theta[name] for name in self._ever_trained}
        for name, buffer in buffers.items():
            if name not in self._buffers or not torch.equal(buffer, self._buffers[name]):
                self._ever_changed.add(name)
        tensors |= {f"buffer/{name}": buffers[name] for name in self._ever_changed & buffers.keys()}
        self._buffers = buffers
        return tensors | {f"evaluated/{n}": t for n, t in self._subject.evaluated(theta).items()}

    def _state(self, state: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Any, dict[str, Tensor]]:
        state = self._subject.state() if state is None else state
        structure, tensors = trees.flatten(state, "the optimizer's state")
        return {"state": structure}, {f"state/{key}": tensor for key, tensor in tensors.items()}

    def _snapshot(self, state: Mapping[str, Mapping[str, Any]] | None) -> None:
        header, tensors = self._state(state)
        if self.marks is not None:
            self.marks.check_frozen(self.steps)
            subject = self._subject
            theta = {n: copied(p) for n, p in subject.parameters.items() if n in self._ever_trained}
            header["trained"] = sorted(self._ever_trained)
            tensors |= {f"theta/{n}": t for n, t in theta.items()}
            tensors |= {f"buffer/{n}": b for n, b in subject.buffers().items()}
            tensors |= {f"evaluated/{n}": t for n, t in subject.evaluated(theta).items()}
        tensors = {n: t if n.startswith(("theta/", "buffer/", "evaluated/")) else copied(t) for n, t in tensors.items()}
        self._behind(self._store.snapshot_path(self.steps), header, tensors)


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
