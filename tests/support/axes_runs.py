"""Small runs of all kinds, to compare the library with the oracle of all seven axes on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core.run.run import Run
from support.attribution_oracles import forward, rows

#: One optimizer of all parameters, or a list of several.
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Any]

SAMPLES, CLASSES = 9, 2
_GENERATOR = torch.Generator().manual_seed(5)
DATA = torch.randn(SAMPLES, 3, generator=_GENERATOR, dtype=torch.float64)
TARGETS = torch.randint(CLASSES, (SAMPLES,), generator=_GENERATOR)
#: Test samples.
INPUTS = torch.randn(3, 3, generator=_GENERATOR, dtype=torch.float64)
ASKED = torch.tensor([1, 0, 1])
#: Ragged; a sample twice in the second batch; sample 5 never.
BATCHES = [[0, 1, 2, 3], [4, 4, 0, 6], [7, 8], [3, 2, 1, 4]]
#: (ids, weight): a sample in two micro-batches of one step, too.
MICRO = [[([0, 1, 2], 0.6), ([3, 0], 0.4)], [([4], 0.5), ([6, 6], 0.7)], [([7, 8, 1], 1.0)], [([0, 1], 0.3)]]

#: Temporary folders live as long as the tests.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def network(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Module:
    """20 parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3, bias=bias), nn.Tanh(), nn.Linear(3, CLASSES, bias=bias)).to(dtype)


class Undeclared(torch.optim.SGD):
    """A subclass is another optimizer, which no rule is registered for."""


def _elsewhere(package: str, name: str, **options: Any) -> MakeOptimizer:
    return lambda parameters: getattr(pytest.importorskip(package), name)(parameters, **options)


def _matrices_and_others(first: Callable[..., Any], second: Callable[..., Any]) -> MakeOptimizer:
    def make(parameters: Iterable[nn.Parameter]) -> list[torch.optim.Optimizer]:
        parameters = list(parameters)
        return [first([p for p in parameters if p.ndim == 2]), second([p for p in parameters if p.ndim < 2])]

    return make


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "descent": lambda ps: torch.optim.SGD(ps, lr=0.2),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, betas=(0.8, 0.9), weight_decay=0.5),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.05, betas=(0.7, 0.9), amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.02, momentum=0.9, centered=True, weight_decay=0.2),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.3, max_iter=3),
    # A sign rule behind an operator that is not elementwise.
    "lion": _elsewhere("pytorch_optimizer", "Lion", lr=0.02, betas=(0.7, 0.8), weight_decay=0.1, use_gc=True),
    # A filter whose coefficients are operators along all axes.
    "shampoo": _elsewhere("pytorch_optimizer", "Shampoo", lr=0.05, momentum=0.6, weight_decay=0.1, matrix_eps=0.1),
    # Left and right matrices, closed by a secant.
    "muon": lambda ps: torch.optim.Muon(ps, lr=0.1, weight_decay=0.3),
    # Two filter states.
    "ademamix": _elsewhere("pytorch_optimizer", "AdEMAMix", lr=0.05, betas=(0.7, 0.9, 0.8), weight_decay=0.2),
    # Gradients are taken at one point, and the model is evaluated at another one.
    "schedule-free": _elsewhere("schedulefree", "AdamWScheduleFree", lr=0.05, weight_decay=0.1),
    # Several optimizers: Muon of the matrices, and two of torch's others.
    "muon+adamw": _matrices_and_others(
        lambda ps: torch.optim.Muon(ps, lr=0.1, weight_decay=0.3),
        lambda ps: torch.optim.AdamW(ps, lr=0.05, betas=(0.8, 0.9), weight_decay=0.5),
    ),
    "sgd+adam": _matrices_and_others(
        lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda ps: torch.optim.Adam(ps, lr=0.05, betas=(0.7, 0.9), weight_decay=0.1),
    ),
    "inferred": lambda ps: Undeclared(ps, lr=0.2, momentum=0.8, weight_decay=0.1),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rates": {"schedule": [{"lr": lr} for lr in (0.1, 0.2, 0.05, 0.15)]},
    "micro": {"batches": MICRO},
    "used": {"unrecorded": 2},
    "missing": {"missing": {2: ["0.weight"], 3: ["0.weight", "2.bias"]}},
    "clipped": {"clip": 0.1},
    "betas": {"schedule": [{"betas": b} for b in ((0.5, 0.9), (0.9, 0.8), (0.6, 0.95), (0.8, 0.9))]},
    "frozen momentum": {"schedule": [{"momentum": mu} for mu in (0.8, 0.5, 0.0, 0.7)]},
    "evaluated": {"point": "evaluated"},
    "taking turns": {"turns": [(0, 1), (1,), (0,), (1, 0)]},
    "taking turns, used": {"turns": [(1,), (0, 1), (0,), (0, 1)], "unrecorded": 2},
}
#: (optimizer, training): all that the kernel's two inner axes depend on.
CASES = [
    *((name, "plain") for name in OPTIMIZERS),
    *(("nesterov", training) for training in ("rates", "micro", "used", "missing", "clipped")),
    *(("adamw", training) for training in ("micro", "used", "missing", "betas")),
    *(("amsgrad", training) for training in ("rates", "used")),
    *(("rmsprop", training) for training in ("rates", "frozen momentum", "used")),
    *(("muon+adamw", training) for training in ("taking turns", "taking turns, used", "missing")),
    *(("sgd+adam", training) for training in ("micro", "clipped", "taking turns", "taking turns, used")),
    ("lion", "used"),
    ("muon", "used"),
    ("lbfgs", "micro"),
    ("schedule-free", "evaluated"),
]


@lru_cache
def example(optimizer: str, training: str = "plain") -> Run:
    """One of the CASES, recorded once; skips where its package is not installed."""
    if "muon" in optimizer and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    options = {"batches": BATCHES, **TRAININGS[training]}
    if optimizer == "inferred":
        options["rule"] = explaind.InferredRule(momentum=0.8, decay="coupled", force=True)
    return record_batches(network(optimizer != "muon"), OPTIMIZERS[optimizer], DATA, TARGETS, **options)


def record_batches(
    model: nn.Module,
    make_optimizer: MakeOptimizer,
    inputs: Any,
    targets: Tensor,
    batches: Sequence[Any],
    *,
    loss: Any = None,
    unrecorded: int = 0,
    schedule: Sequence[Mapping[str, Any]] = (),
    missing: Mapping[int, Sequence[str]] | None = None,
    clip: float | None = None,
    rule: Any = None,
    point: str = "gradient",
    turns: Sequence[Sequence[int]] = (),
) -> Run:
    """Train on given batches and open the run.

    Args:
        model, make_optimizer, inputs, targets, loss: as everywhere.
        batches: per step the ids of its samples, or its micro-batches ``[(ids, weight), ...]``.
        unrecorded: so many steps come first, on the first batch. schedule: hyper-parameters to set, by step.
        missing: step -> parameters that get no gradient in it. clip: the largest norm of a gradient.
        rule: of the Recorder. point: of ``open_run``. turns: which of several optimizers step, and in which order, by
            step; all by default.
    """
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="explaind-axes-"))
    path = Path(_FOLDERS[-1].name) / "run"
    loss = nn.CrossEntropyLoss() if loss is None else loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained.values())
    several = optimizer if isinstance(optimizer, list) else [optimizer]
    if hasattr(optimizer, "train"):
        optimizer.train()

    def step(batch: Any, s: int, recorder: explaind.Recorder | None = None) -> None:
        micro = batch if isinstance(batch[0], tuple) else [(batch, 1.0)]
        micro = [(torch.as_tensor(ids), weight) for ids, weight in micro]

        def closure() -> Tensor:
            for each in several:
                each.zero_grad()
            value = torch.zeros(())
            for ids, weight in micro:
                part = weight * loss(forward(model, rows(inputs, ids)), targets[ids]).mean()
                part.backward()
                value = value + part.detach()
            return value

        for ids, weight in micro if recorder is not None else ():
            recorder.batch(rows(inputs, ids), targets[ids], ids=ids, weight=weight)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
            return
        closure()
        for name in (missing or {}).get(s, ()):
            trained[name].grad = None
        if clip is not None:
            norm = float(nn.utils.clip_grad_norm_(list(trained.values()), clip))
            if recorder is not None:
                recorder.gradient_factor(min(1.0, clip / (norm + 1e-6)))
        for member in turns[s - 1] if turns and s else range(len(several)):
            several[member].step()

    for _ in range(unrecorded):
        step(batches[0], 0)
    with explaind.Recorder(path, model, optimizer, loss, rule=rule) as recorder:
        for s, batch in enumerate(batches, 1):
            for group in several[0].param_groups if schedule else ():
                group.update(schedule[s - 1])
            step(batch, s, recorder)
    run = explaind.open_run(path, model=model, point=point)
    return run if run.loss is not None else explaind.open_run(path, model=model, point=point, loss=loss)
