"""Killing children: what a kill may cost, kills at random moments, kills at every write in turn. Linux only.

Children are forked from one process that has imported torch, and report what they have finished through a pipe.
"""

from __future__ import annotations

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
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

CONTEXT = multiprocessing.get_context("fork")
#: How a child ends that found something wrong, or kills itself.
WRONG, KILLED = 3, 9
#: Tells what is finished.
Tell = Callable[[str], object]


class Case(Protocol):
    """A piece of work that is killed, and what it is when nothing goes wrong.

    Attributes:
        file: what its work is called where it lies.
        seconds: how long it takes.
    """

    file: str
    seconds: float

    @property
    def name(self) -> str:
        """As reports say it."""

    def prepare(self, folder: Path) -> None:
        """Do it without a kill, in this folder."""

    def work(self, path: Path, tell: Tell) -> None:
        """Do it at this path, in a child; ``tell`` what is finished."""

    def examine(self, path: Path, messages: Sequence[str], findings: Findings, *, thorough: bool, what: str) -> None:
        """After a kill: read, take up, read again."""


@dataclass
class Findings:
    """Counts over all kills.

    Attributes:
        phases: kills by what the child had last reported.
        lost: what was reported as finished, and is gone.
        wrong: what differs from what it would have been, and nothing said so.
        unclear: errors where there should be none.
        unfinished: children that were over before their kill.
        notes: what was lost, wrong or unclear, one by one.
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


def killed(case: Case, path: Path, draw: random.Random, findings: Findings) -> tuple[float, list[str]]:
    """Kill a child at a random moment of its time; when it was, and what it had told."""
    while True:
        moment = draw.uniform(0, case.seconds)
        process, receive = child(lambda tell: case.work(path, tell))
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


def random_kills(title: str, cases: Sequence[Case], kills: int, draw: random.Random) -> bool:
    """Kill the cases in turn, each at random moments; whether nothing was lost. The counts are printed."""
    started, findings = time.perf_counter(), Findings()
    with tempfile.TemporaryDirectory(prefix="explaind-kills-") as name:
        folder = Path(name)
        for i, case in enumerate(cases):
            (folder / f"{i}").mkdir()
            case.prepare(folder / f"{i}")
        for kill in range(kills):
            case = cases[kill % len(cases)]
            path = folder / case.file
            moment, messages = killed(case, path, draw, findings)
            findings.phases[phase(messages)] += 1
            what = f"kill {kill}, {case.name}, after {moment:.3f} s"
            case.examine(path, messages, findings, thorough=kill % 10 == 0, what=what)
            if kill % 50 == 49:
                print(f"{kill + 1} kills", file=sys.stderr, flush=True)
            shutil.rmtree(path, ignore_errors=True)
    print(findings.table(f"{title}, killed at random moments", time.perf_counter() - started), flush=True)
    return findings.holds


def kills_at_writes(title: str, case: Case, stride: int) -> bool:
    """Kill a case at every write, or at every so many; whether nothing was lost. The counts are printed."""
    holds = True
    with tempfile.TemporaryDirectory(prefix="explaind-kills-") as name:
        reference, folder = Path(name) / "reference", Path(name) / "killed"
        reference.mkdir()
        folder.mkdir()
        case.prepare(reference)
        started = time.perf_counter()
        for findings in every_write(case, folder, stride):
            print(findings.table(f"{title}, killed at every write", time.perf_counter() - started), flush=True)
            holds &= findings.holds
    return holds


def phase(messages: Sequence[str]) -> str:
    """What a child had reached, by what it told last."""
    latest = messages[-1] if messages else "start-up"
    if latest.startswith(("step", "written", "block")):
        return "behind the first " + latest.split()[0].replace("written", "step")
    known = {"recorder": "before the first step", "start-up": "at the start", "closed": "when closed"}
    return known.get(latest, latest)


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


def every_write(case: Case, folder: Path, stride: int) -> Iterator[Findings]:
    """Kill at every write in turn, until there is none left; or at every so many, other ones torn than not."""
    path = folder / case.file
    for torn in (False, True):
        findings, kind = Findings(), "in the middle of a write" if torn else "before a write"

        def work(tell: Tell, position: int, torn: bool = torn) -> None:
            deadly(folder, position, torn)
            case.work(path, tell)

        for position in range(torn * (stride // 2), 10_000, stride):
            process, receive = child(work, position)
            messages = told(receive)
            process.join()
            if process.exitcode == 0:
                break
            if process.exitcode not in (KILLED, -signal.SIGXFSZ):
                findings.error(RuntimeError(messages[-1] if messages else process.exitcode), f"write {position}")
            findings.phases[f"{kind}, {phase(messages)}"] += 1
            case.examine(path, messages, findings, thorough=True, what=f"{kind} {position}")
            _empty(folder)
        _empty(folder)
        yield findings


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
