"""Runs of models that keep things in attributes: recorded, opened, explained, and left as they were."""

from __future__ import annotations

import logging
import queue
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn

import explaind_core as explaind
from support.module_copies import Data, X, Y, assert_untouched, state_of


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.f = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.attention = (self.q(x) * x).softmax(-1)
        return self.f(self.attention * x)


class Tracing(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        self.trace = {"scores": [self.attention, (self.attention.sum(),)], "n": len(x)}
        self.cache = types.SimpleNamespace(value=result)
        return result


class Smoothed(Attention):
    """A buffer that is written with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        if self.training:
            self.mean = 0.9 * self.mean.detach() + 0.1 * self.attention.mean(0)
        return result


class Guarded(Attention):
    """What a run may hold on to: derivatives forbid to write to tensors that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.logger, self.data = threading.Lock(), logging.getLogger("guarded"), Data()
        self.bound, self.parts = self.q.forward, [self.q, {"f": self.f}]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.kept = self.bound(x) + self.parts[0](x)
            return self.parts[1]["f"](self.kept.tanh())


class Hooked(Attention):
    """Hooks that keep activations and gradients, as tools that look into a model do."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {}
        self.q.register_forward_hook(self.keep("q"))
        self.f.register_forward_pre_hook(lambda _module, inputs: self.kept.update(inputs=inputs))
        self.handle = self.f.register_full_backward_hook(lambda _module, given, _out: self.kept.update(given=given))

    def keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            self.kept[name] = output

        return hook


@pytest.fixture(scope="module", autouse=True)
def file(tmp_path_factory):
    with open(tmp_path_factory.mktemp("log") / "calls.txt", "w") as Written.file_of_all:
        yield


class Written(Attention):
    """An open file, and a logger, that every call writes to."""

    file_of_all: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.file, self.logger = self.file_of_all, logging.getLogger("written")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        print(tuple(x.shape), file=self.file)
        self.logger.debug("%s", x.shape)
        return result


class Threaded(Attention):
    """A queue, a condition and a thread-local beside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.ready, self.local = queue.Queue(), threading.Condition(), threading.local()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with self.ready:
            self.queue.put(super().forward(x))
            return self.queue.get()


class Numbered(Attention):
    """A generator function that is half way through, and a random generator for what is only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = (k for k in range(10**6))
        self.random = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        next(self.numbers)
        torch.rand(3, generator=self.random)
        return super().forward(x)


def recorded(path: Any, model: nn.Module, mode: str = "steps") -> explaind.Run:
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(path, model, optimizer, loss, mode=mode) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            loss(model(X), Y).backward()
            recorder.batch(X, Y, ids=torch.arange(5))
            optimizer.step()
    return explaind.open_run(path, model=model)


MODELS = [Attention, Tracing, Smoothed, Guarded, Hooked, Written, Threaded, Numbered]


@pytest.mark.parametrize("mode", ["steps", "parameters", "snapshots"])
@pytest.mark.parametrize("make", MODELS)
def test_runs_of_modules_that_keep_what_they_compute(tmp_path, make, mode):
    torch.manual_seed(0)
    model = make()
    run = recorded(tmp_path / "run", model, mode)
    before = state_of(model)
    assert explaind.verify(run, X[:2], progress=False).agreement > 0.999
    result = explaind.attribute(run, X[:2], keep=("step", "train", "test"), progress=False)
    assert explaind.closure_error(result) < 1e-3
    assert_untouched(before, model)
    again = explaind.open_run(run.path, model=run.model)  # a copy of a copy that derivatives ran through
    assert explaind.verify(again, X[:2], progress=False).agreement > 0.999
    run.close()
