"""The files of a run: tensors, JSON and logs, each checked against its checksums at every read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from torch import Tensor

from explaind_core import trees
from explaind_core.errors import StoreError
from explaind_core.store import sealed_json as sealed
from explaind_core.store.locations import append, locate, opened, read_bytes, reason, replace, write_error
from explaind_core.store.tensor_file import Contents, Damage, encode, read_contents, read_entry

__all__ = ["MANIFEST_NAME", "VERSION", "StoreFiles", "StoredFile"]

VERSION = 2
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class StoredFile:
    """What one file holds.

    Attributes:
        header: JSON.
        tensors: by name.
    """

    header: Any
    tensors: dict[str, Tensor]


class StoreFiles:
    """Reads and writes files of three kinds in one folder; :class:`explaind_core.store.RunStore` knows which there are.

    Args:
        path: the run's folder, or an address that fsspec knows.
        compress: pack tensors with blosc where that makes them shorter; what is read says itself how it is packed.

    Attributes:
        path: where the files lie, see :func:`explaind_core.store.locate`.
    """

    def __init__(self, path: str | os.PathLike[str], *, compress: bool = True) -> None:
        self.path = locate(path)
        self.compress = compress
        #: The run's own name, which all its files carry, and the version of their format; known when first needed.
        self._identity: tuple[str, int] | None = None
        #: Log name -> (size in bytes, lines) as this object left it.
        self._logs: dict[str, tuple[int, int]] = {}

    def _place(self, path: Path) -> str:
        """What a file calls itself: its path inside the store, without its ending."""
        return path.relative_to(self.path).as_posix().removesuffix(".safetensors")

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

    def begin(self) -> str:
        """Begin a new run.

        Returns:
            The name that all its files will carry, drawn at random.
        """
        self._identity, self._logs = (uuid4().hex, VERSION), {}
        return self.run

    # ------------------------------------------------------------------ writing
    def write_tensors(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> int:
        """Write one file, whole or not at all.

        Args:
            path: inside the folder.
            header: JSON.
            tensors: by name.

        Returns:
            Its size in bytes.

        Raises:
            StoreError: the disk is full or the folder cannot be written; what was there before is intact.
        """
        self.check_writable(path)
        try:
            parts = encode(header, tensors, run=self.run, file=self._place(path), compress=self.compress)
        except Damage as error:
            raise StoreError(f"{path.name} {error.what}", where=path, expected=error.expected, got=error.got) from error
        self._write(path, parts)
        return sum(map(len, parts))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a small JSON file, whole or not at all.

        Args:
            name: of the file.
            value: JSON.

        Raises:
            StoreError: the disk is full or the folder cannot be written; what was there before is intact.
        """
        self.check_writable(self.path / name)
        self._write(self.path / name, [sealed.document(value, *self._seal_of(name))])

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
        content = sealed.line(value, self.run, name, count)
        try:
            size = append(path, self._logs[name][0], content)
        except OSError as error:
            raise self._write_error(path, error) from error
        self._logs[name] = size, count + 1

    def end_log(self, name: str) -> None:
        """Cut off a last line that a full disk cut short.

        Args:
            name: of the log.
        """
        path = self.path / name
        self.count_lines(name)
        if path.exists() and path.stat().st_size != self._logs[name][0]:
            append(path, self._logs[name][0], b"")

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
        size = path.stat().st_size if path.exists() else 0
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

    def _write(self, path: Path, parts: list[Any]) -> None:
        try:
            replace(path, parts)
        except OSError as error:
            raise self._write_error(path, error) from error

    def _write_error(self, path: Path, error: OSError) -> StoreError:
        kept = f"the steps recorded so far are intact: explaind.open_run({str(self.path)!r}, ...) reads them"
        return write_error(error, path, kept, what="the run store")

    # ------------------------------------------------------------------ reading
    def read_tensors(self, path: Path, *, what: str, only: str | tuple[str, ...] = "") -> StoredFile:
        """Read one file.

        Args:
            path: inside the folder.
            what: what it is, for the error.
            only: read, and check, the tensors whose names start like this.

        Returns:
            Its header and those tensors.

        Raises:
            StoreError: it is missing, truncated, damaged, another file than it should be, or not one of ours.
        """
        with self._opened(path, what) as (file, contents):
            wanted = {n: e for n, e in contents.entries.items() if n.startswith(only)}
            return StoredFile(contents.header, {n: read_entry(file, n, e) for n, e in wanted.items()})

    def read_header(self, path: Path, *, what: str) -> Any:
        """Read only the JSON part of one file.

        Args:
            path: inside the folder.
            what: what it is, for the error.

        Returns:
            The header.

        Raises:
            StoreError: it is missing, truncated, damaged, another file than it should be, or not one of ours.
        """
        with self._opened(path, what) as (_, contents):
            return contents.header

    def read_tensor(self, path: Path, name: str, *, what: str = "the file") -> Tensor:
        """Read one tensor of a file.

        Args:
            path: inside the folder.
            name: of the tensor.
            what: what it is, for the error.

        Returns:
            The tensor, with its own storage.

        Raises:
            StoreError: it is missing, truncated, damaged, another file than it should be, or not one of ours.
        """
        with self._opened(path, what) as (file, contents):
            if name not in contents.entries:
                raise Damage(f"holds no {name!r}")
            return read_entry(file, name, contents.entries[name])

    def check_file(self, path: Path, *, what: str) -> None:
        """Check that a file is there, is the one it should be, and as long as it says, without reading its tensors.

        Args:
            path: inside the folder.
            what: what it is, for the error.

        Raises:
            StoreError: it is missing, truncated, damaged, another file than it should be, or not one of ours.
        """
        with self._opened(path, what):
            pass

    @contextlib.contextmanager
    def _opened(self, path: Path, what: str, *, of_any_run: bool = False) -> Iterator[tuple[BinaryIO, Contents]]:
        run, version = ("", VERSION) if of_any_run else self._identified()
        try:
            with opened(path) as (file, size):
                contents = read_contents(file, size, sealed=version > 1)
                if version > 1 and contents.file != self._place(path):
                    raise Damage("is another file of a run", expected=self._place(path), got=contents.file)
                if version > 1 and contents.run != run and not of_any_run:
                    raise Damage(f"belongs to another run than {MANIFEST_NAME}", expected=run, got=contents.run)
                yield file, contents
        except FileNotFoundError:
            raise StoreError(f"{what} is missing", where=path, remedy=self._remedy(path)) from None
        except Damage as error:
            raise StoreError(
                f"{what} {error.what}", where=path, expected=error.expected, got=error.got, remedy=self._remedy(path)
            ) from error
        except OSError as error:
            raise self._read_error(path, what, error) from error

    def _read_error(self, path: Path, what: str, error: OSError) -> StoreError:
        return StoreError(f"{what} cannot be read: {reason(error)}", where=path, remedy=self._remedy(path))

    def unflatten(self, structure: Any, tensors: Mapping[str, Tensor], path: Path, *, what: str) -> Any:
        """Rebuild nested data from a file (:func:`explaind_core.trees.unflatten`).

        Args:
            structure: JSON, as a header holds it.
            tensors: what it refers to, by name.
            path: of the file, for the error.
            what: what it is, for the error.

        Returns:
            The data.

        Raises:
            StoreError: the file does not hold what its header refers to.
        """
        try:
            return trees.unflatten(structure, tensors)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise StoreError(
                f"{what} does not hold what its header refers to: {error!r}", where=path, remedy=self._remedy(path)
            ) from error

    # ------------------------------------------------------------------ JSON
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
            value = sealed.parse(read_bytes(path))
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
            Its lines, in order.

        Raises:
            StoreError: a line is damaged, or lines are missing.
        """
        content, lines = self._lines(name)
        path = self.path / name
        if whole and path.exists() and path.stat().st_size != len(content):
            raise StoreError(f"{name} is damaged: it does not end with a line", where=path, remedy=self._remedy(path))
        if len(lines) < expected:
            raise StoreError(
                f"{name} is truncated",
                where=path,
                expected=f"at least {expected} lines",
                got=f"{len(lines)} lines",
                remedy=self._remedy(path),
            )
        return lines

    def _lines(self, name: str) -> tuple[bytes, list[dict[str, Any]]]:
        """A log's whole lines, as bytes and read."""
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
                raise StoreError(
                    f"{name} is damaged: {error}", where=f"{path}, line {number + 1}", remedy=self._remedy(path)
                ) from error
            whole += len(line) + 1
        return content[:whole], entries
