"""For the authors of plugins and tests: the conformance kit, and small recorded runs to try things on."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn

from explaind_core.conformance import Case, Conformance, Verdict, check_plugin, check_update_rule, run_case
from explaind_core.errors import ConformanceError
from explaind_core.recording import Recorder
from explaind_core.rules import Registry, Trials, UpdateRule
from explaind_core.run import Run, open_run

__all__ = [
    "Case",
    "Conformance",
    "ConformanceError",
    "Trials",
    "Verdict",
    "check_plugin",
    "check_update_rule",
    "record_example",
    "run_case",
]


def record_example(
    steps: int = 5,
    *,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    rule: UpdateRule | None = None,
    registry: Registry | None = None,
) -> Run:
    """Train a two-layer perceptron for a few steps and open its run (in a temporary folder that goes with it).

    Args:
        steps: how many steps of 8 of the 32 samples (4 features, 3 classes).
        make_optimizer: called with the parameters; AdamW with weight decay by default.
        dtype: of parameters and inputs.
        seed: of data, initialisation and batches.
        rule: explains the run, instead of the registered one.
        registry: the plugins to look for its rule in, those of the installed packages by default.

    Example:
        >>> record_example(steps=2).steps
        range(1, 3)
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    inputs, targets = torch.randn(32, 4, dtype=dtype), torch.randint(3, (32,))
    if make_optimizer is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    else:
        optimizer = make_optimizer(model.parameters())
    loss = nn.CrossEntropyLoss()
    folder = tempfile.mkdtemp(prefix="explaind-example-")
    with Recorder(f"{folder}/run", model, optimizer, loss, train_size=32, rule=rule, registry=registry) as recorder:
        for _ in range(steps):
            ids = torch.randperm(32)[:8]
            optimizer.zero_grad()
            loss(model(inputs[ids]), targets[ids]).backward()
            recorder.batch(inputs[ids], targets[ids], ids=ids)
            optimizer.step()
    run = open_run(f"{folder}/run", model=model, rule=rule, registry=registry)
    weakref.finalize(run, _remove, folder)
    return run


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
