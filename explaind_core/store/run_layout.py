"""Where the files of a run lie, and which of them are there.

::

    manifest.json               format, version, parameters, buffers, optimizer, rule, loss
    start.safetensors           theta_0, buffers, frozen parameters, the optimizer's state before step 1; the manifest
    steps/000/000001.safetensors    one file a step: theta_s, the gradient as fed, changed buffers;
                                its header holds hyper-parameters, batch references, factors
    snapshots/000100.safetensors    the optimizer's state after step 100
    batches/<hash>.safetensors  inputs and targets, stored once per distinct batch
    metrics.jsonl               what the loop logged, a line an entry
    generations.json            where recording went on: after which steps, and what the files since then are known by
    closed.json                 written when recording ends in order
"""

from __future__ import annotations

import re
from pathlib import Path

from explaind_core.errors import StoreError
from explaind_core.store.folder_contents import exists, is_folder, is_link, names_in, size_of
from explaind_core.store.json_files import MANIFEST_NAME
from explaind_core.store.locations import UNFINISHED, is_local
from explaind_core.store.remote_files import StorageError
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

    def _generation_of(self, path: Path) -> str | None:
        """A step's and a snapshot's; what else there is belongs to all generations."""
        if self._is_step(path):
            return self.generations.of_step(int(path.stem))
        if path.parent.name == "snapshots" and path.stem.isdecimal():
            return self.generations.of_snapshot(int(path.stem))
        return None

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
        if not exists(self.path):
            return True
        known = "|".join(map(re.escape, (self.start_path.name, MANIFEST_NAME)))
        left = re.compile(rf"{re.escape(LOCK_NAME)}|{re.escape(self.start_path.name)}|({known})(\.\w+)?{UNFINISHED}")
        return is_folder(self.path) and all(self._is_left(name, left) for name in names_in(self.path))

    def _is_left(self, name: str, names: re.Pattern[str]) -> bool:
        # A link is no file that a recording leaves: it is whoever planted it who must say what it is for.
        path = self.path / name
        return bool(names.fullmatch(name)) and size_of(path) is not None and not (is_local(path) and is_link(path))

    def found_steps(self) -> list[int]:
        """The steps whose files are there.

        Returns:
            Their numbers, in order.

        Raises:
            StoreError: one of the store's folders is a link that leads elsewhere.
        """
        folders = [self.path / name for name in ("steps", "snapshots", "batches")]
        folders += [folders[0] / name for name in names_in(folders[0])]
        for folder in folders:
            if is_local(folder) and is_link(folder):
                raise StoreError(
                    "a folder of the run store is a symbolic link",
                    where=folder,
                    expected="a folder",
                    remedy="move what it leads to into its place",
                )
        return sorted(
            int(name.removesuffix(".safetensors"))
            for folder in folders[3:]
            for name in names_in(folder)
            if name.endswith(".safetensors") and self._is_step(folder / name)
        )

    def found_snapshots(self) -> list[int]:
        """The steps after which the optimizer's state was kept.

        Returns:
            Their numbers, in order.
        """
        found = (name.removesuffix(".safetensors") for name in names_in(self.path / "snapshots"))
        steps = {name: int(name) for name in found if name.isdecimal()}
        return sorted(s for name, s in steps.items() if self.snapshot_path(s).stem == name)

    def has_batch(self, key: str) -> bool:
        """Whether a batch is there, whole: what a loss of power left of one is not.

        Args:
            key: its hash.

        Returns:
            False where it is missing, or damaged.

        Raises:
            StorageError: nobody knows.
        """
        path = self.batch_path(key)
        if size_of(path) is None:
            return False
        try:
            self.read_tensors(path, what="a batch")
        except StoreError as error:
            if isinstance(error.__cause__, StorageError):
                raise
            return False
        return True

    def found_batches(self) -> list[Path]:
        """The files of batches.

        Returns:
            Their paths, sorted.
        """
        folder = self.path / "batches"
        return [folder / name for name in names_in(folder) if re.fullmatch(_HASH + r"\.safetensors", name)]
