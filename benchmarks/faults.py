"""Kills, and what they cost: kill -9 of recordings and of attributions, at random moments or at every write in turn.

    python benchmarks/faults.py recording               200 random kills of a training of 300 steps
    python benchmarks/faults.py attribution             50 random kills of attribute(..., out=)
    python benchmarks/faults.py writes                  a short recording and short attributions, killed at every write

After each kill everything that was finished must be readable and what it would have been, and another process takes
it up until the end, where it must be what it would have been without the kill, bit by bit. Exit status 0 means that
nothing was lost, nothing wrong and no error unclear. Children are forked from one process that has imported torch, and
report what they have finished through a pipe, so what a kill costs is measured. Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import explaind_core as explaind
from explaind_core import trees
from explaind_core.errors import ExplaindError
from explaind_core.results import result_writer as appending

attribution = importlib.import_module(
    "explaind_core.attribution.attribute"
)  # which the function of the same name hides
CONTEXT = multiprocessing.get_context("fork")
#: How a child ends that found something wrong, or kills itself.
WRONG, KILLED = 3, 9


# ---------------------------------------------------------------------- what is recorded
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

    def record(self, path: Path, tell: Callable[[str], object], *, resume: bool) -> None:
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


# ---------------------------------------------------------------------- what went wrong
@dataclass
class Findings:
    """Counts over all kills.

    Attributes:
        phases: kills by what the child had last reported. lost: reported as finished, and gone. wrong: differs from
            what it would have been, and nothing said so. unclear: errors where there should be none.
    """

    phases: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    wrong: int = 0
    unclear: int = 0
    unfinished: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether a kill costs what was unfinished and nothing else."""
        return not (self.lost or self.wrong or self.unclear)

    def table(self, title: str, seconds: float) -> str:
        """All counts, and the first notes."""
        lines = [title, *(f"  killed {phase:<50} {count:>5}" for phase, count in sorted(self.phases.items()))]
        lines += [
            f"  {'kills':<57} {sum(self.phases.values()):>5}",
            f"  {'finished work lost':<57} {self.lost:>5}",
            f"  {'wrong results':<57} {self.wrong:>5}",
            f"  {'unclear errors':<57} {self.unclear:>5}",
            f"  {'runs that ended before their kill':<57} {self.unfinished:>5}",
            f"  {seconds:.0f} s",
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes[:20])])

    def check(self, right: bool, what: str) -> None:
        """Count what is not right."""
        if not right:
            self.wrong += 1
            self.notes.append(f"wrong: {what}")

    def error(self, error: BaseException, what: str) -> None:
        """An error where there should be none, however clear it is."""
        self.unclear += 1
        self.notes.append(f"{what}: {''.join(traceback.format_exception(error))}")


def child(function: Callable[..., object], *arguments: Any) -> tuple[Any, Connection]:
    """Start a forked process; ``function`` gets what tells, first."""
    receive, send = CONTEXT.Pipe(duplex=False)

    def main() -> None:
        receive.close()
        try:
            function(lambda text: send.send_bytes(text.encode()), *arguments)
        except BaseException:
            send.send_bytes(f"error {traceback.format_exc()}".encode())
            os._exit(WRONG)
        os._exit(0)

    process = CONTEXT.Process(target=main)
    process.start()
    send.close()
    return process, receive


def told(receive: Connection) -> list[str]:
    """All that a child that is over has told."""
    found = []
    while True:
        try:
            found.append(receive.recv_bytes().decode())
        except (EOFError, OSError):  # a message that the kill cut short is none
            receive.close()
            return found


def last(messages: Sequence[str], kind: str) -> int:
    """The number in the last message of a kind, 0 if there is none."""
    return max((int(m.split()[1]) for m in messages if m.startswith(kind + " ")), default=0)


def ended(process: Any, receive: Connection) -> list[str]:
    """What a child told that must end by itself; its error, if it does not."""
    found = told(receive)
    process.join()
    if process.exitcode:
        raise RuntimeError(found[-1] if found else f"exit status {process.exitcode}")
    return found


def killed(
    case: Recording | Attribution, go: Callable[..., object], path: Path, draw: random.Random, findings: Findings
) -> tuple[float, list[str]]:
    """Kill a child at a random moment of its time; when it was, and what it had told."""
    while True:
        moment = draw.uniform(0, case.seconds)
        process, receive = child(go)
        started = time.perf_counter()
        process.join(moment)
        took = time.perf_counter() - started
        process.kill()
        process.join()
        messages = told(receive)
        if process.exitcode == -signal.SIGKILL:
            return moment, messages
        if process.exitcode:
            raise RuntimeError(messages[-1])
        # It was over: the machine is faster than it was when its time was taken.
        findings.unfinished += 1
        case.seconds = took
        shutil.rmtree(path)


# ---------------------------------------------------------------------- recordings
@dataclass
class Recording:
    """A training, what it is when nothing goes wrong, and whether it is that after a kill."""

    training: Training
    reference: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    logged: list[list[float]] = field(default_factory=list)
    answer: str = ""
    seconds: float = 0.0

    def prepare(self, folder: Path) -> None:
        """Record without a kill."""
        path = folder / "reference"
        started = time.perf_counter()
        ended(*child(lambda tell: self.training.record(path, tell, resume=False)))
        self.seconds = time.perf_counter() - started
        run = self.training.open(path)
        self.reference, self.logged, self.answer = fingerprints(run), metrics(run), questioned(run)
        self.files = _files(path)

    def examine(self, path: Path, messages: Sequence[str], findings: Findings, *, ask: bool, what: str) -> None:
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
                if ask or not _files(path).items() <= self.files.items():
                    found = fingerprints(run)
                    findings.check(found == self.reference[: len(found)], f"{what}: steps 1..{len(run.steps)} as left")
                findings.check(metrics(run) == self.logged[: len(metrics(run))], f"{what}: metrics as left")
            elif "recorder" in messages:
                findings.lost += 1
                findings.notes.append(f"lost: {what}: the recording had begun, and has no manifest")
            ended(*child(lambda tell: self.training.record(path, tell, resume=begun)))
            run = self.training.open(path)
            findings.check(run.complete, f"{what}: resumed to the end")
            if ask or _files(path) != self.files:
                findings.check(fingerprints(run) == self.reference, f"{what}: steps after resuming")
            findings.check(metrics(run) == self.logged, f"{what}: metrics after resuming")
            if ask:
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


def _phase(messages: Sequence[str]) -> str:
    latest = messages[-1] if messages else "start-up"
    if latest.startswith(("step", "written", "block")):
        return "behind the first " + latest.split()[0].replace("written", "step")
    known = {"recorder": "before the first step", "start-up": "at the start", "closed": "when closed"}
    return known.get(latest, latest)


def recordings(kills: int, steps: int, modes: Sequence[str], seed: int, seeds: int) -> bool:
    """Random kills of recordings; whether nothing was lost."""
    holds = True
    for mode in modes:
        started, findings, draw = time.perf_counter(), Findings(), random.Random(seed)
        with tempfile.TemporaryDirectory(prefix="explaind-kills-") as name:
            folder = Path(name)
            cases = [Recording(Training(seed=seed + i, steps=steps, mode=mode)) for i in range(min(seeds, kills))]
            for i, case in enumerate(cases):
                case.prepare(folder / f"{i}")
            for kill in range(kills):
                case, path = cases[kill % len(cases)], folder / "killed"
                moment, messages = killed(case, partial(_record, case.training, path), path, draw, findings)
                findings.phases[_phase(messages)] += 1
                what = f"kill {kill}, seed {case.training.seed}, after {moment:.3f} s"
                case.examine(path, messages, findings, ask=kill % 10 == 0, what=what)
                if kill % 50 == 49:
                    print(f"{kill + 1} kills", file=sys.stderr, flush=True)
                shutil.rmtree(path, ignore_errors=True)
        title = f"recording, mode {mode!r}: {steps} steps, killed at random moments"
        print(findings.table(title, time.perf_counter() - started), flush=True)
        holds &= findings.holds
    return holds


def _record(training: Training, path: Path, tell: Callable[[str], object]) -> None:
    training.record(path, tell, resume=False)


# ---------------------------------------------------------------------- attributions
@dataclass
class Attribution:
    """A question, its answer when nothing goes wrong, and whether that is the answer after a kill."""

    name: str
    run: explaind.Run
    keep: tuple[str, ...]
    strategy: str
    block: int
    tests: int = 12
    axis: str = ""
    seconds: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)

    def ask(self, out: Path | None, tell: Callable[[str], object] = id, *, warm: bool = False) -> None:
        """In a child, where what is changed here stays; or about one step, to warm up."""
        inputs = torch.randn(self.tests, 20, generator=torch.Generator().manual_seed(9))
        ask = partial(explaind.attribute, self.run, keep=self.keep, strategy=self.strategy, progress=False)
        if warm:
            ask(inputs[:1], steps=[1], nodes=1)
            return
        appending.BLOCK = self.block
        choose, append = attribution.choose, appending.ResultWriter.append
        attribution.choose = lambda *arguments: replace(choose(*arguments), rows=self.block)

        def reported(self: Any, block: Any, labels: Any) -> None:
            append(self, block, labels)
            tell(f"block {self.done}")

        appending.ResultWriter.append = reported
        result = ask(inputs, nodes="adaptive", out=out)
        if explaind.closure_error(result) > 1e-3:
            raise RuntimeError("the result does not close")
        tell("done")

    def prepare(self, folder: Path) -> None:
        """Ask without a kill."""
        started = time.perf_counter()
        path = folder / f"{self.name}.zarr"
        ended(*child(lambda tell: self.ask(path, tell)))
        self.seconds = time.perf_counter() - started
        self.files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        self.axis = "test" if self.strategy == "adjoint" else "step"

    def examine(self, path: Path, messages: Sequence[str], findings: Findings, reference: Path, what: str) -> None:
        """After a kill: read, take up, read again."""
        reported = last(messages, "block")
        try:
            done = int(ended(*child(lambda tell: self.read(path, reference, tell)))[-1])
            if done < reported:
                findings.lost += 1
                findings.notes.append(f"lost: {what}: {reported} entries reported, {done} found")
            ended(*child(lambda tell: self.ask(path, tell)))
            found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
            findings.check(found == self.files, f"{what}: the files of the result after resuming")
            findings.check(not path.with_name(path.name + ".lock").exists(), f"{what}: a lock was left")
        except Exception as error:
            findings.error(error, what)

    def read(self, path: Path, reference: Path, tell: Callable[[str], object]) -> None:
        """Tell how much of an interrupted result is finished, after comparing it."""
        try:
            part = explaind.open_result(path, unfinished=True).load()
        except explaind.errors.StoreError as error:
            if error.what not in ("there is no result here", "the result is unfinished"):
                raise
            tell("0")
            return
        whole = explaind.open_result(reference).load()
        if self.axis in part.dims and part.sizes[self.axis] < whole.sizes[self.axis]:
            # What is joined over blocks is not yet what it will be.
            names = [n for n, v in part.data_vars.items() if self.axis in v.dims]
            whole, part = (d[names].isel({self.axis: slice(0, part.sizes[self.axis])}) for d in (whole, part))
            whole.attrs = part.attrs = {}
        if not part.identical(whole):
            raise RuntimeError("the finished part differs")
        tell(f"{part.sizes[self.axis]}")


def _questions(folder: Path, steps: int, tests: int = 12) -> list[Attribution]:
    """A recorded run, and questions about it that are answered along steps and along test samples."""
    training = Training(steps=steps, normalised=False, width=16, snapshot_every=20)
    ended(*child(partial(_record, training, folder / "run")))
    run = training.open(folder / "run")
    block = max(1, steps // 12)
    cases = [
        Attribution("forward", run, ("step", "layer", "test", "output"), "forward", block, tests),
        Attribution("adjoint", run, ("layer", "train", "test"), "adjoint", max(1, tests // 6), tests),
    ]
    for case in cases:  # what torch imports and traces at first use, once for all children
        case.ask(None, warm=True)
    return cases


def attributions(kills: int, steps: int, seed: int) -> bool:
    """Random kills of attributions; whether nothing was lost."""
    holds, draw = True, random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="explaind-kills-") as name:
        folder = Path(name)
        for case in _questions(folder, steps):
            started, findings = time.perf_counter(), Findings()
            case.prepare(folder)
            for kill in range(kills // 2):
                path = folder / "killed.zarr"
                moment, messages = killed(case, partial(_ask, case, path), path, draw, findings)
                findings.phases[_phase(messages)] += 1
                what = f"{case.name}, kill {kill}, after {moment:.3f} s"
                case.examine(path, messages, findings, folder / f"{case.name}.zarr", what)
                shutil.rmtree(path, ignore_errors=True)
            title = f"attribution, {case.name}: blocks of {case.block} along {case.axis}, killed at random moments"
            print(findings.table(title, time.perf_counter() - started), flush=True)
            holds &= findings.holds
    return holds


def _ask(case: Attribution, path: Path, tell: Callable[[str], object]) -> None:
    case.ask(path, tell)


# ---------------------------------------------------------------------- every write in turn
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}


def deadly(folder: Path, position: int, torn: bool) -> None:
    """Kill this process at its write number ``position`` below ``folder``: before it, or, torn, in the middle of it.

    Opening a file for writing, renaming, removing and making folders are writes; Python tells of each beforehand. A
    write is torn by a limit of a file's size, whose signal kills.
    """
    seen, prefix, cut = [0], str(folder), [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            changes = (any(c in (mode or "") for c in "wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        elif event in _CHANGES:
            path, changes = arguments[0], True
        else:
            return
        if not changes or isinstance(path, int) or not os.fspath(path).startswith(prefix):
            return
        if cut[0]:  # the write was shorter than what it was cut to
            os._exit(KILLED)
        seen[0] += 1
        if seen[0] <= position:
            return
        if not torn or event != "open":
            os._exit(KILLED)
        cut[0] = True
        appended = os.path.getsize(path) if "a" in (arguments[1] or "") and os.path.exists(path) else 0
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (appended + 7, appended + 7))

    sys.addaudithook(hook)


def _deadly(tell: Callable[[str], object], folder: Path, position: int, torn: bool, go: Callable[..., object]) -> None:
    deadly(folder, position, torn)
    go(tell)


def every_write(
    folder: Path, go: Callable[..., object], examine: Callable[[Sequence[str], Findings, str], None], stride: int
) -> Iterator[Findings]:
    """Kill at every write in turn, until there is none left; or at every so many, other ones torn than not."""
    for torn in (False, True):
        findings = Findings()
        for position in range(torn * (stride // 2), 10_000, stride):
            process, receive = child(_deadly, folder, position, torn, go)
            messages = told(receive)
            process.join()
            if process.exitcode == 0:
                break
            kind = "in the middle of a write" if torn else "before a write"
            if process.exitcode not in (KILLED, -signal.SIGXFSZ):
                findings.error(RuntimeError(messages[-1] if messages else process.exitcode), f"write {position}")
            findings.phases[f"{kind}, {_phase(messages)}"] += 1
            examine(messages, findings, f"{kind} {position}")
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield findings


def _after(case: Recording, path: Path, messages: Sequence[str], findings: Findings, what: str) -> None:
    case.examine(path, messages, findings, ask=True, what=what)


def _after_asking(
    case: Attribution, path: Path, reference: Path, messages: Sequence[str], findings: Findings, what: str
) -> None:
    case.examine(path, messages, findings, reference, what)


def writes(modes: Sequence[str], stride: int, steps: int = 3) -> bool:
    """Every write of a short recording of each mode, and of a short attribution of each kind."""
    holds = True
    with tempfile.TemporaryDirectory(prefix="explaind-kills-") as name:
        base, folder = Path(name), Path(name) / "killed"
        folder.mkdir()
        for mode in modes:
            case = Recording(Training(steps=steps, snapshot_every=2, width=8, mode=mode))
            case.prepare(base / f"reference-{mode}")
            path = folder / "run"
            started = time.perf_counter()
            go = partial(_record, case.training, path)
            for findings in every_write(folder, go, partial(_after, case, path), stride):
                title = f"recording, mode {mode!r}: {steps} steps, killed at every write"
                print(findings.table(title, time.perf_counter() - started), flush=True)
                holds &= findings.holds
        for question in _questions(base, 4, 2):
            question.prepare(base)
            question = replace(question, block=2 if question.strategy == "forward" else 1)
            shutil.rmtree(base / f"{question.name}.zarr")
            question.prepare(base)
            path, reference = folder / "result.zarr", base / f"{question.name}.zarr"
            started = time.perf_counter()
            go, each = partial(_ask, question, path), stride if stride == 1 else 4 * stride  # many, and much alike
            for findings in every_write(folder, go, partial(_after_asking, question, path, reference), each):
                title = f"attribution, {question.name}: 2 blocks, killed at every write"
                print(findings.table(title, time.perf_counter() - started), flush=True)
                holds &= findings.holds
    return holds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recording", "attribution", "writes"])
    parser.add_argument("--kills", type=int, help="200 of recordings (of each mode), 50 of attributions")
    parser.add_argument("--steps", type=int, help="of the training: 300, or 60 for attributions")
    parser.add_argument("--modes", default="steps", help="of Recorder, separated by commas")
    parser.add_argument("--stride", type=int, default=1, help="writes: at every so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seeds", type=int, default=5, help="so many different trainings")
    given = parser.parse_args()
    modes = given.modes.split(",")
    if modes != ["steps"] and "mode" not in inspect.signature(explaind.Recorder).parameters:
        parser.error("this version records in one mode only: steps")
    torch.set_num_threads(1)  # and no thread before the forks
    if given.what == "recording":
        holds = recordings(given.kills or 200, given.steps or 300, modes, given.seed, given.seeds)
    elif given.what == "attribution":
        holds = attributions(given.kills or 50, given.steps or 60, given.seed)
    else:
        holds = writes(modes, given.stride)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
