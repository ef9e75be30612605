"""Stands a recorder behind the last step of a run that is there, or behind an earlier one."""

from __future__ import annotations

import torch

from explaind_core.errors import RecordingError
from explaind_core.recording.run_writer import RunWriter
from explaind_core.run import Run, open_run
from explaind_core.tensors import copied

__all__ = ["resume"]


def resume(writer: RunWriter, after: int | None = None) -> None:
    """Stand behind the last step of the run that is there, or behind step ``after``: later ones are deleted then.

    Args:
        writer: of the run's folder, its model and its optimizers; nothing was written with it yet.
        after: the last step to keep; by default the last that was recorded.

    Raises:
        RecordingError: another optimizer recorded it, or the model does not stand where it ended.
    """
    subject = writer.subject
    writer.store.read_manifest()
    writer.store.check_writable(writer.store.path)
    writer.store.lock()
    recorded = writer.store.found_steps()
    later = after is not None and bool(recorded) and after < recorded[-1]
    run = open_run(writer.store.path, model=subject.model, until=after if later else None)
    trained_by, given = run.manifest["optimizer"], subject.described()["optimizer"]
    if trained_by != given:
        raise RecordingError(
            "the run was recorded with another optimizer",
            where=writer.store.path,
            expected=trained_by,
            got=given,
            remedy="resume with the recorded one, or start a new run",
        )
    if run.mode != writer.mode:
        raise RecordingError(
            "the run was recorded in another mode",
            where=writer.store.path,
            expected=f"mode={run.mode!r}",
            got=f"mode={writer.mode!r}",
            remedy="resume in the recorded one, or start a new run",
        )
    writer.steps = len(run.steps)
    writer.threads = run.manifest.get("environment", {}).get("threads", writer.threads)
    writer.ever_trained = {n for s in run.steps for group in run.step_header(s)["groups"] for n in group["params"]}
    writer.data = run.step_header(writer.steps).get("data", "") if writer.steps else ""
    _stand_behind(writer, run)
    (writer.store.path / "closed.json").unlink(missing_ok=True)
    if later:  # the model stands where it must: not before is anything deleted
        writer.store.delete_after(writer.steps)
    writer.snapshot(None)


def _stand_behind(writer: RunWriter, run: Run) -> None:
    """Compare where the model stands with where the run ended."""
    subject, start, moved = writer.subject, run.start_tensors("buffer/"), None
    if writer.marks is None:
        writer.last, writer.buffers = run.theta(writer.steps), run.buffers(writer.steps)
        for name, parameter in subject.parameters.items():
            if not subject.untouched(writer.last[name], copied(parameter)):
                moved = f"parameter {name!r}"
                break
        buffers = writer.buffers
    else:
        writer.marks.set_starts(run.start_tensors("theta/"))
        writer.marks.set(writer.ever_trained or [n for g in subject.groups() for n in g["params"]])
        buffers = subject.buffers()
        if writer.steps:
            left = run.step_header(writer.steps)
            moved = next((key for key, value in writer.marks.header.items() if left[key] != value), None)
            writer.marks.check_frozen(writer.steps)
    if moved is not None:
        raise RecordingError(
            f"the model does not stand where step {writer.steps} of the run left it",
            where=moved,
            remedy="load that state first: explaind.open_run(...).restore(model, optimizer)",
        )
    writer.ever_changed = {n for n, b in buffers.items() if n not in start or not torch.equal(b, start[n])}
