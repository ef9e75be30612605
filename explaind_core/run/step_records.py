"""What is stored of every step whatever the mode: its header, hyper-parameters, batch, and the logs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from explaind_core import trees
from explaind_core.data import IndexedDataset
from explaind_core.errors import QuestionError, StoreError
from explaind_core.run.consistency import check_batch, check_manifest, check_start, check_step
from explaind_core.run.metrics import metrics_of
from explaind_core.store import BATCH, DTYPES, LOG_NAME, RunStore, check_json, step_pattern
from explaind_core.training_step import Batch, ForwardState, InputRows, MicroBatch, ParameterInfo, read_again

__all__ = ["StepRecords"]

#: In place of a step's number: up to the first that is damaged.
INTACT = "intact"


class StepRecords:
    """A run's manifest and what its files tell of each step; nothing here is ever computed again.

    :class:`explaind_core.run.stored_steps.StoredSteps` adds parameters, buffers and gradients to it.

    Args:
        store: where the run lies.
        until: look at the steps 1..until only; None for all, ``"intact"`` for those before the first damage.
        damaged: read all that is intact.
        dataset: where inputs that were not stored are read again.

    Attributes:
        manifest: what the run says of itself, as JSON.
        mode: what was stored of its steps: ``"steps"``, ``"parameters"`` or ``"snapshots"``.
        point: which parameters ``theta`` returns.
        parameters: name -> :class:`~explaind_core.training_step.ParameterInfo`.
        steps: ``range(1, N + 1)``.
        complete: whether the recording ended in order.
        first_damage: what is wrong with the first step that is left out by ``until="intact"``; None where nothing is.

    Raises:
        StoreError: there is no run, it is damaged, or of another version.
    """

    def __init__(
        self, store: RunStore, *, until: int | str | None, damaged: bool, dataset: IndexedDataset | None
    ) -> None:
        spared = damaged or until == INTACT
        self.store, self.dataset, self._damaged = store, dataset, damaged
        self.manifest = store.read_manifest(damaged=spared)
        check_manifest(self.manifest, where=store.path / "manifest.json")
        store.look_up_generations(damaged=spared)
        self.mode: str = self.manifest.get("mode", "steps")
        self.point = "gradient"
        self.parameters: Mapping[str, ParameterInfo] = {
            p["name"]: ParameterInfo(torch.Size(p["shape"]), self._dtype(p["dtype"]), p["trained"])
            for p in self.manifest["parameters"]
        }
        if not damaged:
            declared = store.declared_shapes(store.start_path, what="the start of the run")
            check_start(declared, self.parameters, where=store.start_path)
        self.first_damage: StoreError | None = None
        if isinstance(until, str):
            if until != INTACT:
                raise QuestionError("until which step?", where="until", expected=f"a step or {INTACT!r}", got=until)
            count, self.first_damage = store.intact_steps()
        else:
            count = store.count_steps(until=until, damaged=damaged)
        self.steps = range(1, count + 1)
        self._closed = store.closed(damaged=spared)
        if until == INTACT and self._closed is not None and self._closed["steps"] > count:
            self._closed = None  # it ended in order, and no longer is what it was then
        self.complete = self._closed is not None
        self._header = lru_cache(maxsize=4096)(self._read_header)

    # ------------------------------------------------------------------ the run
    @property
    def bytes(self) -> int:
        """The size of all files of the run, wherever it lies."""
        return self.store.bytes

    @property
    def path(self) -> Path:
        """Where the run lies."""
        return self.store.path

    @property
    def optimizers(self) -> tuple[Mapping[str, Any], ...]:
        """Each optimizer as the manifest has it, one for most runs.

        ``optimizer`` is the name of its class, ``optimizer_defaults`` are those of its options, ``rule`` is its rule.
        """
        return tuple(self.manifest.get("optimizers", (self.manifest,)))

    def _check_point(self, point: str) -> str:
        kept = ("gradient", "evaluated") if self.manifest.get("evaluates_elsewhere") else ("gradient",)
        if point not in kept:
            raise QuestionError(
                f"the run has no point {point!r}",
                where=self.path,
                expected=f"one of {list(kept)}",
                got=point,
                remedy=f"{self.manifest['optimizer']} evaluates the model where it takes its gradients"
                if len(kept) == 1 and point == "evaluated"
                else None,
            )
        return point

    def _dtype(self, name: str) -> torch.dtype:
        """A dtype by the name that torch prints; nothing else of torch can be named."""
        known = {str(dtype): dtype for dtype in DTYPES.values()}
        if name not in known:
            raise StoreError(
                "the manifest names a dtype that is none",
                where=self.path / "manifest.json",
                expected=sorted(known),
                got=name[:100],
                remedy="do not use this store: it was not written by explaind",
            )
        return known[name]

    # ------------------------------------------------------------------ headers
    def check_step(self, s: int, *, first: int = 1) -> int:
        """Refuse a step that was not recorded.

        Args:
            s: its number.
            first: the smallest number that will do: 0 where the start is meant as well.

        Returns:
            ``s``.

        Raises:
            QuestionError: there is no such step.
        """
        if not isinstance(s, int) or not first <= s <= len(self.steps):
            raise QuestionError(
                f"the run has no step {s!r}", where=self.path, expected=f"{first} <= step <= {len(self.steps)}", got=s
            )
        return s

    def _read_header(self, s: int) -> dict[str, Any]:
        header: dict[str, Any] = self.store.read_header(self.store.step_path(s), what=f"step {s}")
        where, what = self.store.step_path(s), f"the header of step {s}"
        check_json(header, step_pattern(self.mode), what=what, where=where)
        check_step(header, s, self.parameters, len(self.optimizers), where=where)
        return header

    def step_header(self, s: int) -> Mapping[str, Any]:
        """What was stored of step s as JSON.

        Args:
            s: 1..N.

        Returns:
            The header of its file.

        Raises:
            QuestionError: there is no such step.
            StoreError: its file is damaged.
        """
        header: Mapping[str, Any] = self._header(self.check_step(s))
        return header

    def _step_tensors(self, s: int, *prefixes: str) -> dict[str, Tensor]:
        """The tensors in the file of step s whose names start like this; only these are read."""
        path = self.store.step_path(s)
        return self.store.read_tensors(path, what=f"step {s}", only=prefixes).tensors

    def hyper(self, s: int) -> tuple[dict[str, Any], ...]:
        """Each parameter group's hyper-parameters as they stood before step s.

        Args:
            s: 1..N.

        Returns:
            One mapping a group; ``params`` holds the names of its parameters. In a run of several optimizers the groups
            of all, with ``optimizer``, the number of their own, counted from 0. One-element tensors (a learning rate
            kept as a tensor) are returned as numbers.
        """
        return tuple(trees.map_tensors(lambda t: t.item() if t.numel() == 1 else t, group) for group in self.groups(s))

    def groups(self, s: int) -> tuple[dict[str, Any], ...]:
        """As :meth:`hyper`, with tensors left as they are: with numbers instead, an optimizer may round otherwise.

        Args:
            s: 1..N.

        Returns:
            One mapping a group.
        """
        self.check_step(s)
        structure = self._header(s)["groups"]
        tensors: dict[str, Tensor] = {}
        if "#tensor" in repr(structure):
            tensors = {n.removeprefix("group/"): t for n, t in self._step_tensors(s, "group/").items()}
        return tuple(self.store.unflatten(structure, tensors, self.store.step_path(s), what=f"step {s}"))

    def stepped(self, s: int) -> tuple[int, ...]:
        """Which of :attr:`optimizers` made step s; the others were idle.

        Args:
            s: 1..N.

        Returns:
            Their numbers, counted from 0.
        """
        self.check_step(s)
        return tuple(self._header(s).get("stepped", (0,)))

    def gradient_factor(self, s: int) -> float:
        """The factor (clip coefficient) that the recorder was told for step s.

        Args:
            s: 1..N.

        Returns:
            The factor, 1 where none was told.
        """
        self.check_step(s)
        return float(self._header(s)["gradient_factor"])

    def clips(self, s: int) -> tuple[tuple[Any, ...], ...]:
        """How the gradient of step s was clipped.

        Args:
            s: 1..N.

        Returns:
            In order, ``("norm", max_norm, norm_type)`` or ``("value", limit)`` each.
        """
        self.check_step(s)
        return tuple(tuple(clip) for clip in self._header(s).get("clips", ()))

    @property
    def coarse(self) -> bool:
        """Whether the model ran under autocast in some step: its samples' gradients are then coarsely rounded."""
        entries = (entry for s in self.steps for entry in self._header(s)["batches"])
        return any((entry.get("forward") or {}).get("autocast") is not None for entry in entries)

    # ------------------------------------------------------------------ batches
    def _ids(self, s: int, count: int) -> list[Tensor]:
        """The sample ids of every micro-batch of step s."""
        wanted = [{"#tensor": f"ids/{index}"} for index in range(count)]
        path, stored = self.store.step_path(s), self._step_tensors(s, "ids/")
        ids: list[Tensor] = self.store.unflatten(wanted, stored, path, what=f"step {s}")
        return ids

    def sample_ids(self, s: int) -> Tensor:
        """The samples whose gradients step s was fed, without reading anything else of its batch.

        Args:
            s: 1..N.

        Returns:
            Their ids in order: int64 ``[n]``.
        """
        self.check_step(s)
        count = len(self._header(s)["batches"])
        parts = self._ids(s, count)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def batch(self, s: int) -> Batch:
        """The batch of step s: which samples its gradient was of, with their inputs and targets.

        Args:
            s: 1..N.

        Returns:
            Its micro-batches, in order.

        Raises:
            QuestionError: there is no such step; its inputs were not stored, and there is no dataset to read them from.
            StoreError: a file is damaged; a sample that was read again is not as it was.
        """
        self.check_step(s)
        entries, micro = self._header(s)["batches"], []
        states = self._step_tensors(s, "rng/", "rows/", "draws/", "owners/", "outputs/")
        for index, (ids, entry) in enumerate(zip(self._ids(s, len(entries)), entries, strict=True)):
            rng, outputs = _under(f"rng/{index}/", states), _under(f"outputs/{index}/", states)
            owners = _under(f"owners/{index}/", states)
            check_batch(entry, ids, rng, owners, where=self.store.step_path(s), place=f"batches[{index}]")
            forward = ForwardState.stored(entry.get("forward"), rng, outputs)
            inputs, targets = self._content(s, entry, ids, states, index)
            rows = InputRows.stored(entry.get("rows"), {int(leaf): t for leaf, t in owners.items()})
            micro.append(MicroBatch(ids, inputs, targets, entry["weight"], forward, rows))
        return Batch(tuple(micro))

    def _content(
        self, s: int, entry: Mapping[str, Any], ids: Tensor, states: Mapping[str, Tensor], index: int
    ) -> tuple[Any, Any]:
        """The inputs and targets of a micro-batch, stored or read again."""
        path, what = self.store.batch_path(entry["key"]), f"the batch of step {s}"
        if entry.get("reread"):
            step = self.store.step_path(s)
            rows = self.store.unflatten({"#tensor": f"rows/{index}"}, states, step, what=f"step {s}")
            return read_again(self.dataset, ids, states.get(f"draws/{index}"), entry["key"], rows, step=s)
        stored = self.store.read_tensors(path, what=what)
        check_json(stored.header, BATCH, what=what, where=path)
        data = self.store.unflatten(stored.header, stored.tensors, path, what=what)
        return data["inputs"], data["targets"]

    # ------------------------------------------------------------------ beside the steps
    @property
    def metrics(self) -> xr.Dataset:
        """What the loop logged with ``recorder.log``: one variable a metric over ``step``, NaN where none was.

        ``attrs["lost_lines"]`` tells how many calls' numbers a loss of power took before recording went on.
        """
        lines = self.store.read_lines(LOG_NAME, expected=self._lines(), whole=self.complete)
        found = metrics_of(lines, until=len(self.steps), where=self.path / LOG_NAME)
        if lost := self.store.generations.lost_lines():
            found.attrs["lost_lines"] = lost
        return found

    def _lines(self) -> int:
        """How many lines of metrics there were at least: what was lost of a log is known."""
        if self._closed is not None:
            return int(self._closed.get("lines", 0))
        steps = len(self.steps)
        logged = int(self._header(steps).get("lines", 0)) if steps else 0
        return logged - self.store.generations.lost_lines(steps)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by what is behind it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
