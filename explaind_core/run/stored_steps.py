"""The tensors of every step: parameters, buffers, gradients, states; computed again where they were not stored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from explaind_core.errors import StoreError
from explaind_core.run.consistency import check_state
from explaind_core.run.step_records import StepRecords
from explaind_core.store import SNAPSHOT, START, StoredFile, check_json

__all__ = ["RecomputedSteps", "StoredSteps"]


class RecomputedSteps(Protocol):
    """Steps that were not stored, or their gradients, computed again."""

    def stored(self, s: int) -> StoredFile:
        """Step s as ``mode="steps"`` would have stored it.

        Args:
            s: 1..N.

        Returns:
            The header and the tensors of its file.
        """

    def gradients(self, s: int) -> dict[str, Tensor]:
        """The gradients that step s was fed.

        Args:
            s: 1..N.

        Returns:
            Parameter name -> gradient.
        """


class StoredSteps(StepRecords):
    """The steps of a run with their tensors; :class:`explaind_core.Run` adds the model and the rules to it.

    Args:
        store: where the run lies.
        until: look at the steps 1..until only; None for all, ``"intact"`` for those before the first damage.
        damaged: read all that is intact.
        dataset: where inputs that were not stored are read again.
    """

    @cached_property
    def _recomputed(self) -> RecomputedSteps:
        raise NotImplementedError  # takes the model

    # ------------------------------------------------------------------ where the tensors are
    @cached_property
    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """What the tensors of steps must be, by their names in a file."""
        kinds = {"theta": True, "evaluated": True, "gradient": False}
        return {
            f"{kind}/{name}": (tuple(info.shape), info.dtype if same else None)
            for kind, same in kinds.items()
            for name, info in self.parameters.items()
        }

    def _step(self, s: int, *only: str) -> StoredFile:
        """Step s, computed again where it was not stored; at least the tensors whose names start as ``only`` says."""
        if self.mode == "snapshots":
            return self._recomputed.stored(s)
        return self.store.read_tensors(self.store.step_path(s), what=f"step {s}", only=only, shapes=self._shapes)

    def _after(self, s: int, *only: str) -> Mapping[str, Tensor]:
        """The tensors that hold theta and the buffers after step s; of a snapshot without computing anything."""
        if self.mode == "snapshots" and s in self._kept:
            path = self.store.snapshot_path(s)
            what = f"the snapshot after step {s}"
            return self.store.read_tensors(path, what=what, only=only, shapes=self._shapes).tensors
        return self._step(s, *only).tensors

    def start_tensors(self, prefix: str) -> dict[str, Tensor]:
        """What was stored before step 1.

        Args:
            prefix: how the names of the tensors begin: ``theta/``, ``buffer/``.

        Returns:
            Name behind the prefix -> tensor.

        Raises:
            StoreError: the start of the run is damaged.
        """
        path, what = self.store.start_path, "the start of the run"
        tensors = self.store.read_tensors(path, what=what, only=prefix, shapes=self._shapes).tensors
        return {n.removeprefix(prefix): t for n, t in tensors.items()}

    # ------------------------------------------------------------------ parameters
    def theta(self, s: int, *, point: str | None = None) -> dict[str, Tensor]:
        """The parameters after step s; ``theta(0)`` is the initialisation.

        Args:
            s: 0..N.
            point: ``"gradient"`` or ``"evaluated"``, the run's own by default.

        Returns:
            Parameter name -> tensor, each with its own storage.

        Raises:
            QuestionError: there is no such step, or no such point.
            StoreError: a file is damaged, or does not fit the manifest.
        """
        self.check_step(s, first=0)
        evaluated = (self.point if point is None else self._check_point(point)) == "evaluated"
        if s == 0:
            start = self.start_tensors("theta/") | (self.start_tensors("evaluated/") if evaluated else {})
            return self._shaped({n: start[n] for n in self.parameters if n in start}, "theta(0)")
        stored = self._after(s, "theta/", *(["evaluated/"] if evaluated else []))
        found = {n: stored[f"theta/{n}"] for n in self.parameters if f"theta/{n}" in stored}
        if evaluated:
            found |= {n: stored[f"evaluated/{n}"] for n in self.parameters if f"evaluated/{n}" in stored}
        if len(found) < len(self.parameters):  # the others were never trained up to here
            found = self.start_tensors("theta/") | found
        return self._shaped({n: found[n] for n in self.parameters if n in found}, f"theta({s})")

    def _shaped(self, found: dict[str, Tensor], what: str) -> dict[str, Tensor]:
        """``found``, if these are tensors of all of the run's parameters."""
        for name, info in self.parameters.items():
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

    def trained_until(self, snapshot: int) -> list[str]:
        """The parameters that had been in the optimizer's groups by then, of a run that keeps snapshots.

        Args:
            snapshot: one of :meth:`snapshots`.

        Returns:
            Their names.

        Raises:
            StoreError: the snapshot is missing or damaged.
        """
        if snapshot == 0:
            return []
        path = self.store.snapshot_path(snapshot)
        what = f"the snapshot after step {snapshot}"
        header = self.store.read_header(path, what=what)
        check_json(header, SNAPSHOT | {"trained": [str]}, what=what, where=path)
        names: list[str] = header["trained"]
        return names

    # ------------------------------------------------------------------ buffers
    def buffers(self, s: int | None = None, *, changed: bool = False) -> dict[str, Tensor]:
        """The model's buffers after step s, such as running statistics.

        Args:
            s: 0..N, the last step by default.
            changed: only those that changed in steps 1..s.

        Returns:
            Buffer name -> tensor.

        Raises:
            QuestionError: there is no such step.
            StoreError: a file is damaged.
        """
        s = len(self.steps) if s is None else self.check_step(s, first=0)
        start = {} if changed else self.start_tensors("buffer/")
        if s == 0:
            return start
        stored = self._after(s, "buffer/")
        return start | {n.removeprefix("buffer/"): t for n, t in stored.items() if n.startswith("buffer/")}

    def buffers_before(self, s: int) -> dict[str, Tensor]:
        """The buffers that something outside the training step changed between step s - 1 and the pass of step s.

        Args:
            s: 1..N.

        Returns:
            Buffer name -> what it was changed to.
        """
        names = self.step_header(s).get("buffers_before", ())
        path = self.store.step_path(s)
        return {n: self.store.read_tensor(path, f"before/{n}", what=f"step {s}") for n in names}

    @cached_property
    def moving_buffers(self) -> tuple[str, ...]:
        """The floating-point buffers that changed in some step, such as running statistics."""
        if not self.steps:
            return ()
        moved = self.buffers(len(self.steps), changed=True)
        return tuple(n for n, b in moved.items() if b.is_floating_point())

    # ------------------------------------------------------------------ what the optimizer was fed
    def gradients(self, s: int) -> dict[str, Tensor]:
        """The gradients that step s was fed.

        Args:
            s: 1..N.

        Returns:
            Parameter name -> gradient, in the order of ``parameters``; one without a gradient is left out.

        Raises:
            QuestionError: there is no such step; it is to be computed again, and the model or the loss is missing.
            StoreError: a file is damaged; computed again, the step is not the one that was recorded.
        """
        self.check_step(s)
        if self.mode == "parameters":
            computed = self._recomputed.gradients(s)
            return {n: computed[n].cpu().clone() for n in self.parameters if n in computed}
        stored = self._step(s, "gradient/", "sparse_").tensors
        found = {}
        for name, info in self.parameters.items():
            if f"gradient/{name}" in stored:
                found[name] = stored[f"gradient/{name}"]
            elif f"sparse_indices/{name}" in stored and f"sparse_values/{name}" in stored:
                indices, values = stored[f"sparse_indices/{name}"], stored[f"sparse_values/{name}"]
                try:
                    found[name] = torch.sparse_coo_tensor(indices, values, info.shape, check_invariants=True)
                except (RuntimeError, TypeError, ValueError) as error:
                    raise StoreError(
                        f"the sparse gradient of step {s} does not fit the manifest: {error}",
                        where=f"{self.store.step_path(s)}, parameter {name!r}",
                        expected=f"a gradient of the shape {tuple(info.shape)}",
                    ) from error
        return found

    def closure_calls(self, s: int) -> tuple[tuple[float, dict[str, Tensor]], ...]:
        """What ``step(closure)`` was told in step s, call by call.

        Recorded only for optimizers that iterate inside a step.

        Args:
            s: 1..N.

        Returns:
            (loss, gradients by parameter name) each; empty for all other optimizers, whose one gradient
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
        """The optimizer's state entries that gradients alone do not give, as step s changed them.

        Args:
            s: 1..N.

        Returns:
            Parameter name -> entry -> tensor.
        """
        self.check_step(s)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._step_tensors(s, "outside/").items():
            entry, _, name = key.removeprefix("outside/").partition("/")
            found.setdefault(name, {})[entry] = tensor
        return found

    # ------------------------------------------------------------------ the optimizer's state
    def optimizer_state(self, s: int = 0) -> dict[str, dict[str, Any]]:
        """The optimizer's state as it was kept.

        Args:
            s: 0 for the start, or one of :meth:`snapshots`.

        Returns:
            Parameter name -> its entries.

        Raises:
            StoreError: the file is missing or damaged.
        """
        path = self.store.start_path if s == 0 else self.store.snapshot_path(s)
        what = f"the optimizer's state after step {s}"
        stored = self.store.read_tensors(path, what=what, only="state/")
        check_json(stored.header, START if s == 0 else SNAPSHOT, what=what, where=path)
        tensors = {n.removeprefix("state/"): t for n, t in stored.tensors.items()}
        state: dict[str, dict[str, Any]] = self.store.unflatten(stored.header["state"], tensors, path, what=what)
        check_state(state, self.parameters, what=what, where=path)
        return state

    def snapshots(self) -> list[int]:
        """The steps after which the optimizer's state was kept.

        Returns:
            Their numbers in order; 0, the start, is the first.

        Raises:
            StoreError: the file of one is missing, unless the run was opened with ``damaged=True``.
        """
        found = self.store.found_snapshots()
        for s in set(self._closed.get("snapshots", ())) - set(found) if self._closed and not self._damaged else ():
            self.store.check_file(self.store.snapshot_path(s), what=f"the snapshot after step {s}")
        begun = {entry["after"] for entry in self.store.generations.begun}
        kept = [s for s in found if s <= len(self.steps)]
        # The last ones may never have been synced; an earlier one will do, but where recording went on.
        return [0, *(s for s in kept if self._closed is not None or self._damaged or s in begun or self._is_whole(s))]

    def _is_whole(self, snapshot: int) -> bool:
        try:
            self.store.check_file(self.store.snapshot_path(snapshot), what=f"the snapshot after step {snapshot}")
        except StoreError as error:
            if isinstance(error.__cause__, OSError):  # nobody knows
                raise
            return False
        return True

    @cached_property
    def _kept(self) -> frozenset[int]:
        return frozenset(self.snapshots()) - {0}
