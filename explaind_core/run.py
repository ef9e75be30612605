"""A recorded run, read lazily: parameters, hyper-parameters and batches of every step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from explaind_core import trees
from explaind_core.coefficients import UpdateRule, qualified_name
from explaind_core.data import IndexedDataset
from explaind_core.errors import QuestionError, StoreError
from explaind_core.forwards import ForwardState
from explaind_core.joint import JOINED_BY, OWNER, JointRule, each_optimizer, each_rule
from explaind_core.losses import LossFunction, rebuild_loss
from explaind_core.plain import plain_copy, plain_name
from explaind_core.plugins import Registry, default_registry
from explaind_core.provenance import RunDescription
from explaind_core.queued import settle
from explaind_core.rereading import read_again
from explaind_core.schema import COUNT, STEP, mismatch
from explaind_core.store import RunStore, StoredFile
from explaind_core.tensorfile import DTYPES

if TYPE_CHECKING:  # later stages, which need a Run
    from explaind_core.recipes import GradientFunction
    from explaind_core.rerun import Rerun

__all__ = ["Batch", "MicroBatch", "ParameterInfo", "Run", "open_run"]

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the model: its shape, its dtype, and whether the optimizer trained it at the start."""

    shape: torch.Size
    dtype: torch.dtype
    trained: bool


@dataclass(frozen=True)
class MicroBatch:
    """One declared batch: ids int64 ``[n]``, inputs and targets as declared, and its loss weight.

    ``forward`` tells how the model stood when it was passed through; None where no pass was seen.
    """

    ids: Tensor
    inputs: Any
    targets: Any
    weight: float
    forward: ForwardState | None = None


@dataclass(frozen=True)
class Batch:
    """All micro-batches whose gradients one step was fed."""

    micro: tuple[MicroBatch, ...]

    @property
    def ids(self) -> Tensor:
        """The ids of all its samples, in order; a sample that stands twice appears twice."""
        return torch.cat([m.ids for m in self.micro])

    def _only(self) -> MicroBatch:
        if len(self.micro) != 1:
            raise QuestionError(
                f"this step has {len(self.micro)} micro-batches", remedy="loop over .micro: each has inputs and targets"
            )
        return self.micro[0]

    @property
    def inputs(self) -> Any:
        """The inputs, where the step has one micro-batch."""
        return self._only().inputs

    @property
    def targets(self) -> Any:
        """The targets, where the step has one micro-batch."""
        return self._only().targets


class Run:
    """A recorded run, read-only; nothing is read before it is asked for. Open one with :func:`open_run`.

    Attributes:
        steps: ``range(1, N + 1)``.
        parameters: name -> :class:`ParameterInfo`.
        model: a private copy of the architecture in evaluation mode, None if none was given.
        loss: the recorded loss if it is one of torch's own or was given, None otherwise.
        complete: whether the recording ended in order.
        mode: what was stored: ``"steps"``, ``"parameters"`` or ``"snapshots"``; the rest is computed again.
        rule: the rule that was given, or inferred; None where the registered one explains the run.
        penalty: the term of the loss that depends on the parameters alone, None without.
        dataset: where batches that were not stored are read again, None without.
        point: which parameters ``theta`` returns: ``"gradient"`` or ``"evaluated"`` (see :func:`open_run`).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        loss: LossFunction | None = None,
        make_optimizer: OptimizerFactory | Sequence[OptimizerFactory | None] | None = None,
        until: int | None = None,
        point: str = "gradient",
        rule: UpdateRule | Sequence[UpdateRule | None] | None = None,
        registry: Registry | None = None,
        gradient: GradientFunction | None = None,
        penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        damaged: bool = False,
        dataset: IndexedDataset | None = None,
    ) -> None:
        self.penalty, self.dataset = penalty, dataset
        settle(path)
        self.store = RunStore(path)
        self.manifest = self.store.read_manifest(damaged=damaged)
        self.rule = self._rule(rule)
        self.point = self._check_point(point)
        self.registry = registry or default_registry()
        self.optimizer_makers = self._makers(make_optimizer)
        self.parameters: Mapping[str, ParameterInfo] = {
            p["name"]: ParameterInfo(torch.Size(p["shape"]), self._dtype(p["dtype"]), p["trained"])
            for p in self.manifest["parameters"]
        }
        if not damaged:
            self.store.check_file(self.store.start_path, what="the start of the run")
        recorded = self.store.count_steps(until=until, damaged=damaged)
        self.steps = range(1, recorded + 1)
        self._closed, self._damaged = self.store.closed(damaged=damaged), damaged
        self.complete = self._closed is not None
        self.model = None if model is None else self._check_model(model)
        self.loss = loss if loss is not None else rebuild_loss(self.manifest["loss"])
        self.mode: str = self.manifest.get("mode", "steps")
        self._gradient = gradient
        #: As it was given: of a run that is computed again, not even an evaluation mode may be set for good.
        self._architecture = None if model is None or self.mode == "steps" else plain_copy(model)
        #: In which mode the model's gradients are the recorded ones, as far as is known.
        self.trains_in_training_mode = True
        self._models: dict[bool, nn.Module] = {}
        self._header = lru_cache(maxsize=4096)(self._read_header)

    def __repr__(self) -> str:
        return (
            f"Run({str(self.path)!r}: {len(self.steps)} steps of {self.manifest['optimizer']} on "
            f"{sum(p.shape.numel() for p in self.parameters.values()):,} parameters"
            f"{f', explained by {self.rule}' if self.rule is not None and self.rule.inferred else ''})"
        )

    @property
    def optimizers(self) -> tuple[Mapping[str, Any], ...]:
        """Each optimizer as the manifest has it, one for most runs.

        ``optimizer`` is the name of its class, ``optimizer_defaults`` are those of its options, ``rule`` is its rule.
        """
        return tuple(self.manifest.get("optimizers", (self.manifest,)))

    @property
    def given_rules(self) -> list[UpdateRule | None]:
        """The rule that explains each of :attr:`optimizers`; None where that is the registered one."""
        several = isinstance(self.rule, JointRule)
        return each_rule(self.rule, len(self.optimizers)) if several else [self.rule] * len(self.optimizers)

    def _rule(self, rule: UpdateRule | Sequence[UpdateRule | None] | None) -> UpdateRule | None:
        """The rule, or the rules as one, that were given, or inferred; None where all are the registered ones."""
        count = len(self.optimizers)
        if isinstance(rule, UpdateRule):
            return rule
        rules = [self._inferred_rule(o["rule"]) for o in self.optimizers] if rule is None else each_rule(rule, count)
        if all(each is None for each in rules):
            return None
        return rules[0] if count == 1 else JointRule(rules)

    def _makers(
        self, make: OptimizerFactory | Sequence[OptimizerFactory | None] | None
    ) -> Sequence[OptimizerFactory | None]:
        count = len(self.optimizers)
        if make is None:
            return [None] * count
        makers = list(make) if isinstance(make, Sequence) else [make]
        if len(makers) != count:
            raise QuestionError(
                "there is not one maker for each optimizer",
                where="make_optimizer",
                expected=f"a list of {count} functions, for {self.manifest['optimizer']}"
                if count > 1
                else "a function",
                got=f"{len(makers)} of them",
                remedy="pass None for an optimizer that needs none",
            )
        return makers

    def _inferred_rule(self, recorded: Mapping[str, Any]) -> UpdateRule | None:
        """The inferred rule that the run was recorded with: nothing but its numbers is needed to make it again."""
        if not recorded.get("inferred"):
            return None
        from explaind_core.inferred import InferredRule  # a later stage, which needs a Run to be fitted

        try:
            return InferredRule(**recorded["settings"])
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"the settings of the run's inferred rule cannot be read: {error}",
                where=self.path / "manifest.json",
                expected="the arguments of explaind.InferredRule",
                got=recorded.get("settings"),
                remedy="pass open_run(..., rule=explaind.InferredRule(...))",
            ) from error

    @property
    def rule_name(self) -> str:
        """The qualified name of the rule that explains the run."""
        recorded: str = self.manifest["rule"]["name"]
        if self.rule is None:
            return recorded
        if not isinstance(self.rule, JointRule):
            return qualified_name(type(self.rule))
        names = [o["rule"]["name"] for o in self.optimizers]
        given = self.given_rules
        return JOINED_BY.join(n if r is None else qualified_name(type(r)) for n, r in zip(names, given, strict=True))

    @property
    def inferred(self) -> bool:
        """Whether the rule is inferred: a guess that is closed by secants, not a declaration."""
        return self.rule is not None and self.rule.inferred

    @property
    def closed_by_secant(self) -> bool:
        """Whether steps are closed by rank-one secants, whose size results then carry as ``correction``."""
        return any(
            bool(recorded["rule"].get("closed_by_secant")) if rule is None else rule.closed_by_secant
            for rule, recorded in zip(self.given_rules, self.optimizers, strict=True)
        )

    def explained_by(self, rule: UpdateRule) -> Run:
        """The same run, explained by another rule."""
        other = copy.copy(self)
        other.rule = rule
        return other

    @property
    def path(self) -> Path:
        """Where the run lies."""
        return self.store.path

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

    def _check_model(self, model: nn.Module) -> nn.Module:
        given = {plain_name(n): (tuple(p.shape), str(p.dtype)) for n, p in model.named_parameters()}
        recorded = {n: (tuple(p.shape), str(p.dtype)) for n, p in self.parameters.items()}
        if given != recorded:
            differing = [n for n in [*recorded, *given] if recorded.get(n) != given.get(n)]
            name = differing[0]
            raise StoreError(
                f"the run was recorded with another model: {len(set(differing))} parameters differ",
                where=f"{self.path}, parameter {name!r}",
                expected=recorded.get(name, "no such parameter"),
                got=given.get(name, "no such parameter"),
                remedy=f"build the architecture that was recorded ({self.manifest['model']})",
            )
        private = plain_copy(model).eval().requires_grad_(False)
        for module in private.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = False  # how a gradient is laid out, not what it is: dense ones can be batched
            if isinstance(module, _BatchNorm):
                module.track_running_stats = False  # training: outputs are the same, and no buffer is written to
        return private

    def model_in(self, training: bool) -> nn.Module:
        """A private copy of the architecture in training or in evaluation mode."""
        if self.model is None:
            raise QuestionError(
                "the run was opened without its model", where=self.path, remedy="open_run(path, model=model)"
            )
        if training not in self._models:
            self._models[training] = copy.deepcopy(self.model).train(training)
        return self._models[training]

    # ------------------------------------------------------------------ one step
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

    @cached_property
    def _rerun(self) -> Rerun:
        from explaind_core.rerun import Rerun  # the next stage, borrowed: it needs a Run

        return Rerun(self, self._architecture, self.loss, self._gradient)

    def _step(self, s: int, *only: str) -> StoredFile:
        """Step s, computed again where it was not stored; at least the tensors whose names start as ``only`` says."""
        if self.mode == "snapshots":
            return self._rerun.stored(s)
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

    def close(self) -> None:
        """Delete what was kept on disk of steps that were computed again. The run can be read on."""
        if "_rerun" in self.__dict__:
            self._rerun.close()

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
            computed = self._rerun.gradients(s)
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

    # ------------------------------------------------------------------ the whole run
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

    @property
    def bytes(self) -> int:
        """The size of all files of the run on disk."""
        return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())

    @property
    def description(self) -> RunDescription:
        """What the run says of itself: classes, hyper-parameters, versions, seed, commit, data; prints as a table."""
        return RunDescription.of(self)

    def check_files(self, *, progress: bool = True) -> tuple[StoreError, ...]:
        """Read every file of the run and compare it with its checksums: what is damaged or missing, an error each."""
        return self.store.check_all(progress=progress)

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        s: int | None = None,
    ) -> int:
        """Put a model and an optimizer where step s (the last by default) left them, to train on from there.

        The optimizer's state is replayed from the nearest snapshot with the recorded gradients, and so are the
        counters that some optimizers keep in their groups; options, such as a learning rate, are the loop's business.

        Args:
            model: the architecture. optimizer: one, or the list of several as it was given to the Recorder.
            s: the step.

        Returns:
            s.

        Raises:
            QuestionError: not as many optimizers as were recorded; a parameter whose state was recorded with one of
                several is in none of that one's groups.
        """
        from explaind_core.replay import Replay  # the next stage, borrowed: replay needs a Run

        s = len(self.steps) if s is None else self.check_step(s, first=0)
        optimizers = each_optimizer(optimizer)
        if len(optimizers) != len(self.optimizers):
            raise QuestionError(
                "the run was recorded with another number of optimizers",
                where=self.path,
                expected=f"{len(self.optimizers)}: {self.manifest['optimizer']}",
                got=len(optimizers),
            )
        # A run that was killed before its first step has nothing to replay, and the state that it began with.
        replay = Replay(self) if self.steps else None
        state = self.optimizer_state(0) if replay is None else replay.state_after(s)
        theta, buffers = self.theta(s, point="gradient"), self.buffers(s)
        named = {plain_name(n): p for n, p in model.named_parameters()}
        self._check_model(model)
        owners = {id(p): k for k, o in enumerate(optimizers) for group in o.param_groups for p in group["params"]}
        if len(optimizers) > 1 and self.steps:
            self._check_owners(s, optimizers, {n: owners.get(id(p)) for n, p in named.items()})
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(theta[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[plain_name(name)])
        for each in optimizers:
            each.state.clear()  # a parameter without recorded state has none
        for name, entries in state.items():
            optimizers[owners[id(named[name])] if len(optimizers) > 1 else 0].state[named[name]] = entries
        for each, counted in zip(optimizers, replay.counters() if replay else [()] * len(optimizers), strict=True):
            for group, counters in zip(each.param_groups, counted, strict=False):
                group.update(counters)
        return s

    def _check_owners(
        self, s: int, optimizers: Sequence[torch.optim.Optimizer], given: Mapping[str, int | None]
    ) -> None:
        """Refuse optimizers that are not the recorded ones in their order, with the parameters that each trained."""
        kinds = JOINED_BY.join(qualified_name(type(optimizer)) for optimizer in optimizers)
        recorded = {name: group[OWNER] for group in self.groups(max(s, 1)) for name in group["params"]}
        for name, owner in recorded.items():
            if kinds != self.manifest["optimizer"] or given[name] != owner:
                raise QuestionError(
                    "these are not the optimizers that the run was recorded with, in this order",
                    where=f"{self.path}, parameter {name!r}",
                    expected=f"{self.manifest['optimizer']}; number {owner} of them trains it",
                    got=f"{kinds}; {'none' if given[name] is None else f'number {given[name]}'} trains it",
                )


def open_run(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    loss: LossFunction | None = None,
    make_optimizer: OptimizerFactory | Sequence[OptimizerFactory | None] | None = None,
    until: int | None = None,
    point: str = "gradient",
    rule: UpdateRule | Sequence[UpdateRule | None] | None = None,
    registry: Registry | None = None,
    gradient: GradientFunction | None = None,
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    damaged: bool = False,
    dataset: IndexedDataset | None = None,
) -> Run:
    """Open a recorded run: lazily, read-only, from any process, without running code from the store.

    Args:
        path: what was passed to :class:`~explaind_core.Recorder`.
        model: the architecture. It is copied: its weights are never read nor changed. Needed to explain
            predictions, not to look at parameters.
        loss: the training loss, where it is not one of torch's own.
        make_optimizer: builds the optimizer from a list of parameter groups, where its class cannot be
            called with the recorded hyper-parameters. For several optimizers a list, with None where none is needed.
        until: open the steps 1..until only.
        point: for optimizers that evaluate the model elsewhere than they take gradients (Schedule-Free):
            ``"gradient"`` explains the training parameters y, ``"evaluated"`` the model after ``optimizer.eval()``, x.
        rule: explain the run by this rule, and not by the one it was recorded with. For several optimizers a list,
            with None for the registered one; a single rule speaks for all of them.
        registry: the plugins to look for rules in; all installed ones by default.
        gradient: ``gradient(model, micro_batch)`` runs a micro-batch's backward pass as the loop did, for runs that are
            computed again (``mode="parameters"``, ``mode="snapshots"``) and whose loop does not call
            ``(loss(model(inputs), targets) * weight).backward()``.
        penalty: ``penalty(parameters by name) -> 0-d``, the term of one optimizer step's loss that depends on the
            parameters alone; its share of every update is then a term of its own.
        damaged: open a run of which files are damaged or missing: whatever is intact can be read, and asking for
            the rest is an error. By default such a run is refused at once.
        dataset: where the batches of a run recorded with ``inputs="reread"`` are read again, and compared.

    Raises:
        StoreError: no run, another version, damaged, or recorded with another model.

    Example:
        >>> import explaind_core as explaind
        >>> explaind.open_run("nowhere")
        Traceback (most recent call last):
        explaind_core.errors.StoreError: this is not a recorded run
        ...
    """
    return Run(
        path,
        model,
        loss=loss,
        make_optimizer=make_optimizer,
        until=until,
        point=point,
        rule=rule,
        registry=registry,
        gradient=gradient,
        penalty=penalty,
        damaged=damaged,
        dataset=dataset,
    )
