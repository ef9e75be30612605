"""The run on disk: append-only, versioned, without pickle.

::

    manifest.json               format, version, parameters, buffers, optimizer, rule, loss
    start.safetensors           theta_0, buffers, frozen parameters, the optimizer's state before step 1
    steps/000/000001.safetensors    one file a step: theta_s, the gradient as fed, changed buffers;
                                its header holds hyper-parameters, batch references, factors
    snapshots/000100.safetensors    the optimizer's state after step 100
    batches/<hash>.safetensors  inputs and targets, stored once per distinct batch
    metrics.jsonl               what the loop logged, a line an entry
    closed.json                 written when recording ends in order

Every file is written beside its place and renamed into it, so a reader never sees half a file, and a
killed training leaves every finished step readable.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from explaind_core.errors import StoreError

__all__ = ["FORMAT", "VERSION", "RunStore", "StoredFile"]

FORMAT = "explaind-run"
VERSION = 1
_HEADER_KEY = "explaind"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class StoredFile:
    """What one file holds: ``header`` (JSON) and ``tensors`` by name."""

    header: Any
    tensors: dict[str, Tensor]


class RunStore:
    """Reads and writes the files of one run; knows their layout and nothing of their meaning.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    # ------------------------------------------------------------------ layout
    def step_path(self, s: int) -> Path:
        """Where step s lies; a folder holds at most 1,000 steps."""
        return self.path / "steps" / f"{s // 1000:03d}" / f"{s:06d}.safetensors"

    def snapshot_path(self, s: int) -> Path:
        """Where the optimizer's state after step s lies, if it was kept."""
        return self.path / "snapshots" / f"{s:06d}.safetensors"

    def batch_path(self, key: str) -> Path:
        """Where the batch with this content hash lies."""
        return self.path / "batches" / f"{key}.safetensors"

    @property
    def start_path(self) -> Path:
        """Where theta_0 and the state before step 1 lie."""
        return self.path / "start.safetensors"

    # ------------------------------------------------------------------ writing
    def write_tensors(self, path: Path, header: Any, tensors: Mapping[str, Tensor]) -> None:
        """Write one file, whole or not at all.

        Raises:
            StoreError: the disk is full or the folder cannot be written; what was there before is intact.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._write(path, safetensors.torch.save(stored, {_HEADER_KEY: json.dumps(header)}))

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file, whole or not at all (see :meth:`write_tensors`)."""
        self._write(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

    def append_line(self, name: str, value: Any) -> None:
        """Append one JSON line to a log; a torn last line is passed over by :meth:`read_lines`."""
        try:
            with (self.path / name).open("ab") as file:
                file.truncate(self._whole_lines(self.path / name))
                file.write((json.dumps(value) + "\n").encode())
        except OSError as error:
            raise self._write_error(self.path / name, error) from error

    @staticmethod
    def _whole_lines(path: Path) -> int:
        """The length of a log without a last line that a kill cut short, behind which nothing must be appended."""
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read() in (b"", b"\n"):
                return size
        return path.read_bytes().rfind(b"\n") + 1

    def _write(self, path: Path, content: bytes) -> None:
        # Not Path.with_suffix: the name must not end like a finished file.
        temporary = path.parent / (path.name + _UNFINISHED)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._write_error(path, error) from error

    def _write_error(self, path: Path, error: OSError) -> StoreError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return StoreError(
            "the disk is full" if full else f"the run store cannot be written: {error.strerror}",
            where=path,
            remedy=("free some space" if full else "check the folder's permissions")
            + f"; the steps recorded so far are intact: explaind.open_run({str(self.path)!r}, ...) reads them",
        )

    # ------------------------------------------------------------------ reading
    def is_unbegun(self) -> bool:
        """Whether nothing is here but what a kill left of a recording that had not begun: files before the manifest."""
        known = {self.start_path.name, *(f"{name}{_UNFINISHED}" for name in (self.start_path.name, "manifest.json"))}
        return all(path.is_file() and path.name in known for path in self.path.iterdir())

    def read_tensors(self, path: Path, *, what: str) -> StoredFile:
        """Read one file.

        Raises:
            StoreError: it is missing, truncated or not one of ours.
        """
        self.check_file(path, what=what)
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()
            return StoredFile(self._header(path, file.metadata(), what), {n: file.get_tensor(n) for n in names})

    def read_header(self, path: Path, *, what: str) -> Any:
        """Read only the JSON part of one file (errors as in :meth:`read_tensors`)."""
        self.check_file(path, what=what)
        with safetensors.safe_open(path, framework="pt") as file:
            return self._header(path, file.metadata(), what)

    def read_tensor(self, path: Path, name: str) -> Tensor:
        """Read one tensor of a file that was checked before."""
        with safetensors.safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def check_file(self, path: Path, *, what: str) -> None:
        """Check that a file is there and as long as its header says, without reading its tensors.

        Raises:
            StoreError: it is missing, truncated or not a safetensors file.
        """
        remedy = "copy the store again from where it was recorded"
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
                entries = json.loads(file.read(length) if 0 < length < size else "")
                ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        except FileNotFoundError:
            raise StoreError(f"{what} is missing", where=path, remedy=remedy) from None
        except (ValueError, AttributeError, LookupError, TypeError):  # no header, or one of something else
            raise StoreError(
                f"{what} is truncated or not a safetensors file", where=path, got=f"{size} bytes", remedy=remedy
            ) from None
        expected = 8 + length + max(ends, default=0)
        if size != expected:
            raise StoreError(
                f"{what} is truncated", where=path, expected=f"{expected} bytes", got=f"{size} bytes", remedy=remedy
            )

    @staticmethod
    def _header(path: Path, metadata: Mapping[str, str] | None, what: str) -> Any:
        if not metadata or _HEADER_KEY not in metadata:
            raise StoreError(
                f"{what} was not written by explaind", where=path, remedy="give the path of a recorded run"
            )
        return json.loads(metadata[_HEADER_KEY])

    def read_json(self, name: str) -> Any:
        """Read a small JSON file, None where there is none."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{name} is damaged: {error}", where=path, remedy="copy the store again") from error

    def read_lines(self, name: str) -> list[Any]:
        """Read a log; a last line that a kill cut short is passed over, any other damage is an error."""
        path = self.path / name
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entries += [json.loads(line)] if line else []
            except ValueError as error:
                if number == len(lines):  # no newline behind it: cut short while being written
                    break
                raise StoreError(f"{name} is damaged: {error}", where=f"{path}, line {number}") from error
        return entries

    def read_manifest(self) -> dict[str, Any]:
        """Read and check the manifest.

        Raises:
            StoreError: there is no run here, or it was written by another version of the format.
        """
        manifest = self.read_json("manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise StoreError(
                "this is not a recorded run",
                where=self.path,
                expected=f"a folder with a manifest.json of format {FORMAT!r}",
                got="no manifest.json"
                if manifest is None
                else f"format {manifest.get('format') if isinstance(manifest, dict) else manifest!r}",
                remedy="give the path that was passed to explaind.Recorder",
            )
        if manifest.get("version") != VERSION:
            raise StoreError(
                "the run store has another version",
                where=self.path,
                expected=f"version {VERSION}",
                got=f"version {manifest.get('version')}, written by explaind-core {manifest.get('created_with')}",
                remedy="open it with that release, or record the run again",
            )
        return manifest

    def count_steps(self, *, until: int | None = None) -> int:
        """The number N of recorded steps; every file of 1..N is checked for truncation.

        Args:
            until: look at the steps 1..until only.

        Raises:
            StoreError: a step in the middle is missing or truncated, or steps are missing at the end of a closed run.
        """
        found = sorted(int(p.stem) for p in (self.path / "steps").glob("*/*.safetensors") if p.stem.isdecimal())
        closed = self.read_json("closed.json")
        recorded = max(found[-1] if found else 0, closed["steps"] if closed else 0)
        total = recorded if until is None else until
        present = set(found)
        for s in range(1, total + 1):
            try:
                if s not in present:
                    raise StoreError(f"step {s} is missing", where=self.step_path(s), expected=f"steps 1..{recorded}")
                self.check_file(self.step_path(s), what=f"step {s}")
            except StoreError as error:
                raise StoreError(
                    f"the run store is truncated: {error.what}",
                    where=error.where,
                    expected=error.expected,
                    got=error.got,
                    remedy=f"copy the store again, or open the intact steps before it: open_run(..., until={s - 1})",
                ) from error
        return total
