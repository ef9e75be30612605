"""Stands a recorder behind the last step of a run that is there, or behind an earlier one."""

from __future__ import annotations

from explaind_core.errors import RecordingError
from explaind_core.recording.last_state import stored_state
from explaind_core.recording.run_writer import RunWriter
from explaind_core.run import open_run
from explaind_core.store import LOG_NAME

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
    writer.store.read_manifest(damaged=True)
    writer.store.check_writable(writer.store.path)
    writer.store.lock()
    writer.store.mend()
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
    writer.last = stored_state(writer.mode, subject, run)
    writer.threads = run.manifest.get("environment", {}).get("threads", writer.threads)
    writer.data = run.step_header(writer.steps).get("data", "") if writer.steps else ""
    if (moved := writer.last.difference()) is not None:
        raise RecordingError(
            f"the model does not stand where step {writer.steps} of the run left it",
            where=moved,
            remedy="load that state first: explaind.open_run(...).restore(model, optimizer)",
        )
    logged = run.step_header(writer.steps).get("lines", 0) if writer.steps else 0
    lost = logged - writer.store.count_lines(LOG_NAME) - run.store.generations.lost_lines(writer.steps)
    writer.store.go_on(writer.steps, lost_lines=max(lost, 0))  # the model stands where it must: not before
    writer.snapshot(None, again=True)
