"""What must be there of a run, as plain values; a training of three parameters; what must not be."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass, field

import torch
from torch import nn

SNAPSHOT_EVERY = 2
SECONDS = 30
TESTS = torch.tensor([[1.0, -1.0, 0.5], [0.25, 2.0, 0.0]], dtype=torch.float64)


class Violation(AssertionError):  # noqa: N818 (of a promise)
    """What must not be: ``kind`` is ``lost``, ``wrong``, ``raw`` or ``hang``."""

    def __init__(self, kind, what):
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class Hang(BaseException):
    """A call has not returned."""


@contextlib.contextmanager
def within(seconds):
    """Ends what takes longer, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_):
        raise Hang

    handler, (left, _) = signal.signal(signal.SIGALRM, late), signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - started)))


@dataclass(frozen=True)
class Step:
    """What a step was trained on and left: ids, inputs, learning rate, parameters and momentum, as plain values."""

    ids: tuple
    inputs: tuple
    lr: float
    theta: tuple
    momentum: tuple | None


@dataclass
class Place:
    """A run, and what must be there of it.

    Attributes:
        steps: all that was trained, 0 being the start.
        floor: behind which step nothing may be missing now.
        promised: behind which not even after a loss of power.
        began: a Recorder was made, so that there is a run.
        torn: a loss of power may have left steps in parts.
        epoch: counts whenever steps may have been taken back: readers from before may be told so.
        results: where, and of which state, a result was asked.
    """

    path: str
    durable: str
    behind: int
    steps: dict = field(default_factory=dict)
    floor: int = 0
    promised: int = 0
    began: bool = False
    torn: bool = False
    epoch: int = 0
    live: object = None
    results: list = field(default_factory=list)

    @property
    def local(self):
        return "://" not in self.path

    def allowed(self):
        """Lengths that the run may have."""
        return range(self.floor, max(self.steps, default=0) + 1)


def plain(tensor):
    return tuple(tensor.detach().double().flatten().tolist())


class Training:
    """Three parameters, SGD with momentum, batches of two."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Linear(3, 1, bias=False).double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.loss = nn.MSELoss()

    def stands(self, ids=(), inputs=()):
        found = self.optimizer.state.get(self.model.weight, {}).get("momentum_buffer")
        lr = self.optimizer.param_groups[0]["lr"]
        return Step(tuple(ids), inputs, lr, plain(self.model.weight), None if found is None else plain(found))

    def step(self, s, seed, recorder):
        """Returns what it did; also where the recorder then fails."""
        generator = torch.Generator().manual_seed(1000 * seed + s)
        inputs = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        ids = torch.randperm(8, generator=generator)[:2]
        self.optimizer.zero_grad()
        self.loss(self.model(inputs), inputs[:, :1]).backward()
        recorder.batch(inputs, inputs[:, :1].clone(), ids=ids)
        return ids, inputs
