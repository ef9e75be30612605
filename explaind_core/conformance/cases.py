"""One small training of the conformance kit, fully determined, and what an observer sees of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explaind_core import trees
from explaind_core.recording import Recorder
from explaind_core.rules import SHAPES, MakeOptimizer, Registry, Shapes, UpdateRule, hookimpl
from explaind_core.run import Replay, ReplayedStep, open_run

__all__ = ["Case", "observed", "replayed"]


@dataclass(frozen=True)
class Case:
    """One small training, fully determined.

    Attributes:
        options: what ``make_optimizer`` is called with beside the parameters.
        second_group: what the second parameter group overrides; None for one group.
        schedule: for each step, what is set in the first group before it.
        gradients: for each step and parameter: ``"yes"``, ``"none"``, ``"zero"``, ``"some zeros"`` or ``"sparse"``
            (some rows, some of them twice).
        clip: the largest gradient norm, or None (dense gradients only).
        closure: gradients are those of a smooth loss that ``step(closure)`` evaluates as often as it likes; without
            it they are drawn.
        stored: pass through the recorder, the store and the replay, which must give back what was observed.
        point: ``"evaluated"`` to check the point where the model is evaluated (see ``UpdateRule.evaluated``).
        shapes: of the parameters, a tuple for each.
        dtype: of the parameters, by its name in torch.
        seed: of all that is drawn.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    second_group: Mapping[str, Any] | None = field(default_factory=dict)
    schedule: Sequence[Mapping[str, Any]] = ({},)
    gradients: Sequence[Sequence[str]] = (("yes",) * 4,)
    clip: float | None = None
    closure: bool = False
    stored: bool = False
    point: str = "gradient"
    shapes: Shapes = SHAPES
    dtype: str = "float64"
    seed: int = 0


class _Training:
    """The model, the optimizer and the data of a case."""

    def __init__(self, make_optimizer: MakeOptimizer, case: Case) -> None:
        self.case = case
        self._generator = torch.Generator().manual_seed(case.seed)
        self._dtype = getattr(torch, case.dtype)
        self.model = nn.Module()
        for i, shape in enumerate(case.shapes):
            self.model.register_parameter(f"p{i}", nn.Parameter(self._draw(shape)))
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self._groups(), **case.options)

    def _groups(self) -> list[dict[str, Any]]:
        every = list(self.parameters.values())
        if self.case.second_group is None or len(every) == 1:
            return [{"params": every}]
        return [{"params": every[::2]}, {"params": every[1::2], **self.case.second_group}]

    def _draw(self, shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(tuple(shape), generator=self._generator, dtype=torch.float64)
        return drawn.to(self._dtype)

    def _gradient(self, parameter: Tensor, what: str) -> Tensor | None:
        gradient = self._draw(parameter.shape)
        if what == "none":
            return None
        if what == "sparse":
            count = int(torch.randint(0, 2 * len(parameter), (), generator=self._generator))
            rows = torch.randint(len(parameter), (1, count), generator=self._generator)
            values = self._draw((count, *parameter.shape[1:]))
            return torch.sparse_coo_tensor(rows, values, parameter.shape, check_invariants=True)
        if what == "some zeros" and parameter.ndim:
            gradient.view(-1)[::2] = 0
        return gradient * (what != "zero")

    def steps(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Train; ``before`` is called when all is ready for a step, ``after`` behind it."""
        for scheduled, presence in zip(self.case.schedule, self.case.gradients, strict=True):
            self.optimizer.param_groups[0].update(scheduled)
            if self.case.closure:
                closure = self._closure(presence)
                before()
                self.optimizer.step(closure)  # type: ignore[arg-type]  # torch's own closures return tensors
            else:
                for parameter, what in zip(self.parameters.values(), presence, strict=False):
                    parameter.grad = self._gradient(parameter, what)
                if self.case.clip is not None and "sparse" not in presence:
                    nn.utils.clip_grad_norm_(list(self.parameters.values()), self.case.clip)
                before()
                self.optimizer.step()
            after()

    def _closure(self, presence: Sequence[str]) -> Callable[[], Tensor]:
        """A smooth loss that couples all parameters, with curvature of its own along every coordinate."""
        centres = [self._draw(p.shape) for p in self.parameters.values()]
        scales = [self._draw(p.shape).abs() + 0.1 for p in self.parameters.values()]

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with torch.enable_grad():
                loss = torch.zeros((), dtype=self._dtype)
                total = torch.zeros((), dtype=self._dtype)
                for p, b, c, what in zip(self.parameters.values(), centres, scales, presence, strict=False):
                    if what != "none":
                        weight = 0.0 if what == "zero" else 1.0
                        loss = loss + weight * (c * (p - b).square() + 0.1 * torch.cos(3 * p)).sum()
                        total = total + weight * p.sum()
                loss = loss + 0.1 * total.square()
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return closure


def _clone(tree: Any) -> Any:
    return trees.map_tensors(lambda t: t.detach().clone(), tree)


def _number_or_copy(tensor: Tensor) -> Any:
    return tensor.item() if tensor.numel() == 1 else tensor.detach().clone()


def observed(rule: UpdateRule, make_optimizer: MakeOptimizer, case: Case) -> list[ReplayedStep]:
    """Train, looking at the optimizer before and after every step; nothing is stored.

    Args:
        rule: of the optimizer.
        make_optimizer: called with parameter groups and the case's options.
        case: the training.
    """
    training = _Training(make_optimizer, case)
    optimizer, parameters = training.optimizer, training.parameters
    names = {id(p): n for n, p in parameters.items()}
    steps: list[ReplayedStep] = []
    seen: dict[str, Any] = {}

    rule.check_held_options(optimizer, unused=not optimizer.state)
    aside = rule.options_aside(optimizer)

    def hyper() -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            values = {k: v for k, v in {**group, **aside}.items() if k not in ("params", "param_names")}
            for parameter in group["params"]:
                found[names[id(parameter)]] = trees.map_tensors(_number_or_copy, values)
        return found

    def state() -> dict[str, dict[str, Any]]:
        return {n: _clone(dict(optimizer.state[p])) for n, p in parameters.items() if p in optimizer.state}

    def view(groups: Mapping[str, Mapping[str, Any]], states: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        found = {}
        for name, parameter in parameters.items():
            theta = parameter.detach().clone()
            elsewhere = case.point == "evaluated"
            found[name] = rule.evaluated(theta, states.get(name, {}), groups[name]) if elsewhere else theta
        return found

    def before() -> None:
        gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
        seen.update(gradients=gradients, hyper=hyper(), before=state(), point=_clone(parameters))
        seen.setdefault("theta", view(seen["hyper"], seen["before"]))

    def after() -> None:
        states, groups = state(), hyper()
        theta, point = view(groups, states), seen["point"] if case.point == "evaluated" else None
        steps.append(
            ReplayedStep(len(steps) + 1, seen["theta"], theta, seen["gradients"], seen["hyper"], seen["before"],
                         states, 0.0, groups, point)
        )  # fmt: skip
        seen["theta"] = theta

    training.steps(before, after)
    return steps


def replayed(rule: UpdateRule, make_optimizer: MakeOptimizer, case: Case) -> list[ReplayedStep]:
    """Train under a Recorder, open the run, and replay it: what a user's decomposition is made of.

    Args:
        rule: of the optimizer.
        make_optimizer: called with parameter groups and the case's options.
        case: the training.
    """

    class Plugin:
        @staticmethod
        @hookimpl
        def explaind_update_rule() -> UpdateRule:
            return rule

    registry = Registry(discover=False)
    registry.register(Plugin, name="the rule that is checked")
    training = _Training(make_optimizer, case)
    with tempfile.TemporaryDirectory(prefix="explaind-case-") as folder:
        ids = torch.zeros(1, dtype=torch.int64)
        with Recorder(f"{folder}/run", training.model, training.optimizer, registry=registry) as recorder:
            training.steps(lambda: recorder.batch(None, None, ids=ids), lambda: None)

        def rebuild(groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
            return make_optimizer(groups, **case.options)

        run = open_run(
            f"{folder}/run", model=training.model, make_optimizer=rebuild, point=case.point, registry=registry
        )
        return list(Replay(run).steps()) if run.steps else []
