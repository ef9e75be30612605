"""Figures 3b and 8: train anew from parts of grokked checkpoints, everything else at random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import nn

from explaind_core.progress import counted
from explaind_studies.demo import accuracy, adamw
from explaind_studies.findings import Claim, Table
from explaind_studies.grokking.stages import CHECKPOINTS
from explaind_studies.grokking.subject import OUTER, Subject, names_of
from explaind_studies.workbook import Workbook

__all__ = [
    "LONGER", "PARTS", "RANDOM", "longer", "longer_claims", "pipeline_claims", "pipeline_table", "pipelines",
    "train_from_parts",
]  # fmt: skip

#: What is taken from checkpoints, by the paper's abbreviations.
PARTS = ("Att.", "Att.+Lin1")
#: The paper's words for what starts from nothing.
RANDOM = "random"
#: What is trained longer than the paper did: its Figure 3b, and attention alone.
LONGER = ((RANDOM, None), ("Att.", 1939), ("Att.+Lin1", 1539), ("Att.+Lin1", 1939))


def pipelines(book: Workbook, subject: Subject) -> xr.Dataset:
    """Accuracies over (start, seed, step), a part of the study for every start.

    ``start`` is ``"random"``, or what was taken from which of the paper's checkpoints: ``"Att. 1539"``.
    """
    starts = [(RANDOM, None), *((name, at) for name in PARTS for at in CHECKPOINTS)]
    return _restarted(book, subject, "pipeline", starts, subject.setting.restart_steps)


def longer(book: Workbook, subject: Subject) -> xr.Dataset:
    """The same over (start, seed, step) for :data:`LONGER` alone, in trainings of ``longer_steps``."""
    return _restarted(book, subject, "longer", LONGER, subject.setting.longer_steps)


def _restarted(
    book: Workbook, subject: Subject, prefix: str, starts: Sequence[tuple[str, int | None]], steps: int
) -> xr.Dataset:
    found, taken = [], []
    for name, at in starts:
        step = None if at is None else subject.stages.at(at)
        label = name if at is None else f"{name} {at}"
        file = f"{prefix}_" + label.lower().replace(". ", "_").replace(".+", "_").replace(" ", "_").rstrip(".")
        layers = () if at is None else OUTER[name]
        part = book.part(file, partial(train_from_parts, book, subject, layers, step, steps), f"({label}: step {step})")
        found.append(part.assign_coords(start=label))
        taken.append(-1 if step is None else step)
    joined = xr.concat(found, "start", coords="minimal", compat="override", join="exact")
    return joined.assign(taken_at=("start", taken))


def train_from_parts(
    book: Workbook, subject: Subject, layers: Sequence[str], step: int | None, steps: int | None = None
) -> xr.Dataset:
    """Train ``restarts`` models whose ``layers`` are those of the run after ``step``, the rest being drawn anew.

    The training is the run's own: full batch, AdamW, the same data; everything is trained, what was taken over, too.

    Args:
        book: the study.
        subject: its run.
        layers: what is taken over; ``()`` for nothing.
        step: after which step of the run; None for none.
        steps: the trainings' length, by default the setting's.

    Returns:
        ``train_accuracy`` over (seed, step) before every step, ``test_accuracy`` over (seed, tested).
    """
    setting, task = subject.setting, subject.task
    steps, every = steps or setting.restart_steps, setting.test_every
    train = np.zeros((setting.restarts, steps))
    test = np.zeros((setting.restarts, steps // every + 1))
    taken = {} if step is None else subject.run.theta(step)
    loss = nn.NLLLoss()
    with counted(setting.restarts * steps, "training from parts", enabled=book.progress) as advance:
        for seed in range(setting.restarts):
            torch.manual_seed(1000 + seed)
            model = subject.model()
            wanted = names_of(layers, model) if layers else []
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in wanted:
                        parameter.copy_(taken[name])
            optimizer = adamw(model, setting)
            for s in range(steps):
                if s % every == 0:
                    test[seed, s // every] = accuracy(model, task.test_inputs, task.test_targets)
                optimizer.zero_grad()
                output = model(task.train_inputs)
                loss(output, task.train_targets).backward()
                train[seed, s] = float((output.argmax(-1) == task.train_targets).double().mean())
                optimizer.step()
                advance(1)
            test[seed, -1] = accuracy(model, task.test_inputs, task.test_targets)
    return xr.Dataset(
        {"train_accuracy": (("seed", "step"), train), "test_accuracy": (("seed", "tested"), test)},
        coords={
            "seed": 1000 + np.arange(setting.restarts), "step": np.arange(steps),
            "tested": np.append(np.arange(0, steps, every), steps)[: test.shape[1]],
        },
    )  # fmt: skip


def _reached(curves: xr.DataArray, level: float) -> float:
    """The first step at which the mean test accuracy is at least ``level``; NaN where it never is."""
    mean = curves.mean("seed")
    over = (mean >= level).values
    return float(mean.tested.values[int(over.argmax())]) if over.any() else float("nan")


def _gap(one: xr.Dataset) -> float:
    """By how much mean training accuracy exceeds mean test accuracy at most, where both were measured."""
    train = one.train_accuracy.mean("seed").sel(step=one.tested.values[:-1]).values
    return float((train - one.test_accuracy.mean("seed").values[:-1]).max())


def pipeline_table(found: xr.Dataset, name: str = "pipelines") -> Table:
    """What every start reaches."""
    rows = []
    for start in found.start.values:
        one = found.sel(start=start)
        test, train = one.test_accuracy.isel(tested=-1), one.train_accuracy.isel(step=-1)
        rows.append([
            str(start).split(" ")[0], int(str(start).split(" ")[1]) if " " in str(start) else None,
            int(one.taken_at) if int(one.taken_at) >= 0 else None, float(test.mean()), float(test.std()),
            float(train.mean()), float(train.std()), *(_reached(one.test_accuracy, level) for level in (0.5, 0.95)),
            100 * _gap(one),
        ])  # fmt: skip
    figures = "Figures 3b and 8" if name == "pipelines" else "Figure 3b, trained on,"
    return Table(
        name, f"{figures} in numbers: training from parts of checkpoints",
        ("taken over", "paper's checkpoint", "this run's step", "test accuracy at the end", "deviation",
         "training accuracy at the end", "deviation ", "mean test accuracy of 50 % at step", "of 95 % at step",
         "largest gap of mean training and test accuracy, points"),
        rows, f"Mean and deviation over {found.sizes['seed']} seeds, after {int(found.tested[-1])} steps.",
    )  # fmt: skip


def pipeline_claims(found: xr.Dataset) -> list[Claim]:
    """Section 5.1's claims about the representation pipeline."""
    last = found.test_accuracy.isel(tested=-1).mean("seed")
    steps = int(found.tested[-1])
    final, alone, before = (
        last.sel(start=f"{n} {at}") for n, at in (("Att.+Lin1", 1939), ("Att.", 1939), ("Att.+Lin1", 1539))
    )
    random = float(last.sel(start=RANDOM))
    both = found.sel(start="Att.+Lin1 1939")
    gap = _gap(both)
    learned = both.train_accuracy.isel(step=-1).mean("seed")
    early = {at: float(last.sel(start=f"Att. {at}")) for at in CHECKPOINTS}
    return [
        Claim(
            "5.1, Figure 3b", "attention and linear 1 of the final model lead to generalisation within 200 steps",
            f"mean test accuracy after {steps} steps: at least 90 % (the same from nothing)",
            f"{float(final):.1%} ({random:.1%})", float(final) >= 0.9,
        ),
        Claim(
            "5.1", "they bypass memorisation",
            "largest gap of mean training and test accuracy: below 25 points, where training accuracy reaches 50 %",
            f"{100 * gap:.1f} points, training accuracy {float(learned):.1%}",
            gap < 0.25 if learned >= 0.5 else None,
            "" if learned >= 0.5 else f"nothing is learned within {steps} steps",
        ),
        Claim(
            "5.1, Figure 8", "attention alone does the same", f"mean test accuracy after {steps} steps: at least 90 %",
            f"{float(alone):.1%}", float(alone) >= 0.9,
        ),
        Claim(
            "5.1, Figure 3b", "an earlier checkpoint (1,539) generalises as quickly, to slightly lower accuracy",
            "mean test accuracy at the end: within 10 points of the final model's, which is above 50 %, and below it",
            f"{float(before):.1%} against {float(final):.1%}", float(final) > 0.5 and 0 < float(final - before) < 0.1,
        ),
        Claim(
            "Figure 8", "only attention of later checkpoints generalises at once",
            "mean test accuracy at the end by the paper's checkpoint: rising from below 50 % to above 90 %",
            ", ".join(f"{at}: {value:.0%}" for at, value in early.items()),
            early[CHECKPOINTS[0]] < 0.5 and early[CHECKPOINTS[-1]] > 0.9,
        ),
    ]  # fmt: skip


def longer_claims(found: xr.Dataset) -> list[Claim]:
    """What section 5.1 claims of the first 200 steps, of longer trainings, against those from nothing."""
    steps = int(found.tested[-1])
    random, both, before, alone = (
        found.sel(start=start) for start in (RANDOM, "Att.+Lin1 1939", "Att.+Lin1 1539", "Att. 1939")
    )
    final, alone_final, before_final, random_final = (
        float(one.test_accuracy.isel(tested=-1).mean("seed")) for one in (both, alone, before, random)
    )
    half, random_half = (_reached(one.test_accuracy, 0.5) for one in (both, random))
    # Seed by seed: what is not taken over is drawn alike.
    apart = (both.test_accuracy - random.test_accuracy).isel(tested=-1)
    gained, error = float(apart.mean()), float(apart.std(ddof=1)) / math.sqrt(apart.size)
    learned = float(both.train_accuracy.isel(step=-1).mean("seed"))
    return [
        Claim(
            "5.1, trained longer", "attention and linear 1 of the final model lead to generalisation",
            f"mean test accuracy after {steps:,} steps less that of the same seeds from nothing: more than twice its "
            "standard error",
            f"{final:.1%} - {random_final:.1%} = {100 * gained:.1f} points, standard error {100 * error:.1f}; "
            f"50 % first: {_at(half)}, from nothing {_at(random_half)}",
            gained > 2 * error if abs(gained) > 2 * error else None,
            "" if abs(gained) > 2 * error else f"{apart.size} seeds differ too much among themselves",
        ),
        Claim(
            "5.1, trained longer", "they bypass memorisation",
            "largest gap of mean training and test accuracy: below half of that from nothing, where training accuracy "
            "reaches 50 %",
            f"{100 * _gap(both):.1f} points against {100 * _gap(random):.1f}; training accuracy {learned:.1%}",
            _gap(both) < 0.5 * _gap(random) if learned >= 0.5 else None,
            "" if learned >= 0.5 else f"too little is learned within {steps:,} steps",
        ),
        Claim(
            "5.1, trained longer", "attention alone does the same",
            "mean test accuracy at the end: that from attention and linear 1, which is above 50 %, less 10 points or "
            "better", f"{alone_final:.1%} against {final:.1%}", final > 0.5 and alone_final > final - 0.1,
        ),
        Claim(
            "5.1, trained longer", "an earlier checkpoint (1,539) generalises to slightly lower accuracy",
            "mean test accuracy at the end: within 10 points of the final model's, which is above 50 %, and below it",
            f"{before_final:.1%} against {final:.1%}", final > 0.5 and 0 < final - before_final < 0.1,
        ),
    ]  # fmt: skip


def _at(step: float) -> str:
    return "not reached" if math.isnan(step) else f"step {step:,.0f}"
