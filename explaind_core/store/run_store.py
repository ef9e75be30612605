"""The run on disk: append-only, versioned, checked at every read, without pickle.

:mod:`explaind_core.store.run_layout` tells which files there are. Every file is written beside its place and renamed
into it, so a reader never sees half a file, and a killed training leaves every finished step readable. Every file says
which file of which run it is and carries checksums of all that it holds (:mod:`explaind_core.store.tensor_file`,
:mod:`explaind_core.store.sealed_json`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from explaind_core.errors import StoreError
from explaind_core.store.folder_contents import names_in, total_bytes
from explaind_core.store.generations import GENERATIONS_NAME, Generations
from explaind_core.store.json_files import MANIFEST_NAME, VERSION
from explaind_core.store.json_schema import check_json, mismatch
from explaind_core.store.locations import is_local, remove_unfinished
from explaind_core.store.run_layout import CLOSED_NAME, LOCK_NAME, LOG_NAME, RunLayout
from explaind_core.store.run_schema import CLOSED, manifest_pattern, step_pattern
from explaind_core.store.tensor_file import Contents
from explaind_core.store.writing_lock import LockWords, WritingLock

__all__ = ["FORMAT", "LOCK_NAME", "LOG_NAME", "VERSION", "RunStore"]

FORMAT = "explaind-run"
#: Versions that are read; only the newest is written.
READABLE = (1, 2)
_LOCK_WORDS = LockWords(
    taken="this run is being recorded already",
    remedy="wait until it has finished, or choose another path; "
    "a process that was killed may have left children that still hold it: end them",
    kept="nothing was written",
    same_process="another Recorder of this process",
    same_process_remedy="close() that Recorder first, or stop() it if its training was interrupted",
)


class RunStore(RunLayout):
    """Reads and writes the files of one run; knows their layout and nothing of their meaning.

    Args:
        path: the run's folder, or an address that fsspec knows.
        compress: pack tensors with blosc where that makes them shorter; what is read says itself how it is packed.

    Attributes:
        path: the run's folder, see :func:`explaind_core.store.locate`.
        steps_written: how many steps this object wrote, and their bytes.

    Example:
        >>> from explaind_core.testing import record_example
        >>> run = record_example(steps=2)  # its files go with it
        >>> store = RunStore(run.path)
        >>> store.count_steps(), store.step_path(2).relative_to(store.path).as_posix()
        (2, 'steps/000/000002.safetensors')
    """

    def __init__(self, path: str | os.PathLike[str], *, compress: bool = True) -> None:
        super().__init__(path, compress=compress)
        self._lock: WritingLock | None = None
        #: How many steps this object wrote, and their bytes.
        self.steps_written = (0, 0)

    def write_tensors(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> int:
        """Write one file, whole or not at all.

        Args:
            path: inside the run's folder.
            header: JSON.
            tensors: by name.

        Returns:
            Its size in bytes.

        Raises:
            StoreError: the disk is full or the folder cannot be written; what was there before is intact.
        """
        size = super().write_tensors(path, header, tensors)
        if self._is_step(path):
            self.steps_written = self.steps_written[0] + 1, self.steps_written[1] + size
        return size

    def lock(self) -> None:
        """Become the only writer of this run, until :meth:`unlock`; elsewhere than on this machine nobody can tell.

        Raises:
            StoreError: another one is, or the folder cannot be written.
        """
        if is_local(self.path):
            self._lock = WritingLock(self.path / LOCK_NAME, where=self.path, words=_LOCK_WORDS)
            try:
                remove_unfinished(self.path)  # what kills left: nobody else writes here any more
            except OSError as error:
                self.unlock()
                raise self._write_error(self.path, error) from error

    def unlock(self) -> None:
        """Let others write the run."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def delete(self) -> None:
        """Delete the run, by whoever holds its lock, which is kept.

        Raises:
            StoreError: it cannot be deleted; as long as anything of it is left it is known as a run.
        """
        last = [self.start_path.name, MANIFEST_NAME]
        names = [name for name in names_in(self.path) if name not in (LOCK_NAME, *last)]
        for name in (*names, *last):
            self._remove(self.path / name)

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return total_bytes(self.path)

    # ------------------------------------------------------------------ manifest
    def read_manifest(self, *, damaged: bool = False) -> dict[str, Any]:
        """Read and check the manifest.

        Args:
            damaged: where it is damaged or missing, take the copy that the start of the run holds.

        Returns:
            The manifest.

        Raises:
            StoreError: there is no run here, it was written by another version of the format, or it is damaged.
        """
        try:
            manifest = self.read_json(MANIFEST_NAME)
        except StoreError:
            if not damaged:
                raise
            manifest = None
        if damaged:
            manifest = self._likelier(manifest, self._spare_manifest())
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise StoreError(
                "this is not a recorded run",
                where=self.path / MANIFEST_NAME if manifest is not None else self.path,
                expected=f"a folder with a manifest.json of format {FORMAT!r}",
                got="no manifest.json" if manifest is None else f"format {manifest.get('format')!r}",
                remedy="give the path that was passed to explaind.Recorder",
            )
        version = manifest.get("version")
        if version not in READABLE:
            raise StoreError(
                "the run store has another version",
                where=self.path / MANIFEST_NAME,
                expected=f"a version of {READABLE}",
                got=f"version {version}, written by explaind-core {manifest.get('created_with')}",
                remedy="open it with that release of explaind-core, or a later one",
            )
        check_json(manifest, manifest_pattern(manifest), what="the manifest", where=self.path / MANIFEST_NAME)
        self._identity = manifest.get("run", ""), manifest["version"]
        return manifest

    def _spare_manifest(self) -> dict[str, Any] | None:
        """The manifest that the start of the run holds."""
        found = self._of_any_run(self.start_path)
        spare = found.header.get("manifest") if found is not None and isinstance(found.header, dict) else None
        return spare if isinstance(spare, dict) else None

    def _likelier(self, manifest: dict[str, Any] | None, spare: dict[str, Any] | None) -> dict[str, Any] | None:
        """Of two manifests the one whose run the steps belong to: one of the two files may be another run's."""
        if manifest is None or spare is None or manifest.get("run") == spare.get("run"):
            return manifest or spare
        first = [self._of_any_run(self.step_path(s)) for s in self.found_steps()[:3]]
        votes = [[found.run for found in first if found].count(m.get("run")) for m in (manifest, spare)]
        return spare if votes[1] > votes[0] else manifest

    def _of_any_run(self, path: Path) -> Contents | None:
        """What a file says of itself, whichever run it belongs to; None where it is damaged."""
        try:
            with self._opened(path, path.name, of_any_run=True) as (_, contents):
                return contents
        except StoreError:
            return None

    # ------------------------------------------------------------------ the whole run
    def close(self, steps: int) -> None:
        """Write down that recording ended in order, and what there is: what is lost later is known.

        Args:
            steps: how many were recorded.

        Raises:
            StoreError: it cannot be written.
        """
        self.end_log(LOG_NAME)
        self.sync()  # what counts as closed is there
        lines = self.count_lines(LOG_NAME)
        closed = {"steps": steps, "lines": lines, "snapshots": self.found_snapshots()}
        name = self.generations.name
        self.write_json(CLOSED_NAME, closed | ({"generation": name} if name else {}))

    def closed(self, *, damaged: bool = False) -> dict[str, Any] | None:
        """What was written when recording ended in order.

        Args:
            damaged: None, too, where that cannot be read.

        Returns:
            The content of ``closed.json``; None where recording did not end in order.

        Raises:
            StoreError: it is damaged.
        """
        try:
            found = self.read_json(CLOSED_NAME)
            if found is not None:
                check_json(found, CLOSED, what=CLOSED_NAME, where=self.path / CLOSED_NAME)
            if found and found.get("generation", "") != self.generations.name:
                raise self._other_generation(CLOSED_NAME, self.path / CLOSED_NAME)
        except StoreError:
            if not damaged:
                raise
            return None
        return found

    def go_on(self, after: int, *, lost_lines: int = 0) -> None:
        """Begin another generation behind a step: what was stored of later ones is deleted, the last step first.

        Whatever moment a kill picks, what is left is a run. Whoever has the run open is told by every file that is
        written from now on.

        Args:
            after: the last step that is kept.
            lost_lines: how many lines of the log are known to be lost.

        Raises:
            StoreError: something cannot be deleted or written.
        """
        generations = self.generations
        self.sync(everything=True)  # whoever wrote it may have been killed before it was
        self._remove(self.path / CLOSED_NAME)
        for later in reversed([t for t in self.found_steps() if t > after]):
            self._remove(self.step_path(later))
        # That after the step itself, too: the state may be another one now, and is written next.
        for later in reversed([t for t in self.found_snapshots() if t >= after]):
            self._remove(self.snapshot_path(later))
        self.sync(everything=True)  # nothing that was deleted comes back beside what is written now
        self._generations = generations.going_on(after, lost_lines=lost_lines)
        self.write_json(GENERATIONS_NAME, {"generations": list(self._generations.begun)})

    def mend(self) -> None:
        """Put right what a loss of power may have left of the small files, from the copies that others hold.

        Raises:
            StoreError: there is no copy.
        """
        try:
            self.read_manifest()
        except StoreError:
            self.write_json(MANIFEST_NAME, self.read_manifest(damaged=True))
        try:
            self.look_up_generations()
        except StoreError:
            self.look_up_generations(damaged=True)
            self.write_json(GENERATIONS_NAME, {"generations": list(self.generations.begun)})
        if self.closed(damaged=True) is None:
            self._remove(self.path / CLOSED_NAME)
        self.mend_log(LOG_NAME)

    def intact_steps(self) -> tuple[int, StoreError | None]:
        """How many steps are there before the first that is damaged or missing, or whose batch is.

        Steps behind the last snapshot may never have been synced, and are read in full.

        Returns:
            The number of the last one, and what is wrong with the next; None where nothing is.
        """
        found, promised = self.found_steps(), max([0, *self.found_snapshots()[:-1]])  # the last may be damaged itself
        for s in range(1, (found[-1] if found else 0) + 1):
            path, what = self.step_path(s), f"step {s}"
            try:
                stored = self.read_tensors(path, what=what, only="" if s > promised else ())
                entries = stored.header["batches"] if mismatch(stored.header, step_pattern("steps")) is None else []
                for entry in entries:
                    if not entry.get("reread"):
                        self.check_file(self.batch_path(entry["key"]), what=f"the batch of {what}")
            except StoreError as error:
                return s - 1, error
        return (found[-1] if found else 0), None

    def look_up_generations(self, *, damaged: bool = False) -> None:
        """See where recording went on, once and for all: files of later generations are refused from now on.

        Args:
            damaged: where that is damaged or missing, take the copy that every snapshot holds.

        Raises:
            StoreError: it is damaged.
        """
        try:
            self._generations = self._stored_generations()
        except StoreError:
            if not damaged:
                raise
            self._generations = Generations()
        if damaged:
            self._generations = max((self._generations, *self._spare_generations()), key=lambda g: len(g.begun))

    def _spare_generations(self) -> Iterator[Generations]:
        for s in self.found_snapshots():
            found = self._of_any_run(self.snapshot_path(s))
            if found is not None and found.run == self.run and isinstance(found.header, dict):
                with suppress(ValueError):
                    yield Generations.stored(found.header.get("generations", []))

    def count_steps(self, *, until: int | None = None, damaged: bool = False) -> int:
        """How many steps were recorded; every file of theirs is checked for truncation and for a damaged header.

        Args:
            until: look at the steps 1..until only.
            damaged: count them without looking at the files.

        Returns:
            The number N of the last one.

        Raises:
            StoreError: a step in the middle is missing or damaged, or steps are missing at the end of a closed run.
        """
        found = self.found_steps()
        closed = self.closed(damaged=damaged)
        recorded = max(found[-1] if found else 0, closed["steps"] if closed else 0)
        total = recorded if until is None else until
        if damaged:
            return min(total, recorded)
        present = set(found)
        for s in range(1, total + 1):
            try:
                if s not in present:
                    raise StoreError(f"step {s} is missing", where=self.step_path(s), expected=f"steps 1..{recorded}")
                self.check_file(self.step_path(s), what=f"step {s}")
            except StoreError as error:
                raise StoreError(
                    f"the run store is damaged: {error.what}",
                    where=error.where,
                    expected=error.expected,
                    got=error.got,
                    remedy=self._remedy(self.step_path(s)),
                ) from error
        return total
