"""Attributions that are killed: questions about a run, and whether their results are what they would have been."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from killed_recordings import Training
from killing import Findings, Tell, child, ended, last

import explaind_core as explaind
from explaind_core.results import result_writer

attribution = importlib.import_module(
    "explaind_core.attribution.attribute"
)  # which the function of the same name hides


@dataclass
class Attribution:
    """A question, its answer when nothing goes wrong, and whether that is the answer after a kill."""

    name: str
    run: explaind.Run
    keep: tuple[str, ...]
    strategy: str
    block: int
    tests: int = 12
    file: str = "result.zarr"
    reference: Path = Path()
    seconds: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def axis(self) -> str:
        """Along which it is answered block by block."""
        return "test" if self.strategy == "adjoint" else "step"

    def work(self, path: Path, tell: Tell) -> None:
        """Ask, or go on asking."""
        self.ask(path, tell)

    def ask(self, out: Path | None, tell: Tell = id, *, warm: bool = False) -> None:
        """In a child, where what is changed here stays; or about one step, to warm up."""
        inputs = torch.randn(self.tests, 20, generator=torch.Generator().manual_seed(9))
        ask = partial(explaind.attribute, self.run, keep=self.keep, strategy=self.strategy, progress=False)
        if warm:
            ask(inputs[:1], steps=[1], nodes=1)
            return
        result_writer.BLOCK = self.block
        choose, append = attribution.choose, result_writer.ResultWriter.append
        attribution.choose = lambda *arguments: replace(choose(*arguments), rows=self.block)

        def reported(self: Any, block: Any, labels: Any) -> None:
            append(self, block, labels)
            tell(f"block {self.done}")

        result_writer.ResultWriter.append = reported
        result = ask(inputs, nodes="adaptive", out=out)
        if explaind.closure_error(result) > 1e-3:
            raise RuntimeError("the result does not close")
        tell("done")

    def prepare(self, folder: Path) -> None:
        """Ask without a kill."""
        started = time.perf_counter()
        path = self.reference = folder / self.file
        ended(*child(lambda tell: self.work(path, tell)))
        self.seconds = time.perf_counter() - started
        self.files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}

    def examine(self, path: Path, messages: Sequence[str], findings: Findings, *, thorough: bool, what: str) -> None:  # noqa: ARG002
        """After a kill: read, take up, read again; it is always all compared."""
        reported = last(messages, "block")
        try:
            done = int(ended(*child(lambda tell: self.read(path, tell)))[-1])
            if done < reported:
                findings.lost += 1
                findings.notes.append(f"lost: {what}: {reported} entries reported, {done} found")
            ended(*child(lambda tell: self.work(path, tell)))
            found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
            findings.check(found == self.files, f"{what}: the files of the result after resuming")
            findings.check(not path.with_name(path.name + ".explaind-writing").exists(), f"{what}: a lock was left")
        except Exception as error:
            findings.error(error, what)

    def read(self, path: Path, tell: Tell) -> None:
        """Tell how much of an interrupted result is finished, after comparing it."""
        try:
            part = explaind.open_result(path, unfinished=True).load()
        except explaind.errors.StoreError as error:
            if error.what not in ("there is no result here", "the result is unfinished"):
                raise
            tell("0")
            return
        whole = explaind.open_result(self.reference).load()
        if self.axis in part.dims and part.sizes[self.axis] < whole.sizes[self.axis]:
            # What is joined over blocks is not yet what it will be.
            names = [n for n, v in part.data_vars.items() if self.axis in v.dims]
            whole, part = (d[names].isel({self.axis: slice(0, part.sizes[self.axis])}) for d in (whole, part))
            whole.attrs = part.attrs = {}
        if not part.identical(whole):
            raise RuntimeError("the finished part differs")
        tell(f"{part.sizes[self.axis]}")


def questions(folder: Path, steps: int, tests: int = 12) -> list[Attribution]:
    """A recorded run, and questions about it that are answered along steps and along test samples."""
    training = Training(steps=steps, normalised=False, width=16, snapshot_every=20)
    ended(*child(lambda tell: training.record(folder / "run", tell, resume=False)))
    run = training.open(folder / "run")
    block = max(1, steps // 12)
    cases = [
        Attribution("forward", run, ("step", "layer", "test", "output"), "forward", block, tests),
        Attribution("adjoint", run, ("layer", "train", "test"), "adjoint", max(1, tests // 6), tests),
    ]
    for case in cases:  # what torch imports and traces at first use, once for all children
        case.ask(None, warm=True)
    return cases
