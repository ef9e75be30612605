"""The main job: grok modular addition, record it, verify it, and show which layers made the prediction, and when."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xarray as xr
from rich.console import Console
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core import plots
from explaind_core.progress import bar
from explaind_studies.modular_addition import LAYERS, ModularAddition, ModularTransformer, modular_addition

__all__ = ["PAPER", "QUICK", "DemoResult", "Setting", "accuracy", "adamw", "demo", "layer_scores", "train"]


@dataclass(frozen=True)
class Setting:
    """A modular-addition experiment.

    Attributes:
        p: the modulus.
        train: number of training samples.
        test: number of test samples.
        seed: of data and initialisation.
        explained: how many test samples are decomposed.
        most_steps: where training stops at the latest.
        tolerance: of the adaptive nodes (see :class:`explaind_core.Quadrature`).
        samples_at_once: test samples decomposed in one pass.
        betas: of AdamW; (0.9, 0.98) as in the paper's released code, (0.98, 0.99) as in its text.
    """

    p: int = 113
    train: int = 4000
    test: int = 2000
    seed: int = 10
    explained: int = 100
    most_steps: int = 3000
    tolerance: float = 2.2e-4
    samples_at_once: int = 100
    betas: tuple[float, float] = (0.9, 0.98)

    @property
    def suffix(self) -> str:
        """Marks what is written about more samples than are decomposed in one pass."""
        return f"_{self.explained}" if self.explained > self.samples_at_once else ""


PAPER = Setting()
QUICK = Setting(p=67, train=1980, test=298, seed=0, most_steps=1000)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        run: the recorded run.
        result: the decomposition; None with ``--paper``, which keeps only scores.
        scores: importances over step and layer.
        check: the verification.
        closure: error, as a fraction of the largest output.
        figure: where the picture lies.
        holds: whether every check holds.
    """

    run: explaind.Run
    result: xr.Dataset | None
    scores: xr.Dataset
    check: explaind.Verification
    closure: float
    figure: Path
    holds: bool


def adamw(model: nn.Module, setting: Setting) -> torch.optim.AdamW:
    """The optimizer of the paper's Transformer (appendix C.2)."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=setting.betas)


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Fraction of samples whose argmax is right."""
    with torch.no_grad():
        return float((model(inputs).argmax(-1) == targets).double().mean())


def train(setting: Setting, path: Path, *, record: bool = True, progress: bool = True) -> ModularTransformer:
    """Train (or train on) the paper's Transformer, full batch, until both accuracies are 100 %; record it at ``path``.

    A run that was interrupted there is continued. ``record=False`` trains just as long without a Recorder, to
    measure what recording costs.

    Args:
        setting: of the experiment.
        path: where the run is recorded.
        record: whether to record it.
        progress: whether to show a bar.
    """
    task = modular_addition(setting.p, setting.train, setting.test, seed=setting.seed)
    torch.manual_seed(setting.seed)
    model = ModularTransformer(task.vocabulary)
    loss = nn.NLLLoss()
    optimizer = adamw(model, setting)
    if not record:
        for _ in _steps(setting, task, model, 0, progress=progress):
            optimizer.zero_grad()
            loss(model(task.train_inputs), task.train_targets).backward()
            optimizer.step()
        return model
    resume = (path / "manifest.json").exists()
    done = 0
    if resume:
        done = explaind.open_run(path, model=model).restore(model, optimizer) if (path / "steps").exists() else 0
    ids = torch.arange(setting.train)
    with explaind.Recorder(
        path, model, optimizer, loss, train_size=setting.train, resume=done > 0, overwrite=done == 0
    ) as recorder:
        for train_accuracy, test_accuracy in _steps(setting, task, model, done, progress=progress):
            if recorder.steps:
                recorder.log(train_accuracy=train_accuracy, test_accuracy=test_accuracy)
            optimizer.zero_grad()
            value = loss(model(task.train_inputs), task.train_targets)
            value.backward()
            recorder.batch(task.train_inputs, task.train_targets, ids=ids)
            optimizer.step()
            recorder.log(train_loss_before=value.item())
        recorder.log(
            train_accuracy=accuracy(model, task.train_inputs, task.train_targets),
            test_accuracy=accuracy(model, task.test_inputs, task.test_targets),
        )
    return model


def _steps(
    setting: Setting, task: ModularAddition, model: nn.Module, done: int, *, progress: bool
) -> Iterator[tuple[float, float]]:
    """One item per step still to train, with both accuracies before it; ends when both are 100 %."""
    with bar() as display:
        line = display.add_task("training", total=setting.most_steps, completed=done, note="", visible=progress)
        for step in range(done, setting.most_steps):
            both = (
                accuracy(model, task.train_inputs, task.train_targets),
                accuracy(model, task.test_inputs, task.test_targets),
            )
            if both == (1.0, 1.0):
                display.update(line, total=step, note="100 % train and test accuracy")
                return
            yield both
            display.update(line, advance=1, note=f"accuracy: train {both[0]:.1%}, test {both[1]:.1%}")


def demo(folder: Path, setting: Setting, *, progress: bool = True, console: Console | None = None) -> DemoResult:
    """Train, record, verify, decompose and draw; each part that ``folder`` already holds is taken up from there.

    Args:
        folder: where everything is written.
        setting: of the experiment.
        progress: whether to show bars.
        console: for what is said on the way.
    """
    console = console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    task = modular_addition(setting.p, setting.train, setting.test, seed=setting.seed)
    run_path = folder / "run"
    _check_folder(folder, run_path, task)
    closed = (run_path / "closed.json").exists()
    model = ModularTransformer(task.vocabulary) if closed else train(setting, run_path, progress=progress)
    run = explaind.open_run(run_path, model=model)
    last = run.metrics.isel(step=-1)
    console.print(
        f"recorded {len(run.steps)} steps: train accuracy {float(last.train_accuracy):.2%}, "
        f"test accuracy {float(last.test_accuracy):.2%}"
    )

    inputs = task.test_inputs[: setting.explained]
    check = explaind.verify(
        run, inputs[: setting.samples_at_once], nodes="adaptive", tolerance=setting.tolerance, progress=progress
    )
    console.print(str(check))

    result, scores, closure = _decompose(run, inputs, setting, folder, progress=progress)
    figure = plots.save(
        plots.figure_3a(
            run.metrics,
            scores,
            title=f"(a + b) mod {setting.p}: {len(run.steps)} AdamW steps, {len(inputs)} test samples explained",
        ),
        folder / f"figure_3a{setting.suffix}.png",
    )
    nodes = float(scores.attrs["nodes_per_step"])
    holds = check.agreement == 1.0 and (check.kl or 0.0) <= 2e-5 and closure <= 1e-4
    console.print(
        f"decomposed by step x layer x term: {nodes:.2f} nodes per step "
        f"({scores.attrs['evaluated_per_step']:.2f} evaluated), "
        f"closure error {closure:.1e} of the largest output\n"
        f"wrote {folder}/: "
        + ("result.zarr, " if result is not None else "")
        + f"scores{setting.suffix}.zarr, {figure.name}\n"
        f"checks {'hold' if holds else 'DO NOT HOLD'}: agreement 100 %, KL <= 2e-5, closure <= 1e-4"
    )
    return DemoResult(run, result, scores, check, closure, figure, holds)


def _check_folder(folder: Path, run: Path, task: ModularAddition) -> None:
    """Refuse a folder whose run was trained on other data: taking it up would explain the wrong samples."""
    if not (run / "manifest.json").exists():
        return
    found = explaind.open_run(run)
    if len(found.steps) and not torch.equal(found.batch(1).inputs, task.train_inputs):
        raise explaind.errors.StoreError(
            "the folder holds a demo of other data",
            where=folder,
            expected=f"{len(task.train_inputs)} training samples modulo {task.p}, as drawn with this seed",
            got=f"{len(found.batch(1).inputs)} other training samples",
            remedy="name another folder with --out, or delete this one",
        )


def _decompose(
    run: explaind.Run, inputs: Tensor, setting: Setting, folder: Path, *, progress: bool
) -> tuple[xr.Dataset | None, xr.Dataset, float]:
    """Decompose the test samples, some at a time; scores of samples add up, so only one piece is ever on disk."""
    pieces = torch.split(inputs, setting.samples_at_once)
    total: xr.Dataset | None = None
    closures = []
    for index, piece in enumerate(pieces):  # a block of test samples each
        start = index * setting.samples_at_once
        # Pieces are taken up by name, so the name says what their numbers depend on.
        name = f"piece_{start:04d}_{start + len(piece):04d}_within_{setting.tolerance:g}"
        path = folder / ("result.zarr" if len(pieces) == 1 else f"{name}.zarr")
        kept = folder / f"{name}_scores.zarr"
        if len(pieces) > 1 and kept.exists():
            scores = xr.open_zarr(kept, consolidated=False, chunks=None).load()
        else:
            decomposed = explaind.attribute(
                run, piece, layers=LAYERS, nodes="adaptive", tolerance=setting.tolerance, out=path, progress=progress
            )
            scores = layer_scores(decomposed)
            if len(pieces) > 1:
                # Renamed when it is whole: what a kill cuts short must not be taken up.
                unfinished = folder / f"{name}_unfinished.zarr"
                scores.to_zarr(unfinished, mode="w", zarr_format=2, consolidated=False)
                unfinished.rename(kept)
                shutil.rmtree(path)
        closures.append(scores.attrs["closure"])
        total = scores if total is None else (total + scores).assign_attrs(scores.attrs)
    assert total is not None
    total.to_zarr(folder / f"scores{setting.suffix}.zarr", mode="w", zarr_format=2, consolidated=False)
    result = None if len(pieces) > 1 else explaind.open_result(folder / "result.zarr", check=False)
    return result, total, max(closures)


def layer_scores(result: xr.Dataset) -> xr.Dataset:
    """Figure 3a's numbers from one result, some steps at a time."""
    blocks = []
    for start in range(0, result.sizes["step"], 100):
        block = result[["kernel", "regularization"]].isel(step=slice(start, start + 100)).load()
        by_layer = explaind.importance(block)
        relative = explaind.relative_regularization(block, form="absolute")
        signed = explaind.relative_regularization(block, form="signed")
        blocks.append(
            explaind.importance(block, accumulate=("layer",)).assign(
                layer_kernel=by_layer.kernel,
                layer_regularization=by_layer.regularization,
                relative_regularization=relative,
                relative_regularization_signed=signed,
            )
        )
    largest = float(abs(result.final).max())
    return xr.concat(blocks, "step").assign_attrs(
        closure=explaind.closure_error(result) / largest,
        nodes_per_step=float(result.nodes.mean()),
        evaluated_per_step=float(result.evaluations.mean()),
        steps_not_converged=int((~result.converged).sum()),
    )
