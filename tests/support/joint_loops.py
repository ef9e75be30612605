"""Small trainings with several optimizers, and their runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import explaind_core as explaind

N = 8
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "descent": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.02, betas=(0.7, 0.9), weight_decay=0.3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "muon": lambda ps: torch.optim.Muon(ps, lr=0.05, weight_decay=0.2),
}
MUON = hasattr(torch.optim, "Muon")
#: The parameters of the first and of the second optimizer of a :class:`Joint`.
MATRICES, OTHERS = ("0.weight", "3.weight"), ("0.bias", "2.weight", "2.bias", "3.bias")


class Joint:
    """A model whose matrices and whose other parameters have an optimizer each; the same data at every iteration."""

    def __init__(self, first: str | Make = "muon", second: str | Make = "adamw", dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(2)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        makes = [OPTIMIZERS[m] if isinstance(m, str) else m for m in (first, second)]
        self.optimizers = [make(ps) for make, ps in zip(makes, (matrices, others), strict=True)]
        self.inputs = torch.randn(N, 3, generator=generator, dtype=dtype)
        self.targets = torch.randint(2, (N,), generator=generator)
        self.loss = nn.CrossEntropyLoss()

    def names(self, member: int) -> set[str]:
        held = {id(p) for g in self.optimizers[member].param_groups for p in g["params"]}
        return {n for n, p in self.model.named_parameters() if id(p) in held}

    def ids(self, s: int) -> torch.Tensor:
        return torch.arange(s, s + 5) % N

    def zero_grad(self, **options: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(**options)

    def backward(self, s: int, *, missing: Iterable[str] = ()) -> None:
        ids = self.ids(s)
        self.loss(self.model(self.inputs[ids]), self.targets[ids]).backward()
        for name, parameter in self.model.named_parameters():
            if name in missing:
                parameter.grad = None

    def declare(self, recorder: explaind.Recorder, s: int) -> None:
        ids = self.ids(s)
        recorder.batch(self.inputs[ids], self.targets[ids], ids=ids)

    def train(
        self,
        recorder: explaind.Recorder,
        pattern: Sequence[Sequence[int]],
        *,
        missing: Mapping[int, Iterable[str]] | None = None,
        first: int = 1,
        **zero: Any,
    ) -> None:
        """One iteration per entry of ``pattern``, in which these optimizers step, in this order."""
        for s, members in enumerate(pattern, first):
            self.zero_grad(**zero)
            self.backward(s, missing=(missing or {}).get(s, ()))
            self.declare(recorder, s)
            for member in members:
                self.optimizers[member].step()

    def same_weights(self, other: Joint) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.model.parameters(), other.model.parameters(), strict=True))


class Nobody:
    """Takes a recorder's place."""

    def batch(self, *_args: Any, **_options: Any) -> None:
        """Nothing."""


def closes(run: explaind.Run, inputs: torch.Tensor | None = None) -> float:
    """Every update is explained, in replay too, and so is a prediction; the largest update error."""
    worst = 0.0
    for split in explaind.decompose(run):
        assert split.drift == 0
        assert split.error <= 1e-12 + split.rounding
        worst = max(worst, split.error)
    if inputs is not None:
        result = explaind.attribute(run, inputs, nodes=2, progress=False)
        assert explaind.closure_error(result) <= 1e-12
    return worst


def opened(path: Any, joint: Joint, **options: Any) -> explaind.Run:
    return explaind.open_run(path, model=joint.model, **options)
