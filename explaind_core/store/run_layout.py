"""Where the files of a run lie, and which of them are there.

::

    manifest.json               format, version, parameters, buffers, optimizer, rule, loss
    start.safetensors           theta_0, buffers, frozen parameters, the optimizer's state before step 1; the manifest
    steps/000/000001.safetensors    one file a step: theta_s, the gradient as fed, changed buffers;
                                its header holds hyper-parameters, batch references, factors
    snapshots/000100.safetensors    the optimizer's state after step 100
    batches/<hash>.safetensors  inputs and targets, stored once per distinct batch
    metrics.jsonl               what the loop logged, a line an entry
    closed.json                 written when recording ends in order
"""

from __future__ import annotations

import re
from pathlib import Path

from explaind_core.errors import StoreError
from explaind_core.store.guarded_files import is_plain
from explaind_core.store.json_files import MANIFEST_NAME
from explaind_core.store.locations import UNFINISHED, is_local, look_again
from explaind_core.store.store_files import StoreFiles

__all__ = ["CLOSED_NAME", "LOCK_NAME", "LOG_NAME", "RunLayout"]

LOCK_NAME = "writing.lock"
CLOSED_NAME = "closed.json"
LOG_NAME = "metrics.jsonl"
_HASH = "[0-9a-f]{32}"


class RunLayout(StoreFiles):
    """The names of a run's files; :class:`explaind_core.store.RunStore` knows how a run begins, goes on and ends.

    Args:
        path: the run's folder, or an address that fsspec knows.
        compress: pack tensors with blosc where that makes them shorter; what is read says itself how it is packed.
    """

    # ------------------------------------------------------------------ where they lie
    def step_path(self, s: int) -> Path:
        """Where step s lies; a folder holds at most 1,000 steps.

        Args:
            s: its number.

        Returns:
            A path inside the run's folder.
        """
        return self.path / "steps" / f"{s // 1000:03d}" / f"{s:06d}.safetensors"

    def snapshot_path(self, s: int) -> Path:
        """Where the optimizer's state after step s lies, if it was kept.

        Args:
            s: the step's number.

        Returns:
            A path inside the run's folder.
        """
        return self.path / "snapshots" / f"{s:06d}.safetensors"

    def batch_path(self, key: str) -> Path:
        """Where the batch with this content hash lies.

        Args:
            key: the hash.

        Returns:
            A path inside the run's folder.

        Raises:
            StoreError: it is no hash, and might lead out of the store.
        """
        if not re.fullmatch(_HASH, key):
            raise StoreError(
                "a batch is named by something that is no content hash",
                where=self.path,
                expected="32 hexadecimal digits",
                got=repr(key[:100]),
                remedy="do not use this store: it was not written by explaind",
            )
        return self.path / "batches" / f"{key}.safetensors"

    @property
    def start_path(self) -> Path:
        """Where theta_0 and the state before step 1 lie."""
        return self.path / "start.safetensors"

    def _is_step(self, path: Path) -> bool:
        # The name is compared with the layout: whatever else lies in these folders is passed over.
        return path.stem.isdecimal() and path == self.step_path(int(path.stem))

    def _remedy(self, path: Path) -> str:
        """What to do about a file that is damaged or missing."""
        remedy = super()._remedy(path)
        before = f"; open_run(..., until={int(path.stem) - 1}) opens the steps before it" if self._is_step(path) else ""
        return f"{remedy}{before}; open_run(..., damaged=True) opens all that is intact"

    # ------------------------------------------------------------------ which are there
    def is_unbegun(self) -> bool:
        """Whether a recording may begin here.

        Returns:
            True where nothing is here but what a kill left of a recording that had not begun: files before the
            manifest.
        """
        if not self.path.exists():
            return True
        known = "|".join(map(re.escape, (self.start_path.name, MANIFEST_NAME)))
        left = re.compile(rf"{re.escape(LOCK_NAME)}|{re.escape(self.start_path.name)}|({known})(\.\w+)?{UNFINISHED}")
        return self.path.is_dir() and all(self._is_left(path, left) for path in self.path.iterdir())

    def _is_left(self, path: Path, names: re.Pattern[str]) -> bool:
        # A link is no file that a recording leaves: it is whoever planted it who must say what it is for.
        return bool(names.fullmatch(path.name)) and (is_plain(path) if is_local(path) else path.is_file())

    def found_steps(self) -> list[int]:
        """The steps whose files are there.

        Returns:
            Their numbers, in order.

        Raises:
            StoreError: one of the store's folders is a link that leads elsewhere.
        """
        look_again(self.path)
        folders = [self.path / name for name in ("steps", "snapshots", "batches")]
        folders += sorted(folders[0].iterdir()) if folders[0].is_dir() else []
        for folder in folders:
            if folder.is_symlink():
                raise StoreError(
                    "a folder of the run store is a symbolic link",
                    where=folder,
                    expected="a folder",
                    remedy="move what it leads to into its place",
                )
        return sorted(int(p.stem) for p in folders[0].glob("*/*.safetensors") if self._is_step(p))

    def found_snapshots(self) -> list[int]:
        """The steps after which the optimizer's state was kept.

        Returns:
            Their numbers, in order.
        """
        found = (int(p.stem) for p in (self.path / "snapshots").glob("*.safetensors") if p.stem.isdecimal())
        return sorted(s for s in found if self.snapshot_path(s).exists())

    def found_batches(self) -> list[Path]:
        """The files of batches.

        Returns:
            Their paths, sorted.
        """
        found = (self.path / "batches").glob("*.safetensors")
        return sorted(p for p in found if re.fullmatch(_HASH, p.stem))
