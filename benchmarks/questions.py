"""What questions with a train axis cost: time and peak memory, against the plan and against passes over the data.

``python benchmarks/questions.py demo`` trains and records the demo's Transformer (in runs/questions, once) and asks for
the train x test kernel of its decoder, for similarities and for the top training samples of a prediction.
``python benchmarks/questions.py resnet`` does so with a ResNet-9 of 2.3 million parameters and 10,000 images, for
three lengths of the run. Every question runs in a process of its own, whose peak memory is read when it is done.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import explaind_core as explaind
from explaind_studies import demo
from explaind_studies.modular_addition import ModularTransformer, modular_addition
from explaind_studies.resnet import ResNet9, generated_images

FOLDER = Path("runs/questions")
#: The demo's questions: name -> arguments; all of them about log-probabilities of the right sums.
QUESTIONS: dict[str, dict[str, Any]] = {
    "train x test kernel": {
        "samples": 200, "keep": ("train", "test"), "layers": ["decoder"], "steps": slice(701, 751), "nodes": 1,
    },
    "similarity": {"samples": 500, "steps": slice(701, 751), "nodes": 1},
    "top samples": {"samples": 1, "keep": ("train", "test"), "nodes": 1},
}  # fmt: skip


def peak() -> int:
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the function returned."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def one_pass(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, batch: int) -> float:
    """Seconds of a plain forward and backward pass over the training set."""
    loss = nn.NLLLoss()

    def run() -> None:
        for start in range(0, len(inputs), batch):
            loss(model(inputs[start : start + batch]), targets[start : start + batch]).backward()

    run()
    return min(timed(run)[0] for _ in range(3))


def ask_demo(name: str) -> dict[str, Any]:
    """One question about the demo's run."""
    setting = demo.PAPER
    task = modular_addition(setting.p, setting.train, setting.test, seed=setting.seed)
    model = ModularTransformer(task.vocabulary)
    run = explaind.open_run(FOLDER / "demo", model=model)
    question = dict(QUESTIONS[name])
    samples = question.pop("samples")
    inputs = task.test_inputs[:samples]
    output = explaind.Chosen(task.test_targets[:samples])
    before, found = peak(), {"name": name, "steps": len(run.steps)}
    if name == "similarity":
        plan = explaind.plan_similarity(run, inputs, output=output, **question)
        found |= {"planned_s": plan.seconds, "planned_bytes": plan.peak_bytes, "strategy": str(plan)}
        found["seconds"], result = timed(lambda: explaind.similarity(run, inputs, output=output, **question))
        found["facts"] = {"diagonal": float(np.diagonal(result.values).mean()), "mean": float(result.mean())}
    else:
        plan = explaind.plan(run, inputs, output=output, **question)
        found |= {"planned_s": plan.seconds, "planned_bytes": plan.peak_bytes, "strategy": str(plan)}
        found["seconds"], result = timed(lambda: explaind.attribute(run, inputs, output=output, **question))
        found["facts"] = {"closure": explaind.closure_error(result), "residual": float(abs(result.residual).max())}
        found["facts"]["change"] = float(abs(result.final - result.initial).max())
        if name == "top samples":
            top = explaind.top_samples(result, 10)
            found["facts"]["samples"] = [
                (task.train_inputs[int(k)].tolist()[::2], round(float(v), 3))
                for k, v in zip(top.sample[0].values, top.influence[0].values, strict=True)
            ]
            found["facts"]["test"] = inputs[0].tolist()[::2]
    found["peak_bytes"] = peak() - before
    # Last of all: it holds a batch of the whole training set.
    found["pass_s"] = one_pass(ModularTransformer(task.vocabulary), task.train_inputs, task.train_targets, 4000)
    return found


def train_resnet(steps: int) -> None:
    """Record SGD with momentum on generated images, in batches of 256."""
    images, targets = generated_images(10_000)
    torch.manual_seed(0)
    model = ResNet9()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.005)
    loss = nn.NLLLoss()
    with explaind.Recorder(FOLDER / "resnet", model, optimizer, loss, train_size=len(images)) as recorder:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
        for s in range(steps):
            ids = order[(s * 256) % 10_000 :][:256]
            optimizer.zero_grad()
            value = loss(model(images[ids]), targets[ids])
            value.backward()
            recorder.batch(images[ids], targets[ids], ids=ids)
            optimizer.step()
            recorder.log(loss=float(value))


def ask_resnet(steps: int) -> dict[str, Any]:
    """The full train x test kernel of 20 test images, over the first ``steps`` steps."""
    images, targets = generated_images(10_000)
    tests, classes = generated_images(20, seed=1)
    run = explaind.open_run(FOLDER / "resnet", model=ResNet9(), until=steps)
    question = {"keep": ("train", "test"), "nodes": 1, "train": list(range(10_000))}
    output = explaind.Chosen(classes)
    before, found = peak(), {"name": f"resnet, {steps} steps", "steps": steps}
    plan = explaind.plan(run, tests, output=output, **question)
    found |= {"planned_s": plan.seconds, "planned_bytes": plan.peak_bytes, "strategy": str(plan)}
    found["seconds"], result = timed(lambda: explaind.attribute(run, tests, output=output, **question))
    change = float(abs(result.final - result.initial).max())
    found["facts"] = {
        "shape": result.kernel.shape, "closure": explaind.closure_error(result), "change": change,
        "residual": float(abs(result.residual).max()), "seen": int((result.kernel != 0).any("test").sum()),
    }  # fmt: skip
    found["peak_bytes"] = peak() - before
    found["total_bytes"] = peak()
    found["pass_s"] = one_pass(ResNet9(), images[:1024], targets[:1024], 256) * 10_000 / 1024
    return found


def apart(*arguments: str) -> dict[str, Any]:
    """One question in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(console: Console, found: dict[str, Any]) -> None:
    """Print what one question took."""
    console.print(f"[bold]{found['name']}[/bold]: {found['seconds']:.1f} s, "
                  f"{found['seconds'] / found['pass_s']:.1f} passes over the training set; "
                  f"peak {found['peak_bytes'] / 2**20:.0f} MiB more than before")  # fmt: skip
    if "planned_s" in found:
        console.print(f"  plan: {found['planned_s']:.1f} s (took {found['seconds'] / found['planned_s']:.2f} of it), "
                      f"{found['planned_bytes'] / 2**20:.0f} MiB ({found['peak_bytes'] / found['planned_bytes']:.2f})"
                      f"\n  {found['strategy']}")  # fmt: skip
    console.print(f"  {found['facts']}")


def main(which: str = "demo", *rest: str) -> None:
    """Train what is to be asked about, ask, and print."""
    console = Console()
    if which == "ask":
        subject, argument = rest
        print(json.dumps(ask_demo(argument) if subject == "demo" else ask_resnet(int(argument))))
    elif which == "demo":
        if not (FOLDER / "demo" / "closed.json").exists():
            demo.train(demo.PAPER, FOLDER / "demo")
        for name in rest or QUESTIONS:
            show(console, apart("ask", "demo", name))
    else:
        lengths = [int(n) for n in rest] or [10, 20, 39]
        if not (FOLDER / "resnet" / "closed.json").exists():
            train_resnet(max(lengths))
        found = [apart("ask", "resnet", str(n)) for n in lengths]
        for one in found:
            show(console, one)
        seconds = np.array([one["seconds"] for one in found])
        slope, start = np.polyfit(lengths, seconds, 1)
        error = float(np.abs(np.polyval((slope, start), lengths) - seconds).max() / seconds.max())
        console.print(
            f"fit: {start:.1f} s + {slope:.2f} s a step; largest deviation {100 * error:.1f} % of the longest"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
