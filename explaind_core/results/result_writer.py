"""Writes a result block by block, so that a kill at any moment costs the block at hand and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from explaind_core.errors import QuestionError, StoreError
from explaind_core.results.counts import COUNTS
from explaind_core.results.result_record import ForeignError, Record, checksum, read_record
from explaind_core.results.stored_result import check_files, counted_files, stored_result
from explaind_core.results.zarr_folder import PARTIAL, check_plain_folder, zarr_store
from explaind_core.store import (
    LockWords,
    WritingLock,
    exists,
    is_local,
    locate,
    read_bytes,
    remove_unfinished,
    replace,
    sync,
    sync_folders,
    write_error,
)

__all__ = ["BLOCK", "ResultWriter"]

#: Windows, or test samples, computed before they are appended.
BLOCK = 50
#: The most bytes of a chunk; compressors take less than 2 GiB, and a reader one chunk at a time.
_CHUNK = 2**27
#: Attributes that are known only when something was computed.
_FOUND = ("tail_dropped", "gradient_factor", "unattributed_gradient", "unattributed_largest")
#: Attributes of a result without the step axis that count something.
_COUNTED = {count.attribute: count for count in COUNTS.values() if count.attribute}
_LOCK_WORDS = LockWords(
    taken="another process is writing this result",
    remedy="let it finish and ask again, which reads the finished result; or choose another out=",
    kept="nothing was begun",
    same_process="another call of this process",
)
_COMPRESSORS = (ZstdCodec(level=0), Crc32cCodec())


class ResultWriter:
    """The result at a path, opened for writing by one process at a time.

    Args:
        path: a local path, or an address that fsspec knows (there no lock is held).
        question: the fingerprint of what is asked.
        axis: along which blocks are written, None where the result is one block.
        total: the entries of that axis.

    Attributes:
        done: how many of them are written, by whomever.

    Raises:
        QuestionError: something else lies there.
        StoreError: what is there is damaged; it cannot be written; another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str], question: str, axis: str | None, total: int) -> None:
        self._folder = locate(path)
        self._held = ExitStack()
        self._record = Record(question, axis, 0, total, {}, {}, {})

    @property
    def done(self) -> int:
        """How many entries are written."""
        return self._record.done

    @property
    def finished(self) -> bool:
        """Whether nothing is left to compute."""
        return self._record.finished

    @property
    def chunk(self) -> int | None:
        """The entries of a chunk along the axis: how blocks were cut when the result was begun; None before that."""
        axis = self._record.axis
        for metadata in self._record.arrays.values():
            dims = metadata.get("dimension_names", ())
            if axis in dims and len(dims) > 1:
                return int(metadata["chunk_grid"]["configuration"]["chunk_shape"][dims.index(axis)])
        return None

    def __enter__(self) -> Self:
        self._look()
        if not self.finished:  # a finished one is only read: by any number of processes, in a folder that is read-only
            with self._held as held:
                held.enter_context(_alone(self._folder))
                self._look()
                with self._writing():
                    remove_unfinished(self._folder, ending=PARTIAL)
                    check_plain_folder(self._folder)
                    if not self.done:
                        self._begin()
                self._check()
                self._held = held.pop_all()
            return self
        self._check()
        if is_local(self._folder) and exists(_lock_path(self._folder)):
            with suppress(StoreError), _alone(self._folder):  # which removes it: somebody was killed when all was done
                pass
        return self

    def _check(self) -> None:
        if self.done:
            check_files(self._folder, self._record, contents=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def result(self) -> xr.Dataset:
        """What is written.

        Returns:
            A Dataset that is read lazily.
        """
        return stored_result(self._folder, self._record)

    # ------------------------------------------------------------------ writing
    def append(self, block: xr.Dataset, labels: Mapping[str, Any]) -> None:
        """Write a block behind those that are written.

        Args:
            block: the result of some entries of the axis.
            labels: the coordinates of the whole result.

        Raises:
            StoreError: it cannot be written; the blocks before it are kept.
        """
        axis = self._record.axis
        size = self._record.total if axis is None else block.sizes[axis]
        with self._writing():
            store = zarr_store(self._folder, read_only=False)
            group = zarr.open_group(store, mode="r+", zarr_format=3, use_consolidated=False)
            # Chunks full of one number are files, too: one that is missing is damage.
            with zarr.config.set({"array.write_empty_chunks": True}):
                if not self.done:
                    self._create(group, block, labels)
                self._fill(group, block, slice(self.done, self.done + size))
            files, arrays = self._record.files, self._record.arrays
            if not self.done:
                names = sorted({*map(str, block.variables), *labels})
                raw = {f"{name}/zarr.json": read_bytes(self._folder / name / "zarr.json") for name in names}
                files = {key: checksum(content) for key, content in raw.items()}
                arrays = {key.rpartition("/")[0]: json.loads(content) for key, content in raw.items()}
            # Only now does the block count: one that a kill cuts short is computed again.
            attributes = self._joined(block, labels)
            grown = dataclasses.replace(
                self._record, done=self.done + size, files=files, arrays=arrays, attributes=attributes
            )
            self._sync(grown)
            self._write(grown)

    def _sync(self, grown: Record) -> None:
        """Have a block on disk before it counts: a loss of power leaves every one that does."""
        if is_local(self._folder):
            again = [n for n, found in grown.arrays.items() if grown.axis not in found.get("dimension_names", ())]
            known = {key for key in counted_files(self._record) if key.partition("/")[0] not in again}
            sync((self._folder / key for key in counted_files(grown) - known), top=self._folder)

    def _create(self, group: zarr.Group, block: xr.Dataset, labels: Mapping[str, Any]) -> None:
        """All arrays at their final shape."""
        axis, total = self._record.axis, self._record.total
        coordinates = {n: _variable(n, v) for n, v in labels.items()}
        values = {str(n): v.variable for n, v in block.data_vars.items()}
        for name, variable in {**values, **coordinates}.items():
            shape = tuple(total if dim == axis else n for dim, n in variable.sizes.items())
            along = (
                {} if axis is None or name in coordinates else {axis: BLOCK if axis == "step" else block.sizes[axis]}
            )
            text = variable.dtype.kind in "UO"
            array: Any = group.create_array(
                name,
                shape=shape,
                chunks=_chunk_shape(variable, shape, along),
                dtype=str if text else variable.dtype,
                compressors=_COMPRESSORS,
                fill_value=_nothing(variable.dtype),
                dimension_names=[str(dim) for dim in variable.dims],
                overwrite=True,
            )
            if name in coordinates:
                array[...] = variable.values.astype(array.dtype)

    def _fill(self, group: zarr.Group, block: xr.Dataset, entries: slice) -> None:
        axis = self._record.axis
        for name, variable in block.data_vars.items():
            array: Any = group[str(name)]
            if axis in variable.dims:
                array[tuple(entries if dim == axis else slice(None) for dim in variable.dims)] = variable.values
            elif not self.done:
                array[...] = variable.values
            elif name in COUNTS:  # what is counted over the step axis, where test samples come in blocks
                array[...] = COUNTS[str(name)].over_blocks(array[...], variable.values)

    def _joined(self, block: xr.Dataset, labels: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of all blocks up to this one."""
        found, known = dict(block.attrs), self._record.attributes
        auxiliary = [name for name, value in labels.items() if _variable(name, value).dims != (name,)]
        if auxiliary:
            found["coordinates"] = " ".join(auxiliary)  # how xarray tells labels from variables
        if not self.done:
            return found
        for name, count in _COUNTED.items():
            if name in found and name in known:
                found[name] = count.over_all_blocks((found[name], known[name]))
        if "gradient_factor" in found and "gradient_factor" in known:
            pairs = (found["gradient_factor"], known["gradient_factor"])
            found["gradient_factor"] = [min(low for low, _ in pairs), max(high for _, high in pairs)]
        for name in ("unattributed_gradient", "unattributed_largest"):
            if name in found and name in known:
                found[name] = max(found[name], known[name])
        return {**known, **{name: found[name] for name in (*_FOUND, *_COUNTED) if name in found}}

    # ------------------------------------------------------------------ what is there
    def _look(self) -> None:
        folder, asked = self._folder, self._record
        try:
            record = read_record(folder)
        except ForeignError as error:
            raise QuestionError(
                f"there is something at out= that is no result: {error.got}",
                where=folder,
                remedy="choose another path, or delete it",
            ) from error
        if record is None:
            return
        if (record.question, record.axis, record.total) != (asked.question, asked.axis, asked.total):
            raise QuestionError(
                "out= holds the result of another question",
                where=folder,
                expected=f"an unfinished or finished result of this question ({asked.question})",
                got=record.question,
                remedy="choose another path, or delete it",
            )
        self._record = record

    def _begin(self) -> None:
        """Claim the folder, before anything else is in it."""
        self._write(self._record)
        sync_folders(self._folder.absolute().parents)  # which may have been made just now

    def _write(self, record: Record) -> None:
        replace(self._folder / "zarr.json", [record.encoded(version("explaind-core"))], ending=PARTIAL, durable=True)
        self._record = record

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"the first {self.done} of {self._record.total} {self._record.axis} entries are kept; "
            raise write_error(
                error,
                self._folder if error.filename is None else error.filename,
                f"{kept if self.done else ''}ask the same question with the same out= to go on",
            ) from error


def _alone(folder: Path) -> AbstractContextManager[object]:
    """Keep other processes from writing the same result; elsewhere than on this machine nobody can tell."""
    if not is_local(folder):
        return nullcontext()
    return WritingLock(_lock_path(folder), where=folder, words=_LOCK_WORDS, former=_beside(folder, ".lock"))


def _lock_path(folder: Path) -> Path:
    """Beside a local result, and not in it: whatever lies in a zarr folder is part of it."""
    return _beside(folder, ".explaind-writing")  # no name of a file of somebody else, as uv.lock is


def _beside(folder: Path, ending: str) -> Path:
    path = folder.resolve()
    return path.with_name(path.name + ending)


def _variable(name: str, value: Any) -> xr.Variable:
    """A coordinate as xarray would make it: the values of the axis of its name, or (axis, values)."""
    dims, values = value if isinstance(value, tuple) else (name, value)
    return xr.Variable(dims, np.asarray(values))


def _chunk_shape(variable: Any, shape: tuple[int, ...], along: Mapping[Any, int]) -> tuple[int, ...]:
    """A chunk is a block along the axis of everything else, so that no block touches another's; or a part of that."""
    chunk = [max(1, min(n, along.get(dim, n))) for dim, n in zip(variable.dims, shape, strict=True)]
    free = [i for i, dim in enumerate(variable.dims) if dim not in along]
    while math.prod(chunk) * variable.dtype.itemsize > _CHUNK and any(chunk[i] > 1 for i in free):
        largest = max(free, key=lambda i: chunk[i])
        chunk[largest] = -(-chunk[largest] // 2)
    return tuple(chunk)


def _nothing(dtype: np.dtype[Any]) -> Any:
    """What a reader that does not check finds where nothing is written yet."""
    return {"f": float("nan"), "b": False, "i": -1}.get(dtype.kind, "")
