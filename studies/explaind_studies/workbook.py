"""The folder of a study: its settings, and its parts, each timed and kept, so that an interrupted study continues."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from rich.console import Console

from explaind_core.errors import StoreError
from explaind_core.strategies import peak_memory

__all__ = ["Workbook"]

#: Settings that no part depends on: they say which parts there are.
_FREE = ("experiments",)


class Workbook:
    """Where a study keeps what it has finished.

    A part is a Dataset that takes long to compute. It is computed once, kept as ``parts/NAME.zarr``, and its seconds
    as ``parts/NAME.json``; those of interrupted attempts count.

    Args:
        folder: to be made, or made by the same study with the same settings before.
        study: its name.
        settings: a dataclass or mapping of JSON's plain types: everything that the parts depend on.
        console: for what is said on the way.
        progress: whether to show bars.

    Raises:
        StoreError: the folder holds another study, or one of other settings.

    Example:
        >>> import tempfile
        >>> from io import StringIO
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     book = Workbook(Path(folder), "example", {"seed": 1}, console=Console(file=StringIO()))
        ...     first = book.part("sum", lambda: xr.Dataset({"x": 3}))
        ...     again = book.part("sum", lambda: xr.Dataset({"x": 4}))
        >>> int(again.x), list(book.parts)
        (3, ['sum'])
    """

    def __init__(
        self, folder: Path, study: str, settings: Any, *, console: Console | None = None, progress: bool = True
    ) -> None:
        self.folder, self.study = Path(folder), study
        self.settings: dict[str, Any] = json.loads(
            json.dumps(
                asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else dict(settings)
            )
        )
        self.console, self.progress = console or Console(), progress
        #: Part -> seconds, peak_bytes (of the process, by the end of the part), attempts, and threads of the last.
        self.parts: dict[str, dict[str, Any]] = {}
        self._check()

    @property
    def figures(self) -> Path:
        """The folder of pictures."""
        path = self.folder / "figures"
        path.mkdir(exist_ok=True)
        return path

    def _check(self) -> None:
        path = self.folder / "settings.json"
        wanted = {"study": self.study, "settings": {k: v for k, v in self.settings.items() if k not in _FREE}}
        if not path.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise StoreError(
                    "the folder is not empty, and holds no study", where=self.folder, remedy="name another with --out"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(wanted, indent=1) + "\n")
            return
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise StoreError("the study's settings cannot be read", where=path, remedy="delete the folder") from error
        if found != wanted:
            raise StoreError(
                "the folder holds a study with other settings",
                where=self.folder,
                expected=_difference(wanted, found),
                got=_difference(found, wanted),
                remedy="name another folder with --out, or delete this one",
            )

    def part(self, name: str, compute: Callable[[], xr.Dataset], about: str = "") -> xr.Dataset:
        """A part of the study, computed unless it is there already; loaded.

        Args:
            name: of its files.
            compute: how.
            about: a line that is printed before.
        """
        path = self.folder / "parts" / f"{name}.zarr"
        if not path.exists():
            self.console.print(f"[bold]{name}[/bold] {about}".rstrip(), highlight=False)
            with self._timed(name):
                made = compute()
                path.parent.mkdir(exist_ok=True)
                # Renamed when it is whole: what a kill cuts short must not be taken up.
                unfinished = path.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                made.to_zarr(unfinished, mode="w", zarr_format=2, consolidated=False)
            unfinished.rename(path)
        effort = self._effort(name)
        self.parts[name] = effort
        self.console.print(f"  {name}: {effort['seconds']:.1f} s", highlight=False)
        with xr.open_zarr(path, consolidated=False, chunks=None) as stored:
            loaded: xr.Dataset = stored.load()
        return loaded

    def _effort(self, name: str) -> dict[str, Any]:
        path = self.folder / "parts" / f"{name}.json"
        if not path.exists():
            return {"seconds": 0.0, "peak_bytes": 0, "attempts": 0}
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the seconds to those of earlier attempts, whatever happens."""
        start = time.perf_counter()
        try:
            yield
        finally:
            before = self._effort(name)
            (self.folder / "parts").mkdir(exist_ok=True)
            effort = {
                "seconds": before["seconds"] + time.perf_counter() - start,
                "peak_bytes": max(before["peak_bytes"], peak_memory()),
                "attempts": before["attempts"] + 1,
                "threads": torch.get_num_threads(),
            }
            (self.folder / "parts" / f"{name}.json").write_text(json.dumps(effort) + "\n")


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What ``one`` says otherwise than ``other``."""
    flat, against = (
        {"study": m.get("study"), **(m.get("settings") or {})} if isinstance(m, Mapping) else {} for m in (one, other)
    )
    return {k: v for k, v in flat.items() if k not in against or against[k] != v}
