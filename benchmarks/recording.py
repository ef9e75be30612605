"""What recording costs: the demo's training with a Recorder, divided by the same training without one.

Both trainings start alike and take turns, some steps at a time, so that a noisy machine slows both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator

import torch
from explaind_studies.modular_addition import ModularTransformer, modular_addition
from torch import nn

import explaind_core as explaind


def training(path: str | None, evaluate: bool) -> Iterator[None]:
    """The demo's training loop, one step an item; recorded if ``path`` is given."""
    task = modular_addition()
    torch.manual_seed(0)
    model, loss = ModularTransformer(task.vocabulary), nn.NLLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=(0.9, 0.98))
    recorder = explaind.Recorder(path, model, optimizer, loss) if path else None
    ids = torch.arange(len(task.train_inputs))
    while True:
        if evaluate:  # the demo looks at both accuracies before every step
            with torch.no_grad():
                model(task.train_inputs), model(task.test_inputs)
        optimizer.zero_grad()
        loss(model(task.train_inputs), task.train_targets).backward()
        if recorder:
            recorder.batch(task.train_inputs, task.train_targets, ids=ids)
        optimizer.step()
        yield


def main(rounds: int = 30, steps: int = 10) -> None:
    """Print both ratios."""
    for evaluate in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            loops = {"plain": training(None, evaluate), "recorded": training(f"{folder}/run", evaluate)}
            seconds = dict.fromkeys(loops, 0.0)
            for turn in range(rounds + 1):
                for name, loop in loops.items():
                    start = time.perf_counter()
                    for _ in range(steps):
                        next(loop)
                    if turn:  # the first is for warming up
                        seconds[name] += time.perf_counter() - start
        per_step = {name: 1e3 * total / rounds / steps for name, total in seconds.items()}
        kind = "the demo's loop (accuracies before every step)" if evaluate else "forward, backward, step only"
        print(
            f"{kind}: {per_step['plain']:.1f} ms a step, recorded {per_step['recorded']:.1f} ms: "
            f"ratio {per_step['recorded'] / per_step['plain']:.3f}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
