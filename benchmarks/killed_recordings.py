"""Recordings that are killed: a small training, and whether its run is after a kill what it would have been."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from killing import Findings, Tell, child, ended, last
from torch import nn

import explaind_core as explaind
from explaind_core import trees
from explaind_core.errors import ExplaindError


@dataclass(frozen=True)
class Training:
    """A small training whose every step depends on the seed, the step's number and the state, and on nothing else."""

    seed: int = 0
    steps: int = 300
    snapshot_every: int = 20
    mode: str = "steps"
    #: Batch normalisation: buffers that change, samples that depend on each other.
    normalised: bool = True
    width: int = 80

    def build(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as they begin."""
        torch.manual_seed(self.seed)
        middle: nn.Module = nn.BatchNorm1d(self.width) if self.normalised else nn.Identity()
        model = nn.Sequential(
            nn.Linear(20, self.width), middle, nn.Tanh(), nn.Linear(self.width, self.width), nn.Tanh(),
            nn.Linear(self.width, 10),
        )  # fmt: skip
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(256, 20, generator=generator), torch.randint(10, (256,), generator=generator)

    def record(self, path: Path, tell: Tell, *, resume: bool) -> None:
        """Train and record; ``tell`` what is finished."""
        model, optimizer = self.build()
        (inputs, targets), loss = self.data(), nn.CrossEntropyLoss()
        first, logged = 0, True
        options: dict[str, Any] = {"snapshot_every": self.snapshot_every, "train_size": len(inputs)}
        if "mode" in inspect.signature(explaind.Recorder).parameters:
            options["mode"] = self.mode
        if resume:
            run = explaind.open_run(path, model=model)
            first = run.restore(model, optimizer)
            logged = not first or first in run.metrics.step
        with explaind.Recorder(path, model, optimizer, loss, resume=resume, **options) as recorder:
            tell("recorder")
            if not logged:  # killed between the step and its log
                recorder.log(norm=_norm(model))
            for s in range(first + 1, self.steps + 1):
                ids = torch.randperm(256, generator=torch.Generator().manual_seed(1000 * self.seed + s))[:32]
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 - s / self.steps / 2)
                optimizer.zero_grad()
                for micro in ids.split(16):
                    (loss(model(inputs[micro]), targets[micro]) / 2).backward()
                    recorder.batch(inputs[micro], targets[micro], ids=micro, weight=0.5)
                optimizer.step()
                tell(f"step {s}")
                recorder.log(norm=_norm(model))
                if s % 10 == 0:
                    recorder.flush()
                    tell(f"written {s}")
            tell("closing")
        tell("closed")

    def open(self, path: Path) -> explaind.Run:
        """What was recorded."""
        return explaind.open_run(path, model=self.build()[0])


def _norm(model: nn.Module) -> torch.Tensor:
    return torch.stack([p.detach().double().square().sum() for p in model.parameters()]).sum()


def _digest(tree: Any) -> str:
    structure, tensors = trees.flatten(tree, "it")
    digest = blake2b(repr(structure).encode(), digest_size=16)
    for key, tensor in tensors.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprints(run: explaind.Run) -> list[str]:
    """What every step is, in all that the run tells of it."""
    found = [_digest({"theta": run.theta(0), "buffers": run.buffers(0)})]
    for s in run.steps:
        told: dict[str, Any] = {"theta": run.theta(s), "buffers": run.buffers(s), "groups": list(run.groups(s))}
        told["batch"] = [[m.ids, m.inputs, m.targets, m.weight] for m in run.batch(s).micro]
        try:
            told["gradients"] = run.gradients(s)
        except ExplaindError as error:  # a mode without gradients
            told["gradients"] = error.what
        found.append(_digest(told))
    return found


def metrics(run: explaind.Run) -> list[list[float]]:
    """What was logged, step by step."""
    found = run.metrics
    return [[float(s), float(v)] for s, v in zip(found.step, found.norm, strict=True)] if found else []


def questioned(run: explaind.Run) -> str:
    """The digest of an attribution along the whole run."""
    inputs = torch.randn(3, 20, generator=torch.Generator().manual_seed(9))
    result = explaind.attribute(
        run, inputs, keep=("layer", "test", "output"), output=explaind.Outputs([0]), nodes=1, progress=False
    )
    values = {str(n): torch.from_numpy(v.values.copy()) for n, v in result.data_vars.items() if v.ndim}
    return _digest(values)


@dataclass
class Recording:
    """A training, what it is when nothing goes wrong, and whether it is that after a kill."""

    training: Training
    file: str = "run"
    reference: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    logged: list[list[float]] = field(default_factory=list)
    answer: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """By its seed."""
        return f"seed {self.training.seed}"

    def work(self, path: Path, tell: Tell) -> None:
        """Record from the beginning."""
        self.training.record(path, tell, resume=False)

    def prepare(self, folder: Path) -> None:
        """Record without a kill."""
        path = folder / "reference"
        started = time.perf_counter()
        ended(*child(lambda tell: self.work(path, tell)))
        self.seconds = time.perf_counter() - started
        run = self.training.open(path)
        self.reference, self.logged, self.answer = fingerprints(run), metrics(run), questioned(run)
        self.files = _files(path)

    def examine(self, path: Path, messages: Sequence[str], findings: Findings, *, thorough: bool, what: str) -> None:
        """After a kill: read, take up, read again."""
        made, written = (last(messages, kind) for kind in ("step", "written"))
        begun = (path / "manifest.json").exists()
        try:
            if begun:
                run = self.training.open(path)
                lost = max(written, made) - len(run.steps)
                if lost > 0:
                    findings.lost += lost
                    findings.notes.append(f"lost: {what}: {lost} steps of {made}, {written} written")
                if thorough or not _files(path).items() <= self.files.items():
                    found = fingerprints(run)
                    findings.check(found == self.reference[: len(found)], f"{what}: steps 1..{len(run.steps)} as left")
                findings.check(metrics(run) == self.logged[: len(metrics(run))], f"{what}: metrics as left")
            elif "recorder" in messages:
                findings.lost += 1
                findings.notes.append(f"lost: {what}: the recording had begun, and has no manifest")
            ended(*child(lambda tell: self.training.record(path, tell, resume=begun)))
            run = self.training.open(path)
            findings.check(run.complete, f"{what}: resumed to the end")
            if thorough or _files(path) != self.files:
                findings.check(fingerprints(run) == self.reference, f"{what}: steps after resuming")
            findings.check(metrics(run) == self.logged, f"{what}: metrics after resuming")
            if thorough:
                findings.check(questioned(run) == self.answer, f"{what}: an attribution after resuming")
        except Exception as error:
            findings.error(error, what)


def _files(path: Path) -> dict[str, str]:
    """What steps and batches are, as they lie there: where all files are the same, so is all that is read from them."""
    found = [p for name in ("steps", "batches") for p in (path / name).rglob("*.safetensors")]
    return {
        p.relative_to(path).as_posix(): blake2b(p.read_bytes(), digest_size=16).hexdigest()
        for p in [path / "start.safetensors", *found]
    }
