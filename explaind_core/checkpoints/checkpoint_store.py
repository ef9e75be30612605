"""A folder of checkpoints that checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from explaind_core.errors import StoreError
from explaind_core.store import MANIFEST_NAME, VERSION, StoreFiles, mismatch, names_in, size_of

__all__ = ["CHECKPOINTS", "UNFINISHED_NAME", "CheckpointStore", "StoredCheckpoint"]

CHECKPOINTS = "explaind-checkpoints"
#: The manifest of an import that has not come to its end.
UNFINISHED_NAME = "unfinished.json"

_MANIFEST: Any = {"format": str, "version": int, "run": str, "model": str, "labels": [(str, int)]}


class CheckpointStore(StoreFiles):
    """A folder of checkpoints in order: ``manifest.json`` and ``checkpoints/000000.safetensors``, ...

    Args:
        path: the folder, or an address that fsspec knows.
        compress: pack tensors with blosc where that makes them shorter.
    """

    def checkpoint_path(self, index: int) -> Path:
        """Where a checkpoint lies.

        Args:
            index: its number, counted from 0.

        Returns:
            A path inside the folder.
        """
        return self.path / "checkpoints" / f"{index:06d}.safetensors"

    def labels(self) -> list[int | str] | None:
        """The checkpoints' labels.

        Returns:
            One each, in order; None if this is no such store.

        Raises:
            StoreError: it is one, but damaged, half imported or of another version.
        """
        manifest = self.read_json(MANIFEST_NAME)
        if manifest is None and (begun := self.unfinished()) is not None:
            raise StoreError(
                "this is half an import of checkpoints",
                where=self.path,
                expected=f"{len(begun['labels'])} checkpoints",
                got=f"{len(names_in(self.checkpoint_path(0).parent))}",
                remedy="import the same checkpoints to the same path again, which goes on with it",
            )
        if manifest is None or manifest.get("format") != CHECKPOINTS:
            return None
        words = mismatch(manifest, _MANIFEST)
        if words or manifest["version"] != VERSION:
            raise StoreError(
                "the store of checkpoints cannot be read",
                where=self.path / MANIFEST_NAME,
                expected=f"version {VERSION}",
                got=words or f"version {manifest['version']}",
                remedy="open it with the release of explaind-core that wrote it, or a later one",
            )
        labels: list[int | str] = manifest["labels"]
        return labels

    def unfinished(self) -> dict[str, Any] | None:
        """What an import that was killed had begun; this store goes on with it.

        Returns:
            Its manifest; None where there is none.

        Raises:
            StoreError: what is there is damaged.
        """
        if size_of(self.path / MANIFEST_NAME) is not None:
            return None
        begun = self.read_json(UNFINISHED_NAME)
        words = None if begun is None else mismatch(begun, _MANIFEST)
        if words or (begun is not None and begun["version"] != VERSION):
            raise StoreError(
                "half an import of checkpoints cannot be gone on with",
                where=self.path / UNFINISHED_NAME,
                expected=f"version {VERSION}",
                got=words or begun,
                remedy="delete it, and import the checkpoints again",
            )
        if begun is not None:
            self._identity = begun["run"], VERSION
        return begun

    def imported(self, index: int) -> dict[str, Tensor] | None:
        """A checkpoint that is there already.

        Args:
            index: its number, counted from 0.

        Returns:
            Its state dict; None where it is missing, or not whole.

        Raises:
            StoreError: nobody knows.
        """
        try:
            return StoredCheckpoint(self, index).read()
        except StoreError as error:
            if isinstance(error.__cause__, OSError):
                raise
            return None

    def finish(self) -> None:
        """All checkpoints are there.

        Raises:
            StoreError: the manifest of the import cannot be deleted.
        """
        self._remove(self.path / UNFINISHED_NAME)

    def _seal_of(self, name: str) -> tuple[str, ...]:
        return (name,) if name == UNFINISHED_NAME else super()._seal_of(name)  # it names the run itself


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint of a store.

    Attributes:
        store: where it lies.
        index: its number, counted from 0.
    """

    store: CheckpointStore
    index: int

    def read(self) -> dict[str, Tensor]:
        """Read it, and check it.

        Returns:
            Its state dict.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self.store.checkpoint_path(self.index)
        return self.store.read_tensors(path, what=f"checkpoint number {self.index}").tensors
