"""A folder of checkpoints that checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from explaind_core.errors import StoreError
from explaind_core.store import MANIFEST_NAME, VERSION, StoreFiles, mismatch

__all__ = ["CHECKPOINTS", "CheckpointStore", "StoredCheckpoint"]

CHECKPOINTS = "explaind-checkpoints"

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
            StoreError: it is one, but damaged or of another version.
        """
        manifest = self.read_json(MANIFEST_NAME)
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
