"""Watches an optimizer step and writes what it saw."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.batches import BatchLog, copied
from explaind_core.coefficients import UpdateRule, qualified_name
from explaind_core.errors import NonFiniteError, RecordingError, StoreError
from explaind_core.finite import check_gradients, check_parameters
from explaind_core.iterations import Evaluation, IterationSplitter
from explaind_core.losses import describe_loss
from explaind_core.plugins import RegisteredRule, Registry, default_registry
from explaind_core.store import FORMAT, VERSION, RunStore

__all__ = ["Recorder"]


@dataclass
class _Pending:
    """What was seen before ``optimizer.step()``, until the step is over."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    seen: bool = False  # whether gradients were taken (with a closure this happens inside step())
    skipped: bool = False  # a gradient scaler found an infinity: the optimizer will do nothing
    evaluations: list[Evaluation] = field(default_factory=list)  # of the closure, where the optimizer iterates inside
    iterations: int = 0  # that it had made before


class Recorder:
    """Records an ordinary training loop, step by step, to an append-only store.

    Per step it writes theta_s, every gradient as the optimizer was fed it (cloned before ``step()``), each
    group's hyper-parameters as they stood before the step, which samples the batch held, and buffers that
    changed. Parameters are known by their names in ``model``. Recording starts when the Recorder is made:
    theta_0 and the optimizer's state are those of that moment.

    Args:
        path: a folder that does not exist yet (or is empty).
        model: any module. optimizer: any optimizer with a registered rule.
        loss: ``loss(output, target)``, per-sample or reduced; its name is kept, and torch's own losses can be
            rebuilt when the run is opened.
        train_size: the number of training samples; ids must be below it.
        snapshot_every: the optimizer's state is kept after every that many steps.
        resume: continue the run at ``path``; the model must stand where its last recorded step left it.
        overwrite: delete the run at ``path`` first.
        rule: explain the optimizer by this rule, whatever is registered; an :class:`explaind_core.InferredRule` for one
            that nobody has declared.
        registry: the plugins to look for a rule in; all installed ones by default.

    Raises:
        RuleNotFoundError, AmbiguousRuleError: not exactly one rule speaks for ``optimizer``.
        UnsupportedOptionError: the optimizer uses an option that its rule does not model.
        RecordingError: the optimizer trains tensors that are not parameters of ``model``, or complex ones.
        StoreError: ``path`` holds something already, or cannot be written.

    Example:
        >>> import tempfile, torch
        >>> model, loss = torch.nn.Linear(2, 1), torch.nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> inputs, targets = torch.randn(8, 2), torch.randn(8, 1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Recorder(f"{folder.name}/run", model, optimizer, loss) as recorder:
        ...     for ids in torch.arange(8).split(4):
        ...         optimizer.zero_grad()
        ...         loss(model(inputs[ids]), targets[ids]).backward()
        ...         recorder.batch(inputs[ids], targets[ids], ids=ids)
        ...         _ = optimizer.step()
        >>> recorder.steps
        2
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor] | None = None,
        *,
        train_size: int | None = None,
        snapshot_every: int = 100,
        resume: bool = False,
        overwrite: bool = False,
        rule: UpdateRule | None = None,
        registry: Registry | None = None,
    ) -> None:
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._train_size, self._snapshot_every = train_size, snapshot_every  # the former for the manifest
        self._registered = (
            (registry or default_registry()).rule_for(optimizer)
            if rule is None
            else RegisteredRule(rule, "given", "given", "-")
        )
        self._parameters = dict(model.named_parameters())
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._check_parameters()
        self._groups()  # refuses options before anything is written
        self._store = RunStore(path)
        self._batches = BatchLog(self._store, train_size)
        self._last: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        # What a step file holds: all that ever was trained, or changed, so that one file tells a whole state.
        self._ever_trained: set[str] = set()
        self._ever_changed: set[str] = set()
        self._factor = 1.0
        self._pending: _Pending | None = None
        self.steps = 0
        self.skipped = 0
        if resume:
            self._resume()
        else:
            self._start(overwrite)
        iterates = self._registered.rule.iterations({}) is not None
        self._splitter = IterationSplitter(self._registered.rule, optimizer, self._parameters) if iterates else None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    # ------------------------------------------------------------------ starting
    def _check_parameters(self) -> None:
        for index, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in self._names:
                    raise RecordingError(
                        "the optimizer trains a tensor that is no parameter of the model",
                        where=f"parameter group {index}",
                        got=f"a tensor of shape {tuple(parameter.shape)}",
                        remedy="record with the module that owns it, e.g. nn.ModuleList([model, head])",
                    )
                if parameter.is_complex():
                    raise RecordingError(
                        "complex parameters are not supported",
                        where=f"parameter {self._names[id(parameter)]!r}",
                        remedy="train on torch.view_as_real of it",
                    )

    def _groups(self) -> list[dict[str, Any]]:
        """Every group's hyper-parameters as they stand, with the names of its parameters, checked against the rule."""
        groups, rule = [], self._registered.rule
        aside = rule.options_aside(self._optimizer)
        for group in self._optimizer.param_groups:
            rule.check_options({**aside, **group}, [*self._optimizer.defaults, *aside])
            entry: dict[str, Any] = {"params": [self._names[id(p)] for p in group["params"]]}
            values = {**aside, **group}
            entry |= {key: _plain(value) for key, value in values.items() if key not in ("params", "param_names")}
            groups.append(entry)
        return groups

    def _start(self, overwrite: bool) -> None:
        path = self._store.path
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            if not overwrite:
                raise StoreError(
                    "there is something at this path already",
                    where=path,
                    expected="a new or empty folder",
                    remedy="choose another path; or pass resume=True to continue the run, overwrite=True to delete it",
                )
            self._store.read_manifest()  # never delete what is not a run
            shutil.rmtree(path)
        rule = type(self._registered.rule)
        trained = {name for group in self._groups() for name in group["params"]}
        self._last = {name: copied(p) for name, p in self._parameters.items()}
        self._buffers = {name: copied(b) for name, b in self._model.named_buffers()}
        start = {f"theta/{n}": t for n, t in self._last.items()} | {f"buffer/{n}": t for n, t in self._buffers.items()}
        header, tensors = self._optimizer_state()
        start |= self._evaluated(self._last)
        self._store.write_tensors(self._store.start_path, header, start | tensors)
        # The manifest comes last: a folder without one is not a run.
        self._store.write_json(
            "manifest.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "created_with": version("explaind-core"),
                "torch": torch.__version__,
                "model": qualified_name(type(self._model)),
                "optimizer": qualified_name(type(self._optimizer)),
                "optimizer_defaults": sorted(self._optimizer.defaults),
                "rule": {
                    "name": qualified_name(rule),
                    "package": self._registered.package,
                    "version": self._registered.version,
                    "inferred": self._registered.rule.inferred,
                    "closed_by_secant": self._registered.rule.closed_by_secant,
                    "settings": self._registered.rule.settings(),
                },
                "loss": describe_loss(self._loss),
                "evaluates_elsewhere": self._registered.rule.evaluates_elsewhere,
                "train_size": self._train_size,
                "parameters": [
                    {"name": n, "shape": list(p.shape), "dtype": str(p.dtype), "trained": n in trained}
                    for n, p in self._parameters.items()
                ],
                "buffers": sorted(self._buffers),
            },
        )

    def _resume(self) -> None:
        from explaind_core.run import open_run  # reading is the next stage; only resuming needs it here

        run = open_run(self._store.path, model=self._model)
        trained_by, given = run.manifest["optimizer"], qualified_name(type(self._optimizer))
        if trained_by != given:
            raise RecordingError(
                "the run was recorded with another optimizer",
                where=self._store.path,
                expected=trained_by,
                got=given,
                remedy="resume with the recorded one, or start a new run",
            )
        self.steps = len(run.steps)
        self._last = run.theta(self.steps)
        self._buffers = run.buffers(self.steps)
        self._ever_trained = {n for s in run.steps for group in run.hyper(s) for n in group["params"]}
        start = run.buffers(0)
        self._ever_changed = {n for n, b in self._buffers.items() if n not in start or not torch.equal(b, start[n])}
        for name, parameter in self._parameters.items():
            if not self._untouched(self._last[name], copied(parameter)):
                raise RecordingError(
                    f"the model does not stand where step {self.steps} of the run left it",
                    where=f"parameter {name!r}",
                    remedy="load that state first: explaind.open_run(...).restore(model, optimizer)",
                )
        (self._store.path / "closed.json").unlink(missing_ok=True)
        self._snapshot()

    # ------------------------------------------------------------------ what the loop calls
    def batch(self, inputs: Any, targets: Any, *, ids: Any, weight: float = 1.0) -> None:
        """Declare which training samples the coming step's gradient is of; once per micro-batch.

        Args:
            inputs: what the model was called with: a tensor, or a tuple, list or dict of tensors.
            targets: the loss's second argument (nested likewise, or None).
            ids: which samples of the training set these are, one integer each, in order.
            weight: the factor by which this micro-batch's loss was multiplied before ``backward()``
                (1/k for an accumulation over k micro-batches).

        Raises:
            RecordingError: ids are not one integer per sample, or out of range; inputs cannot be stored.
        """
        self._batches.declare(inputs, targets, ids, weight, self.steps + 1)

    def discard_batch(self) -> None:
        """Forget the batches declared since the last step: their gradients will not be used.

        Needed where a ``GradScaler`` skips ``optimizer.step()`` without calling it (no fused optimizer): the
        recorder cannot see that.
        """
        self._batches.clear()
        self._factor = 1.0

    def gradient_factor(self, factor: float) -> None:
        """Tell by what the coming step's gradient was multiplied after ``backward()``: a clip coefficient.

        ``clip_grad_norm_(parameters, c)`` returns the norm n it found; its factor is ``min(1, c / (n + 1e-6))``.
        The recorder keeps the gradient as fed; the factor is needed to compare it with the samples' own gradients.

        Raises:
            NonFiniteError: the factor is NaN or infinite.
        """
        if not math.isfinite(factor):
            raise NonFiniteError("the gradient factor is not finite", where=f"step {self.steps + 1}", got=factor)
        self._factor *= float(factor)

    def log(self, **metrics: float | Tensor) -> None:
        """Keep numbers (a loss, an accuracy) with the last finished step; ``run.metrics`` returns them.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        values = {n: float(v.detach() if isinstance(v, Tensor) else v) for n, v in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{name} is {value}",
                    where=f"after step {self.steps}",
                    remedy=f"training has diverged; the {self.steps} steps recorded so far are intact",
                )
        self._store.append_line("metrics.jsonl", {"step": self.steps, **values})

    def close(self) -> None:
        """End the recording in order. Leaving the ``with`` block does this."""
        self._detach()
        self._store.write_json("closed.json", {"steps": self.steps})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # an interrupted training is a shorter run, not a finished one
            self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    # ------------------------------------------------------------------ what the optimizer calls
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pending = self._pending = _Pending()
        self._check_parameters()  # groups may have been added
        pending.groups = self._groups()
        if self._splitter is not None:
            pending.iterations = self._splitter.count(optimizer)
        for name, parameter in self._parameters.items():
            if not self._untouched(self._last[name], parameter.detach().cpu()):
                raise RecordingError(
                    "a parameter changed outside optimizer.step()",
                    where=f"parameter {name!r}, between step {self.steps} and step {self.steps + 1}",
                    expected="the value that the last step left",
                    remedy="make the Recorder after the model is initialised, and change parameters in step() only",
                )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._see_gradients(pending)
            return None

        def watched() -> Any:
            # The gradient of this step exists only once the closure has run.
            declared = len(self._batches.entries)
            result = closure()
            if pending.seen:
                if self._splitter is None:
                    raise RecordingError(
                        f"{type(optimizer).__name__} called its closure more than once in a step",
                        where=f"step {self.steps + 1}",
                        expected="one gradient per step",
                        remedy="use an optimizer, or options, that evaluate the closure once",
                    )
                self._batches.drop_repeats(declared, self.steps + 1)
                self._see_again(pending, result)
            else:
                self._see_gradients(pending, result)
            return result

        if len(args) > 1:
            return (args[0], watched, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched}

    def _untouched(self, left: Tensor, found: Tensor) -> bool:
        if not self._registered.rule.evaluates_elsewhere or left.numel() == 0:
            return torch.equal(left, found)
        # Going to the evaluated point and back rounds; anything beyond that rounding is a change.
        allowed = 16 * torch.finfo(left.dtype).eps * float(left.abs().max())
        return float((left.double() - found.double()).abs().max()) <= allowed

    def _see_gradients(self, pending: _Pending, loss: Any = None) -> None:
        pending.seen = True
        if not self._batches.entries:
            raise RecordingError(
                "no batch was declared before optimizer.step()",
                where=f"step {self.steps + 1}",
                remedy="call recorder.batch(inputs, targets, ids=ids) between backward() and step()",
            )
        # A GradScaler with a fused optimizer hands over scaled gradients, and lets step() run on infinities.
        scale, found = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if found is not None and float(found) > 0:
            pending.skipped = True
            return
        for name, gradient in self._fed(pending).items():
            copy = gradient.detach().clone()
            pending.gradients[name] = copy if scale is None else copy / scale.to(copy.device)
        if found is None:  # otherwise infinities are the gradient scaler's business
            check_gradients(pending.gradients, self.steps + 1)
        if self._splitter is not None:
            self._see_again(pending, loss)

    def _fed(self, pending: _Pending) -> dict[str, Tensor]:
        gradients = {n: self._parameters[n].grad for group in pending.groups for n in group["params"]}
        return {name: gradient for name, gradient in gradients.items() if gradient is not None}

    def _see_again(self, pending: _Pending, loss: Any) -> None:
        """One evaluation of the closure among those of an optimizer that iterates inside."""
        theta = {name: copied(parameter) for name, parameter in self._parameters.items()}
        gradients = {n: copied(g.to_dense() if g.is_sparse else g) for n, g in self._fed(pending).items()}
        value = loss.detach().item() if isinstance(loss, Tensor) else float(loss)
        pending.evaluations.append(Evaluation(theta, value, gradients))

    def _after_step(self, _optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        pending, self._pending = self._pending, None
        if pending is None:  # the recorder was made inside this very step
            return
        if not pending.seen:
            raise RecordingError(
                "the optimizer never evaluated its closure", where=f"step {self.steps + 1}", remedy="pass no closure"
            )
        theta = {name: copied(parameter) for name, parameter in self._parameters.items()}
        if pending.skipped:
            self.skipped += 1
            self.discard_batch()
            return
        if self._splitter is None:
            self._finish_step(pending, theta)
        else:
            self._finish_iterations(self._splitter, pending, theta)
        self.discard_batch()

    def _finish_iterations(self, splitter: IterationSplitter, pending: _Pending, theta: dict[str, Tensor]) -> None:
        count = splitter.count(self._optimizer) - pending.iterations
        found = splitter.split(pending.evaluations, pending.groups, count, self.steps + 1, self._snapshot_every)
        reached = found[-1].theta if found else self._last
        for name, value in theta.items():
            if not torch.equal(reached[name], value):
                raise RecordingError(
                    "the parameters do not stand where the iterations inside the step lead",
                    where=f"parameter {name!r}, step {self.steps + 1}",
                    remedy="let the closure change no parameter",
                )
        for iteration in found:
            single = _Pending(dict(iteration.evaluations[0].gradients), iteration.groups, seen=True)
            single.evaluations = list(iteration.evaluations)
            self._finish_step(single, iteration.theta, iteration.state)

    def _finish_step(
        self, pending: _Pending, theta: dict[str, Tensor], state: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        check_parameters({name: theta[name] for name in pending.gradients}, self.steps + 1)
        self._write_step(pending, theta)
        self.steps += 1
        self._last = theta
        if self.steps % self._snapshot_every == 0:
            self._snapshot(state)

    def _write_step(self, pending: _Pending, theta: dict[str, Tensor]) -> None:
        s = self.steps + 1
        self._ever_trained.update(name for group in pending.groups for name in group["params"])
        for name in self._parameters.keys() - self._ever_trained:
            if not torch.equal(theta[name], self._last[name]):
                raise RecordingError(
                    "a parameter that the optimizer does not train changed", where=f"{name!r}, step {s}"
                )
        tensors = {f"theta/{name}": theta[name] for name in self._ever_trained} | self._batches.tensors()
        for name, gradient in pending.gradients.items():
            if gradient.is_sparse:
                # As fed: coalescing is the optimizer's business.
                tensors[f"sparse_indices/{name}"] = gradient._indices()
                tensors[f"sparse_values/{name}"] = gradient._values()
            else:
                tensors[f"gradient/{name}"] = gradient
        buffers = {name: copied(buffer) for name, buffer in self._model.named_buffers()}
        for name, buffer in buffers.items():
            if name not in self._buffers or not torch.equal(buffer, self._buffers[name]):
                self._ever_changed.add(name)
        tensors |= {f"buffer/{name}": buffers[name] for name in self._ever_changed & buffers.keys()}
        tensors |= self._evaluated(theta)
        for k, evaluation in enumerate(pending.evaluations[1:], 1):
            tensors |= {f"closure/{k}/{name}": gradient for name, gradient in evaluation.gradients.items()}
        structure, group_tensors = trees.flatten(pending.groups, "the parameter groups")
        header = {"step": s, "groups": structure, "batches": self._batches.entries, "gradient_factor": self._factor}
        if pending.evaluations:
            header["closure_losses"] = [evaluation.loss for evaluation in pending.evaluations]
        self._store.write_tensors(
            self._store.step_path(s), header, tensors | {f"group/{k}": t for k, t in group_tensors.items()}
        )
        self._buffers = buffers

    # ------------------------------------------------------------------ the optimizer's state
    def _state(self) -> dict[str, dict[str, Any]]:
        return {
            self._names[id(parameter)]: dict(entries)
            for parameter, entries in self._optimizer.state.items()
            if id(parameter) in self._names
        }

    def _evaluated(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the model is evaluated when training stands at ``theta``, for optimizers where these differ."""
        rule = self._registered.rule
        if not rule.evaluates_elsewhere:
            return {}
        state, found = self._state(), {}
        for group in self._groups():
            for name in group["params"]:
                found[f"evaluated/{name}"] = copied(rule.evaluated(theta[name], state.get(name, {}), group))
        return found

    def _optimizer_state(self, state: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Any, dict[str, Tensor]]:
        state = self._state() if state is None else state
        structure, tensors = trees.flatten(state, "the optimizer's state")
        return {"state": structure}, {f"state/{key}": tensor for key, tensor in tensors.items()}

    def _snapshot(self, state: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._store.write_tensors(self._store.snapshot_path(self.steps), *self._optimizer_state(state))


def _plain(value: Any) -> Any:
    """A hyper-parameter as the store keeps it; what a scheduler or user left there that is no data is only named."""
    try:
        trees.flatten(value, "hyper-parameter")
    except RecordingError:
        return f"<{type(value).__name__}>"
    return value.detach().clone() if isinstance(value, Tensor) else value
