"""A matrix of models x loop features x optimizers: each trained, recorded, opened and explained.

``make matrix`` prints the table; ``attribution/test_loop_matrix.py`` checks every cell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import explaind_core as explaind
from explaind_core.data import IndexedDataset, indexed_loader
from support.loop_models import CLASSES, CROSS_ENTROPY, MODELS, OPTIMIZERS, SAMPLES, STEPS


# ---------------------------------------------------------------------- the loop
@dataclass
class Loop:
    """A training loop with everything that a feature may change.

    Attributes:
        weights: of the micro-batches of a step. clip: called with the recorder before the step.
        loss: as trained with. target: of a batch, from its ids. penalty: added to the loss.
        split: makes the optimizers. opened: further arguments of ``open_run``.
    """

    model: nn.Module
    data: Tensor
    targets: Tensor
    make: Callable[[Any], torch.optim.Optimizer]
    loss: Callable[..., Tensor] = CROSS_ENTROPY
    batches: list[list[list[int]]] = field(default_factory=list)
    steps: int = STEPS
    autocast: torch.dtype | None = None
    clip: Callable[[explaind.Recorder], object] | None = None
    penalty: Callable[[Any], Tensor] | None = None
    target: Callable[[Tensor], Any] | None = None
    augment: Callable[[Tensor], Tensor] | None = None
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None
    overflow: int | None = None  # the step whose loss is infinite
    closure: bool = False
    called: Callable[..., Tensor] | None = None  # a compiled model
    before: Callable[[int], object] = id
    recorder_options: dict[str, Any] = field(default_factory=dict)
    unrecorded: int = 0

    def train(self, path: Path) -> explaind.Run:
        self.optimizers = self.optimizers or [self.make([p for p in self.model.parameters() if p.requires_grad])]
        for s in range(self.unrecorded):
            self.step(None, s)
        several = self.optimizers if len(self.optimizers) > 1 else self.optimizers[0]
        watched = self.model if self.called is None else self.called
        with explaind.Recorder(
            path, watched, several, self.loss, penalty=self.penalty, scaler=self.scaler, **self.recorder_options
        ) as recorder:
            for s in range(self.steps):
                self.before(s)
                self.step(recorder, s)
        self.skipped = recorder.skipped
        return explaind.open_run(path, model=self.model, loss=self.loss, penalty=self.penalty)

    def step(self, recorder: explaind.Recorder | None, s: int) -> None:
        micro = self.batches[s % len(self.batches)]

        def gradients(declare: bool = True) -> Tensor:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            total = torch.zeros(())
            for k in micro:
                ids, weight = torch.tensor(k), len(k) / sum(map(len, micro))
                inputs = self.data[ids] if self.augment is None else self.augment(self.data[ids])
                targets = self.targets[ids] if self.target is None else self.target(ids)
                cast = nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)
                with cast:
                    value = self.loss((self.model if self.called is None else self.called)(inputs), targets)
                value = value.mean() * (weight if len(micro) > 1 else 1.0)
                if self.overflow == s and recorder is not None:
                    value = value * float("inf")
                (value if self.scaler is None else self.scaler.scale(value)).backward()
                if declare and recorder is not None:
                    recorder.batch(inputs, targets, ids=ids, weight=weight if len(micro) > 1 else 1.0)
                total = total + value.detach()
            if self.penalty is not None:
                self.penalty(dict(self.model.named_parameters())).backward()
            return total

        if self.closure:
            for optimizer in self.optimizers:
                optimizer.step(gradients)
            return
        gradients()
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        if self.clip is not None and recorder is not None:
            self.clip(recorder)
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()


# ---------------------------------------------------------------------- features
def plain(loop: Loop) -> None:
    """Nothing but batches."""


def accumulation(loop: Loop) -> None:
    loop.batches = [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15]]]


def ragged(loop: Loop) -> None:
    loop.batches = [[[0, 1, 2, 3, 4, 5, 6]], [[7, 8, 9, 10, 11, 12, 13]], [[14, 15]]]


def repeated(loop: Loop) -> None:
    loop.batches = [[[0, 0, 1, 2]], [[3, 3, 3, 4]], [[5, 6, 0, 6]]]


def clipping(loop: Loop) -> None:
    loop.clip = lambda recorder: recorder.clip_grad_norm_(0.05)


def clipping_by_value(loop: Loop) -> None:
    loop.clip = lambda recorder: recorder.clip_grad_value_(0.01)


def autocast(loop: Loop) -> None:
    loop.autocast, loop.model, loop.data = torch.bfloat16, loop.model.float(), single(loop.data)


def scaler(loop: Loop) -> None:
    """The third step overflows, and is skipped."""
    loop.scaler, loop.overflow = torch.amp.GradScaler("cpu", init_scale=256.0), 2


class Weighted(nn.Module):
    """Every sample has a weight; the normaliser is that of the batch."""

    def forward(self, output: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
        labels, weights = target
        return (weights * nn.functional.cross_entropy(output, labels, reduction="none")).sum() / weights.sum()


def sample_weights(loop: Loop) -> None:
    weights = torch.linspace(0.2, 2, SAMPLES, dtype=torch.float64)
    loop.loss, loop.target = Weighted(), lambda ids: (loop.targets[ids], weights[ids])


def class_weights(loop: Loop) -> None:
    loop.loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))


def summed(loop: Loop) -> None:
    loop.loss = nn.CrossEntropyLoss(reduction="sum")
    make = loop.make
    loop.make = lambda p: halved(make(p))


def halved(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["lr"] /= 8
    return optimizer


def per_sample(loop: Loop) -> None:
    loop.loss = nn.CrossEntropyLoss(reduction="none")


def penalised(loop: Loop) -> None:
    loop.penalty = lambda parameters: 0.01 * sum(p.pow(2).sum() + p.abs().sum() for p in parameters.values())


def frozen(loop: Loop) -> None:
    next(loop.model.parameters()).requires_grad_(False)


def joining(loop: Loop) -> None:
    """The head's bias joins after two steps."""
    last = list(loop.model.parameters())[-1]
    loop.optimizers = [loop.make([p for p in loop.model.parameters() if p is not last])]
    loop.before = lambda s: loop.optimizers[0].add_param_group({"params": [last]}) if s == 2 else None


def unfreezing(loop: Loop) -> None:
    first = next(loop.model.parameters()).requires_grad_(False)
    loop.optimizers = [loop.make(loop.model.parameters())]
    loop.before = lambda s: first.requires_grad_(s >= 2)


def several(loop: Loop) -> None:
    """Muon for hidden matrices, the cell's own optimizer for the rest."""
    matrices = [p for n, p in loop.model.named_parameters() if p.ndim == 2 and n not in ("embedding.weight",)]
    others = [p for p in loop.model.parameters() if not any(p is m for m in matrices)]
    loop.optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1), loop.make(others)]


def several_scaled(loop: Loop) -> None:
    several(loop)
    scaler(loop)


def closure(loop: Loop) -> None:
    loop.closure = True


def compiled(loop: Loop) -> None:
    loop.called = torch.compile(loop.model, backend="eager")


def scheduled(loop: Loop) -> None:
    loop.optimizers = [loop.make(loop.model.parameters())]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        loop.optimizers[0], max_lr=0.05, total_steps=STEPS + 1, cycle_momentum=False
    )
    loop.before = lambda s: schedule.step() if s else None


def resumed(loop: Loop) -> None:
    """Recording begins with a used optimizer."""
    loop.unrecorded = 3


def augmented(loop: Loop) -> None:
    """Noise on the inputs: the batch is kept as it was seen."""
    if loop.data.is_floating_point():
        loop.augment = lambda x: x + 0.1 * torch.randn_like(x)
    else:
        loop.augment = lambda x: torch.where(torch.rand(x.shape) < 0.2, 0, x)


def snapshots(loop: Loop) -> None:
    loop.recorder_options = {"mode": "snapshots", "snapshot_every": 4}


def only_parameters(loop: Loop) -> None:
    loop.recorder_options = {"mode": "parameters"}


def single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def single_precision(loop: Loop) -> None:
    loop.model, loop.data = loop.model.float(), single(loop.data)


def workers(loop: Loop) -> None:
    """Batches come from a loader with two processes."""
    loader = indexed_loader(
        IndexedDataset(TensorDataset(loop.data, loop.targets)), batch_size=6, shuffle=True, num_workers=2,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    loop.batches = [[batch.ids.tolist()] for batch in loader]
    loop.steps = len(loop.batches) * 2


FEATURES: dict[str, Callable[[Loop], None]] = {
    "plain": plain, "accumulation, ragged": accumulation, "ragged last batch": ragged, "repeated samples": repeated,
    "clip_grad_norm_": clipping, "clip_grad_value_": clipping_by_value, "autocast bfloat16": autocast,
    "GradScaler, a skipped step": scaler, "sample weights": sample_weights, "class weights": class_weights,
    "summed loss": summed, "per-sample losses": per_sample, "penalty": penalised, "frozen parameters": frozen,
    "parameters that join": joining, "parameters unfrozen": unfreezing, "Muon beside": several,
    "Muon beside, GradScaler": several_scaled, "step(closure)": closure, "torch.compile": compiled,
    "scheduler": scheduled, "resumed (prehistory)": resumed, "augmentation, stored": augmented,
    "loader workers": workers, "mode snapshots": snapshots, "mode parameters": only_parameters,
    "float32": single_precision,
}  # fmt: skip
#: Every feature with the MLP and AdamW, and with two of the others in turn; every model with every optimizer.
CELLS: list[tuple[str, str, str]] = list(
    dict.fromkeys(
        [("MLP", feature, "AdamW") for feature in FEATURES]
        + [
            (list(MODELS)[1 + index % 3], feature, list(OPTIMIZERS)[(index + shift) % 4])
            for shift in (0, 2)
            for index, feature in enumerate(FEATURES)
        ]
        + [(model, "plain", optimizer) for model in MODELS for optimizer in OPTIMIZERS]
    )
)


@contextmanager
def recorded(model: str, feature: str, optimizer: str) -> Iterator[tuple[explaind.Run, Loop]]:
    """One cell's run, in a temporary folder."""
    make_model, make_data = MODELS[model]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = make_data(generator)
    loop = Loop(
        make_model().double(),
        data.double() if data.is_floating_point() else data,
        torch.randint(CLASSES, (SAMPLES,), generator=generator),
        OPTIMIZERS[optimizer],
        batches=[[[0, 1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10]], [[11, 12, 13, 14, 15]]],
    )
    FEATURES[feature](loop)
    with tempfile.TemporaryDirectory(prefix="explaind-cell-") as folder:
        yield loop.train(Path(folder) / "run"), loop


@dataclass(frozen=True)
class Outcome:
    """What one cell shows.

    Attributes:
        error, rounding: the largest relative error of an update, and what rounding can make of it.
        closure: of a result with samples summed, and of one with samples kept, relative to the largest output.
        residual: the largest part of what f changed by that no term explains. terms: of the latter result.
    """

    error: float
    rounding: float
    closure: float
    residual: float
    terms: tuple[str, ...]
    facts: dict[str, Any]


def measure(run: explaind.Run, loop: Loop) -> Outcome:
    """Decompose and attribute a cell's run."""
    splits = list(explaind.decompose(run))
    inputs = loop.data[:3]
    summed_up = explaind.attribute(run, inputs, keep=("step", "layer", "test", "output"), nodes=8, progress=False)
    kept = explaind.attribute(run, inputs, keep=("train", "test"), nodes=8, progress=False)
    scale = float(abs(summed_up.final).max())
    changed = float(abs(kept.final - kept.initial).max())
    return Outcome(
        error=max(split.error for split in splits),
        rounding=max(split.rounding for split in splits),
        closure=max(explaind.closure_error(result) for result in (summed_up, kept)) / scale,
        residual=float(abs(kept.residual).max()) / changed,
        terms=tuple(n for n in ("prehistory", "penalty", "unattributed", "statistics") if n in kept),
        facts={k: kept.attrs[k] for k in ("gradient_factor", "unattributed_gradient") if k in kept.attrs},
    )


def main() -> None:
    """Print the table."""
    table = Table(title=f"{len(CELLS)} cells", show_lines=False)
    for column in ("model", "feature", "optimizer", "update error", "/ rounding", "closure", "residual", "terms"):
        table.add_column(column)
    for cell in CELLS:
        with recorded(*cell) as (run, loop):
            found = measure(run, loop)
        table.add_row(
            *cell, f"{found.error:.1e}", f"{found.error / found.rounding:.2f}", f"{found.closure:.1e}",
            f"{found.residual:.1e}", ", ".join(found.terms),
        )  # fmt: skip
    Console(width=170).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
