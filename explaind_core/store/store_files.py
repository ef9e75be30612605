"""The files of a run: tensors beside JSON and logs, each checked against its checksums at every read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO
from uuid import uuid4

from torch import Tensor

from explaind_core import trees
from explaind_core.errors import StoreError
from explaind_core.store.generations import Generations
from explaind_core.store.json_files import MANIFEST_NAME, VERSION, JsonFiles
from explaind_core.store.locations import opened
from explaind_core.store.tensor_file import Contents, Damage, Shape, check_shapes, encode, read_contents, read_entry

__all__ = ["StoreFiles", "StoredFile"]


@dataclass(frozen=True)
class StoredFile:
    """What one file holds.

    Attributes:
        header: JSON.
        tensors: by name.
    """

    header: Any
    tensors: dict[str, Tensor]


class StoreFiles(JsonFiles):
    """Reads and writes files of three kinds in one folder; :class:`explaind_core.store.RunStore` knows which there are.

    Args:
        path: the run's folder, or an address that fsspec knows.
        compress: pack tensors with blosc where that makes them shorter; what is read says itself how it is packed.

    Attributes:
        path: where the files lie, see :func:`explaind_core.store.locate`.
    """

    def __init__(self, path: str | os.PathLike[str], *, compress: bool = True) -> None:
        super().__init__(path)
        self.compress = compress

    def _place(self, path: Path) -> str:
        """What a file calls itself: its path inside the store, without its ending."""
        return path.relative_to(self.path).as_posix().removesuffix(".safetensors")

    # ------------------------------------------------------------------ writing
    def begin(self) -> str:
        """Begin a new run.

        Returns:
            The name that all its files will carry, drawn at random.
        """
        self._identity, self._logs, self._generations = (uuid4().hex, VERSION), {}, Generations()
        return self.run

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
            names = {"run": self.run, "file": self._place(path), "generation": self.generations.name}
            parts = encode(header, tensors, **names, compress=self.compress)
        except Damage as error:
            raise StoreError(f"{path.name} {error.what}", where=path, expected=error.expected, got=error.got) from error
        self._write(path, parts)
        return sum(map(len, parts))

    # ------------------------------------------------------------------ reading
    def read_tensors(
        self,
        path: Path,
        *,
        what: str,
        only: str | tuple[str, ...] = "",
        shapes: Mapping[str, Shape] = MappingProxyType({}),
    ) -> StoredFile:
        """Read one file.

        Args:
            path: inside the folder.
            what: what it is, for the error.
            only: read, and check, the tensors whose names start like this.
            shapes: what tensors of these names must be; compared before memory is asked for.

        Returns:
            Its header and those tensors.

        Raises:
            StoreError: it is missing, truncated, damaged, another file than it should be, or not one of ours.
        """
        with self._opened(path, what) as (file, contents):
            wanted = {n: e for n, e in contents.entries.items() if n.startswith(only)}
            check_shapes({n: (e.shape, e.dtype) for n, e in wanted.items()}, shapes)
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

    def declared_shapes(self, path: Path, *, what: str) -> dict[str, Shape]:
        """What a file says of its tensors, without reading them; it is as long as it says.

        Args:
            path: inside the folder.
            what: what it is, for the error.

        Returns:
            Name -> shape and dtype.

        Raises:
            StoreError: it is missing, truncated, damaged, another file than it should be, or not one of ours.
        """
        with self._opened(path, what) as (_, contents):
            return {name: (entry.shape, entry.dtype) for name, entry in contents.entries.items()}

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
            self._check_way(path)
            with opened(path) as (file, size):
                contents = read_contents(file, size, sealed=version > 1)
                if version > 1 and contents.file != self._place(path):
                    raise Damage("is another file of a run", expected=self._place(path), got=contents.file)
                if version > 1 and contents.run != run and not of_any_run:
                    raise Damage(f"belongs to another run than {MANIFEST_NAME}", expected=run, got=contents.run)
                expected = None if of_any_run else self._generation_of(path)
                if expected is not None and contents.generation != expected:
                    raise self._other_generation(what, path)
                yield file, contents
        except FileNotFoundError:
            raise StoreError(f"{what} is missing", where=path, remedy=self._remedy(path)) from None
        except Damage as error:
            raise StoreError(
                f"{what} {error.what}", where=path, expected=error.expected, got=error.got, remedy=self._remedy(path)
            ) from error
        except OSError as error:
            raise self._read_error(path, what, error) from error

    def _generation_of(self, path: Path) -> str | None:  # noqa: ARG002 (for stores that go on)
        """Which generation a file must belong to; None where any will do."""
        return None

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
