"""The recorded steps of a run, read lazily from their files, or computed again where they were not stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import xarray as xr
from torch import Tensor

from explaind_core import trees
from explaind_core.data import IndexedDataset
from explaind_core.errors import QuestionError, StoreError
from explaind_core.store import COUNT, DTYPES, STEP, RunStore, StoredFile, mismatch
from explaind_core.training_step import Batch, ForwardState, MicroBatch, ParameterInfo, read_again

__all__ = ["RecomputedSteps", "StoredSteps"]


class RecomputedSteps(Protocol):
    """Steps that were not stored, or their gradients, computed again."""

    def stored(self, s: int) -> StoredFile:
        """Step s as ``mode="steps"`` would have stored it."""

    def gradients(self, s: int) -> dict[str, Tensor]:
        """The gradients that step s was fed."""


class StoredSteps:
    """What was stored of a run, step by step; :class:`explaind_core.Run` adds the model and the rules to it.

    Args:
        store: where it lies. until: look at the steps 1..until only. damaged: read all that is intact.
        dataset: where inputs that were not stored are read again.
    """

    def __init__(self, store: RunStore, *, until: int | None, damaged: bool, dataset: IndexedDataset | None) -> None:
        self.store, self.dataset, self._damaged = store, dataset, damaged
        self.manifest = store.read_manifest(damaged=damaged)
        self.mode: str = self.manifest.get("mode", "steps")
        self.point = "gradient"
        self.parameters: Mapping[str, ParameterInfo] = {
            p["name"]: ParameterInfo(torch.Size(p["shape"]), self._dtype(p["dtype"]), p["trained"])
            for p in self.manifest["parameters"]
        }
        if not damaged:
            store.check_file(store.start_path, what="the start of the run")
        self.steps = range(1, store.count_steps(until=until, damaged=damaged) + 1)
        self._closed = store.closed(damaged=damaged)
        self.complete = self._closed is not None
        self._header = lru_cache(maxsize=4096)(self._read_header)

    @cached_property
    def _recomputed(self) -> RecomputedSteps:
        raise NotImplementedError  # takes the model

    @property
    def bytes(self) -> int:
        """The size of all files of the run on disk."""
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

    def check_step(self, s: int, *, first: int = 1) -> int:
        """``s``, if it is a recorded step (QuestionError otherwise)."""
        if not isinstance(s, int) or not first <= s <= len(self.steps):
            raise QuestionError(
                f"the run has no step {s!r}", where=self.path, expected=f"{first} <= step <= {len(self.steps)}", got=s
            )
        return s

    def _read_header(self, s: int) -> dict[str, Any]:
        header: dict[str, Any] = self.store.read_header(self.store.step_path(s), what=f"step {s}")
        words = mismatch(header, STEP)
        if words:
            raise StoreError(f"the header of step {s} is not as it must be: {words}", where=self.store.step_path(s))
        return header

    def step_header(self, s: int) -> Mapping[str, Any]:
        """What was stored of step s as JSON."""
        header: Mapping[str, Any] = self._header(self.check_step(s))
        return header

    def _step(self, s: int, *only: str) -> StoredFile:
        """Step s, computed again where it was not stored; at least the tensors whose names start as ``only`` says."""
        if self.mode == "snapshots":
            return self._recomputed.stored(s)
        return self.store.read_tensors(self.store.step_path(s), what=f"step {s}", only=only)

    def _step_tensors(self, s: int, *prefixes: str) -> dict[str, Tensor]:
        """The tensors in the file of step s whose names start like this; only these are read."""
        path = self.store.step_path(s)
        return self.store.read_tensors(path, what=f"step {s}", only=prefixes).tensors

    def _after(self, s: int, *only: str) -> Mapping[str, Tensor]:
        """The tensors that hold theta and the buffers after step s; of a snapshot without computing anything."""
        if self.mode == "snapshots" and s in self._kept:
            path = self.store.snapshot_path(s)
            return self.store.read_tensors(path, what=f"the snapshot after step {s}", only=only).tensors
        return self._step(s, *only).tensors

    @cached_property
    def _kept(self) -> frozenset[int]:
        return frozenset(self.snapshots()) - {0}

    def trained_until(self, snapshot: int) -> list[str]:
        """The parameters that had been in the optimizer's groups by then, of a run that keeps snapshots."""
        if snapshot == 0:
            return []
        path = self.store.snapshot_path(snapshot)
        names: list[str] = self.store.read_header(path, what=f"the snapshot after step {snapshot}")["trained"]
        return names

    def theta(self, s: int, *, point: str | None = None) -> dict[str, Tensor]:
        """The parameters after step s; ``theta(0)`` is the initialisation. Every tensor has its own storage.

        Args:
            s: 0..N. point: ``"gradient"`` or ``"evaluated"``, the run's own by default.
        """
        self.check_step(s, first=0)
        evaluated = (self.point if point is None else self._check_point(point)) == "evaluated"
        if s == 0:
            start = self.start_tensors("theta/") | (self.start_tensors("evaluated/") if evaluated else {})
            return self._shaped({n: start[n] for n in self.parameters if n in start}, "theta(0)", all_of_them=True)
        stored = self._after(s, "theta/", *(["evaluated/"] if evaluated else []))
        found = {n: stored[f"theta/{n}"] for n in self.parameters if f"theta/{n}" in stored}
        if evaluated:
            found |= {n: stored[f"evaluated/{n}"] for n in self.parameters if f"evaluated/{n}" in stored}
        if len(found) < len(self.parameters):  # the others were never trained up to here
            found = self.start_tensors("theta/") | found
        return self._shaped({n: found[n] for n in self.parameters if n in found}, f"theta({s})", all_of_them=True)

    def _shaped(self, found: dict[str, Tensor], what: str, *, all_of_them: bool = False) -> dict[str, Tensor]:
        """``found``, if these are tensors of the run's parameters."""
        for name in self.parameters if all_of_them else found:
            info = self.parameters[name]
            expected, got = (info.shape, info.dtype), (found[name].shape, found[name].dtype) if name in found else None
            if expected != got:
                raise StoreError(
                    f"{what} does not fit the manifest",
                    where=f"{self.path}, parameter {name!r}",
                    expected=expected,
                    got=got or "no such tensor",
                    remedy="do not use this store: it was not written by explaind",
                )
        return found

    def start_tensors(self, prefix: str) -> dict[str, Tensor]:
        """What was stored before step 1 under names that begin with ``prefix``: ``theta/``, ``buffer/``."""
        tensors = self.store.read_tensors(self.store.start_path, what="the start of the run", only=prefix).tensors
        return {n.removeprefix(prefix): t for n, t in tensors.items()}

    def buffers(self, s: int | None = None, *, changed: bool = False) -> dict[str, Tensor]:
        """The model's buffers after step s (the last one by default), such as running statistics.

        Args:
            changed: only those that changed in steps 1..s.
        """
        s = len(self.steps) if s is None else self.check_step(s, first=0)
        start = {} if changed else self.start_tensors("buffer/")
        if s == 0:
            return start
        stored = self._after(s, "buffer/")
        return start | {n.removeprefix("buffer/"): t for n, t in stored.items() if n.startswith("buffer/")}

    def hyper(self, s: int) -> tuple[dict[str, Any], ...]:
        """Each parameter group's hyper-parameters as they stood before step s; ``params`` holds its names.

        In a run of several optimizers the groups of all, with ``optimizer``, the number of their own, counted from 0.
        One-element tensors (a learning rate kept as a tensor) are returned as numbers.
        """
        return tuple(trees.map_tensors(lambda t: t.item() if t.numel() == 1 else t, group) for group in self.groups(s))

    def groups(self, s: int) -> tuple[dict[str, Any], ...]:
        """As :meth:`hyper`, with tensors left as they are: with numbers instead, an optimizer may round otherwise."""
        self.check_step(s)
        structure = self._header(s)["groups"]
        tensors: dict[str, Tensor] = {}
        if "#tensor" in repr(structure):
            tensors = {n.removeprefix("group/"): t for n, t in self._step_tensors(s, "group/").items()}
        return tuple(self.store.unflatten(structure, tensors, self.store.step_path(s), what=f"step {s}"))

    def gradients(self, s: int) -> dict[str, Tensor]:
        """The gradients that step s was fed, in the order of ``parameters``; one without a gradient is left out."""
        self.check_step(s)
        if self.mode == "parameters":
            computed = self._recomputed.gradients(s)
            return {n: computed[n].cpu().clone() for n in self.parameters if n in computed}
        stored = self._step(s, "gradient/", "sparse_").tensors
        found = {}
        for name, info in self.parameters.items():
            if f"gradient/{name}" in stored:
                found[name] = stored[f"gradient/{name}"]
            elif f"sparse_indices/{name}" in stored:
                indices, values = stored[f"sparse_indices/{name}"], stored[f"sparse_values/{name}"]
                found[name] = torch.sparse_coo_tensor(indices, values, info.shape, check_invariants=True)
        return found

    def stepped(self, s: int) -> tuple[int, ...]:
        """Which of :attr:`optimizers` made step s; the others were idle."""
        self.check_step(s)
        return tuple(self._header(s).get("stepped", (0,)))

    def closure_calls(self, s: int) -> tuple[tuple[float, dict[str, Tensor]], ...]:
        """What ``step(closure)`` was told in step s, call by call: (loss, gradients by parameter name).

        Recorded only for optimizers that iterate inside a step; empty for all others, whose one gradient
        :meth:`gradients` returns.
        """
        self.check_step(s)
        losses = self._header(s).get("closure_losses", [])
        stored = self._step_tensors(s, "closure/") if losses else {}
        calls = []
        for k, loss in enumerate(losses):
            prefix = f"closure/{k}/"
            found = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
            calls.append((float(loss), self.gradients(s) if k == 0 else found))
        return tuple(calls)

    def outside(self, s: int) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state entries that gradients alone do not give, as step s changed them, by parameter name."""
        self.check_step(s)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._step_tensors(s, "outside/").items():
            _, entry, name = key.split("/", 2)
            found.setdefault(name, {})[entry] = tensor
        return found

    def buffers_before(self, s: int) -> dict[str, Tensor]:
        """The buffers that something outside the training step changed between step s - 1 and the pass of step s."""
        names = self.step_header(s).get("buffers_before", ())
        path = self.store.step_path(s)
        return {n: self.store.read_tensor(path, f"before/{n}", what=f"step {s}") for n in names}

    def gradient_factor(self, s: int) -> float:
        """The factor (clip coefficient) that the recorder was told for step s, 1 if none."""
        self.check_step(s)
        return float(self._header(s)["gradient_factor"])

    def clips(self, s: int) -> tuple[tuple[Any, ...], ...]:
        """How the gradient of step s was clipped, in order: ``("norm", max_norm, norm_type)``, ``("value", limit)``."""
        self.check_step(s)
        return tuple(tuple(clip) for clip in self._header(s).get("clips", ()))

    @cached_property
    def moving_buffers(self) -> tuple[str, ...]:
        """The floating-point buffers that changed in some step, such as running statistics."""
        if not self.steps:
            return ()
        moved = self.buffers(len(self.steps), changed=True)
        return tuple(n for n, b in moved.items() if b.is_floating_point())

    @property
    def coarse(self) -> bool:
        """Whether the model ran under autocast in some step: its samples' gradients are then coarsely rounded."""
        entries = (entry for s in self.steps for entry in self._header(s)["batches"])
        return any((entry.get("forward") or {}).get("autocast") is not None for entry in entries)

    def _ids(self, s: int, count: int) -> list[Tensor]:
        """The sample ids of every micro-batch of step s."""
        wanted = [{"#tensor": f"ids/{index}"} for index in range(count)]
        path, stored = self.store.step_path(s), self._step_tensors(s, "ids/")
        ids: list[Tensor] = self.store.unflatten(wanted, stored, path, what=f"step {s}")
        return ids

    def sample_ids(self, s: int) -> Tensor:
        """The ids of the samples whose gradients step s was fed, in order, without reading anything else."""
        self.check_step(s)
        count = len(self._header(s)["batches"])
        parts = self._ids(s, count)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def batch(self, s: int) -> Batch:
        """The batch of step s: which samples its gradient was of, with their inputs and targets."""
        self.check_step(s)
        entries, micro = self._header(s)["batches"], []
        states = self._step_tensors(s, "rng/", "rows/", "draws/")
        for index, (ids, entry) in enumerate(zip(self._ids(s, len(entries)), entries, strict=True)):
            prefix = f"rng/{index}/"
            rng = {n.removeprefix(prefix): t for n, t in states.items() if n.startswith(prefix)}
            forward = ForwardState.stored(entry.get("forward"), rng)
            inputs, targets = self._content(s, entry, ids, states, index)
            micro.append(MicroBatch(ids, inputs, targets, entry["weight"], forward))
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
        data = self.store.unflatten(stored.header, stored.tensors, path, what=what)
        return data["inputs"], data["targets"]

    # ------------------------------------------------------------------ beside the steps
    @property
    def metrics(self) -> xr.Dataset:
        """What the loop logged with ``recorder.log``: one variable a metric over ``step``, NaN where none was."""
        rows: dict[int, dict[str, float]] = {}
        lines = self.store.read_lines("metrics.jsonl", expected=self._lines(), whole=self.complete)
        for number, entry in enumerate(lines, 1):
            words = mismatch(entry, {"step": COUNT}) or mismatch(list(entry.values()), [(int, float)])
            if words:
                where = f"{self.path / 'metrics.jsonl'}, line {number}"
                raise StoreError(f"a line of metrics.jsonl is not as it must be: {words}", where=where)
            if entry["step"] <= len(self.steps):
                rows.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if k != "step"})
        steps = sorted(rows)
        names = dict.fromkeys(name for row in rows.values() for name in row)
        columns = {name: ("step", [rows[s].get(name, float("nan")) for s in steps]) for name in names}
        return xr.Dataset(columns, coords={"step": steps})

    def _lines(self) -> int:
        """How many lines of metrics there were at least: what was lost of a log is known."""
        if self._closed is not None:
            return int(self._closed.get("lines", 0))
        return int(self._header(len(self.steps)).get("lines", 0)) if self.steps else 0

    def optimizer_state(self, s: int = 0) -> dict[str, dict[str, Any]]:
        """The optimizer's state by parameter name as it was kept: at the start (0) or a snapshot after step s."""
        path = self.store.start_path if s == 0 else self.store.snapshot_path(s)
        what = f"the optimizer's state after step {s}"
        stored = self.store.read_tensors(path, what=what, only="state/")
        tensors = {n.removeprefix("state/"): t for n, t in stored.tensors.items()}
        state: dict[str, dict[str, Any]] = self.store.unflatten(stored.header["state"], tensors, path, what=what)
        return state

    def snapshots(self) -> list[int]:
        """The steps after which the optimizer's state was kept, 0 (the start) first.

        Raises:
            StoreError: the file of one is missing, unless the run was opened with ``damaged=True``.
        """
        found = self.store.found_snapshots()
        for s in set(self._closed.get("snapshots", ())) - set(found) if self._closed and not self._damaged else ():
            self.store.check_file(self.store.snapshot_path(s), what=f"the snapshot after step {s}")
        return [0, *(s for s in found if s <= len(self.steps))]
