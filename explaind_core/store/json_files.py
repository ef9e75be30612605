"""The JSON files and logs of one folder, each checked against its checksums at every read."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from explaind_core.errors import StoreError
from explaind_core.store import sealed_json as sealed
from explaind_core.store.durable import sync, sync_folders
from explaind_core.store.folder_contents import everything_below, is_folder, is_link, size_of
from explaind_core.store.generations import GENERATIONS_NAME, Generations
from explaind_core.store.guarded_files import check_below
from explaind_core.store.locations import (
    LONGEST_JSON,
    append,
    is_local,
    locate,
    read_bytes,
    reason,
    remove,
    replace,
    write_error,
)
from explaind_core.store.remote_files import StorageError

__all__ = ["MANIFEST_NAME", "VERSION", "JsonFiles"]

VERSION = 2
MANIFEST_NAME = "manifest.json"
#: What a line of a log calls its generation: no metric is called so.
_GENERATION = "#generation"


class JsonFiles:
    """Reads and writes small JSON files and logs of lines in one folder, which its manifest gives a name.

    Args:
        path: the folder, or an address that fsspec knows.

    Attributes:
        path: where the files lie, see :func:`explaind_core.store.locate`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = locate(path)
        #: The run's own name, which all its files carry, and the version of their format; known when first needed.
        self._identity: tuple[str, int] | None = None
        #: Log name -> (size in bytes, lines) as this object left it.
        self._logs: dict[str, tuple[int, int]] = {}
        #: As they were when first asked for: whoever reads sees one state of the run, or an error.
        self._generations: Generations | None = None
        #: What was written and may not be on disk yet.
        self._unsynced: deque[Path] = deque()

    def _remedy(self, path: Path) -> str:
        """What to do about a file that is damaged or missing."""
        return f"copy {path.name} again from where the run was recorded"

    # ------------------------------------------------------------------ identity
    @property
    def run(self) -> str:
        """The run's own name; empty where there is no manifest."""
        return self._identified()[0]

    @property
    def version(self) -> int:
        """The version of the format that the store is kept in."""
        return self._identified()[1]

    def _identified(self) -> tuple[str, int]:
        if self._identity is None:
            manifest = self.read_json(MANIFEST_NAME) or {}
            version = manifest.get("version")
            self._identity = str(manifest.get("run", "")), version if type(version) is int else VERSION
        return self._identity

    @property
    def generations(self) -> Generations:
        """The continuations of the run, as they were when this object first looked.

        Raises:
            StoreError: what lists them is damaged.
        """
        if self._generations is None:
            self._generations = self._stored_generations()
        return self._generations

    def _stored_generations(self) -> Generations:
        found = self.read_json(GENERATIONS_NAME)
        try:
            return Generations.stored([] if found is None else found.get("generations"))
        except ValueError as error:
            path = self.path / GENERATIONS_NAME
            raise StoreError(f"{path.name} is not as it must be: {error}", where=path) from error

    def _other_generation(self, what: str, path: Path) -> StoreError:
        return StoreError(
            f"{what} belongs to another continuation of the run than the one that was opened",
            where=path,
            expected="files of the run as it was when it was opened",
            got="a file that was written since, after going back; or in a copy of the run that was continued apart",
            remedy="open the run again; a file that was copied from elsewhere: copy the right one",
        )

    # ------------------------------------------------------------------ writing
    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON file, whole or not at all.

        Args:
            name: of the file.
            value: JSON.

        Raises:
            StoreError: the disk is full or the folder cannot be written; what was there before is intact.
        """
        self.check_writable(self.path / name)
        self._write(self.path / name, [sealed.document(value, *self._seal_of(name))], durable=True)

    def append_line(self, name: str, value: Mapping[str, Any]) -> None:
        """Append one JSON line to a log; a torn last line is passed over by :meth:`read_lines`.

        Args:
            name: of the log.
            value: JSON.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        path = self.path / name
        self.check_writable(path)
        count = self.count_lines(name)
        named = {_GENERATION: self.generations.name} if self.generations.name else {}
        content = sealed.line({**value, **named}, self.run, name, count)
        self._logs[name] = self._append(path, self._logs[name][0], content), count + 1

    def end_log(self, name: str) -> None:
        """Cut off a last line that a full disk cut short.

        Args:
            name: of the log.

        Raises:
            StoreError: the disk is full or the folder cannot be written.
        """
        path = self.path / name
        self.count_lines(name)
        if (size_of(path) or 0) != self._logs[name][0]:
            self._append(path, self._logs[name][0], b"")

    def count_lines(self, name: str) -> int:
        """How many whole lines a log has that is being written.

        Args:
            name: of the log.

        Returns:
            Their number.

        Raises:
            StoreError: a line is damaged.
        """
        path = self.path / name
        size = size_of(path) or 0
        if name not in self._logs or self._logs[name][0] != size:
            content, lines = self._lines(name)
            self._logs[name] = len(content), len(lines)
        return self._logs[name][1]

    def check_writable(self, path: Path) -> None:
        """Refuse to write into a store of an older version.

        Args:
            path: what would be written, for the error.

        Raises:
            StoreError: it is one.
        """
        if self.version != VERSION:
            raise StoreError(
                f"a run store of version {self.version} can be read, but not continued",
                where=path,
                expected=f"version {VERSION}",
                got=f"version {self.version}",
                remedy="record on into a new run: run.restore(model, optimizer), then Recorder(another path, ...)",
            )

    def sync(self, *, everything: bool = False) -> None:
        """Have on disk what this object wrote: a loss of power leaves it from now on.

        Args:
            everything: and whatever else is there, which others may have written and never synced.

        Raises:
            StoreError: it cannot be written.
        """
        paths = set()
        while self._unsynced:  # one by one: another thread may be adding to it
            paths.add(self._unsynced.popleft())
        try:
            below = list(everything_below(self.path)) if everything and is_local(self.path) else []
            sync(paths.union(path for path in below if size_of(path) is not None), top=self.path)
            # Folders in which all was deleted, too.
            sync_folders(path for path in below if is_folder(path) and not is_link(path))
        except OSError as error:
            self._unsynced.extend(paths)
            raise self._write_error(self.path, error) from error

    def sync_name(self) -> None:
        """Have the folder itself on disk, and those that it lies in, which may have been made just now.

        Raises:
            StoreError: the disk failed.
        """
        try:
            sync_folders(self.path.absolute().parents)
        except OSError as error:
            raise self._write_error(self.path, error) from error

    def _write(self, path: Path, parts: list[Any], *, durable: bool = False) -> None:
        try:
            self._check_way(path)
            replace(path, parts, durable=durable)
        except OSError as error:
            raise self._write_error(path, error) from error
        finally:  # not before: a sync of another thread would pass over it
            if not durable:
                self._unsynced.append(path)

    def _check_way(self, path: Path) -> None:
        """Refuse a folder of the store that is a link: files beyond it are none of the store's."""
        if is_local(path):
            check_below(self.path, path)

    def _append(self, path: Path, size: int, content: bytes) -> int:
        try:
            return append(path, size, content)
        except OSError as error:
            raise self._write_error(path, error) from error
        finally:
            self._unsynced.append(path)

    def _remove(self, path: Path) -> None:
        """Delete a file or a folder, where it is there."""
        try:
            remove(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._write_error(path, error) from error

    def _write_error(self, path: Path, error: OSError) -> StoreError:
        kept = f"the steps recorded so far are intact: explaind.open_run({str(self.path)!r}, ...) reads them"
        return write_error(error, path, kept, what="the run store")

    # ------------------------------------------------------------------ reading
    def _read_error(self, path: Path, what: str, error: OSError) -> StoreError:
        remedy = error.remedy if isinstance(error, StorageError) else self._remedy(path)
        return StoreError(f"{what} cannot be read: {reason(error)}", where=path, remedy=remedy)

    def _seal_of(self, name: str) -> tuple[str, ...]:
        """What a JSON file is sealed with: its name, and its run's, which the manifest itself tells."""
        return (name,) if name == MANIFEST_NAME else (self.run, name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Read a small JSON file.

        Args:
            name: of the file.

        Returns:
            Its content; None where there is no such file.

        Raises:
            StoreError: it is damaged or stems from another run.
        """
        path = self.path / name
        try:
            value = sealed.parse(read_bytes(path, longest=LONGEST_JSON))
            version = value.get("version") if name == MANIFEST_NAME else self.version
            # A manifest without a version is none of ours: for whoever asks to say.
            if sealed.CHECKSUM in value or (version != 1 and (name != MANIFEST_NAME or version is not None)):
                value = sealed.unsealed(value, *self._seal_of(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._read_error(path, name, error) from error
        except ValueError as error:
            raise StoreError(f"{name} is damaged: {error}", where=path, remedy=self._remedy(path)) from error
        return value

    def read_lines(self, name: str, *, expected: int = 0, whole: bool = False) -> list[dict[str, Any]]:
        """Read a log; a last line that a kill cut short is passed over, any other damage is an error.

        Args:
            name: of the log.
            expected: how many lines it must have at least.
            whole: nothing can have been cut short.

        Returns:
            Its lines, in order, without those about steps that were recorded anew since.

        Raises:
            StoreError: a line is damaged, or lines are missing; or it was written since the run was opened, by a
                recording that went on.
        """
        content, lines = self._lines(name)
        path = self.path / name
        if whole and (size_of(path) or 0) != len(content):
            raise StoreError(f"{name} is damaged: it does not end with a line", where=path, remedy=self._remedy(path))
        if len(lines) < expected:
            raise StoreError(
                f"{name} is truncated",
                where=path,
                expected=f"at least {expected} lines",
                got=f"{len(lines)} lines",
                remedy=self._remedy(path),
            )
        try:
            held = [self._holds(line) for line in lines]
        except LookupError as error:
            raise self._other_generation(f"a line of {name}", path) from error
        kept = [line for line, holds in zip(lines, held, strict=True) if holds]
        return [
            {k: v for k, v in line.items() if k != _GENERATION} if isinstance(line, dict) else line for line in kept
        ]

    def _holds(self, line: Any) -> bool:
        """Whether a line still counts; one that is no line of a log is told by whoever reads it."""
        step = line.get("step", 0) if isinstance(line, dict) else None
        return not isinstance(step, int) or self.generations.holds(line.get(_GENERATION, ""), step)

    def mend_log(self, name: str) -> None:
        """Cut a damaged log before the first line that is; all that it was lies beside it, as ``.damaged``.

        Args:
            name: of the log.

        Raises:
            StoreError: it cannot be read or written.
        """
        try:
            self._lines(name)
        except StoreError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            path = self.path / name
            self._write(path.with_name(f"{name}.damaged"), [read_bytes(path)], durable=True)
            self._write(path, [self._lines(name, mend=True)[0]], durable=True)
            self._logs.pop(name, None)

    def _lines(self, name: str, *, mend: bool = False) -> tuple[bytes, list[dict[str, Any]]]:
        """A log's whole lines, as bytes and read; with ``mend`` those before the first that is damaged."""
        path, entries, whole = self.path / name, [], 0
        try:
            content = read_bytes(path)
        except FileNotFoundError:
            return b"", []
        except OSError as error:
            raise self._read_error(path, name, error) from error
        for number, line in enumerate(content.split(b"\n")[:-1]):  # behind the last newline: cut short while written
            try:
                entry = sealed.parse(line)
                entries.append(entry if self.version == 1 else sealed.unsealed(entry, self.run, name, number))
            except ValueError as error:
                if mend:
                    break
                raise StoreError(
                    f"{name} is damaged: {error}", where=f"{path}, line {number + 1}", remedy=self._remedy(path)
                ) from error
            whole += len(line) + 1
        return content[:whole], entries
