"""The pictures of the grokking study, as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from explaind_core.plots import figure_3a, save
from explaind_studies.findings import Picture
from explaind_studies.grokking.kernels import Slices, sums, test_similarity
from explaind_studies.grokking.pipelines import PARTS, RANDOM
from explaind_studies.grokking.stages import CHECKPOINTS, PAPER_STAGES
from explaind_studies.grokking.subject import Subject
from explaind_studies.grokking.swapping import SHOWN, SWAPS
from explaind_studies.modular_addition import LAYERS

__all__ = [
    "draw_influences",
    "draw_kernels",
    "draw_lasso",
    "draw_longer",
    "draw_pipelines",
    "draw_swapping",
    "layer_matrices",
]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")


def _matrix(axes: Axes, values: np.ndarray, *, symmetric: bool) -> object:
    """A matrix, most of whose values fill the range of colours: the outermost half per cent saturate."""
    if symmetric:
        edge = float(np.quantile(abs(values), 0.99)) or 1.0
        return axes.imshow(values, cmap="RdBu_r", vmin=-edge, vmax=edge, aspect="auto", interpolation="antialiased")
    low, high = np.quantile(values, (0.005, 0.995))
    return axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="antialiased")


def draw_influences(folder: Path, scores: xr.Dataset, subject: Subject) -> list[Picture]:
    """Figure 3a."""
    title = f"(a + b) mod {subject.setting.p}: {len(subject.run.steps)} AdamW steps, betas {subject.setting.betas}, "
    figure = figure_3a(subject.metrics, scores, title=f"{title}{scores.attrs['samples']} test samples explained")
    save(figure, folder / "figure_3a.png")
    return [
        Picture("figures/figure_3a.png", "Figure 3a: accuracies; importance of kernel and regularization; by layer.")
    ]


def _band(axes: Axes, curves: xr.DataArray, label: str, colour: str) -> None:
    """Mean and deviation over seeds, in percent, along the other axis."""
    along = curves[next(str(d) for d in curves.dims if d != "seed")]
    mean, spread = 100 * curves.mean("seed"), 100 * curves.std("seed")
    axes.plot(along, mean, color=colour, label=label)
    axes.fill_between(along, mean - spread, mean + spread, color=colour, alpha=0.25, linewidth=0)


def _against_random(axes: Axes, found: xr.Dataset, start: str, labels: tuple[str, str, str]) -> int:
    """Test and training accuracy from a start, and test accuracy from nothing; the step that was taken from."""
    _band(axes, found.test_accuracy.sel(start=start), labels[0], _COLOURS[1])
    train = 100 * found.train_accuracy.sel(start=start).mean("seed")
    axes.plot(found.step, train, color=_COLOURS[0], label=labels[1])
    _band(axes, found.test_accuracy.sel(start=RANDOM), labels[2], "#888888")
    return int(found.taken_at.sel(start=start))


def draw_pipelines(folder: Path, found: xr.Dataset) -> list[Picture]:
    """Figures 3b and 8: mean and deviation over seeds."""
    small = Figure(figsize=(6, 6), layout="constrained")
    labels = ("with the pipeline, test", "with the pipeline, training", "all at random, test")
    for axes, at in zip(small.subplots(2, 1, sharex=True), (1939, 1539), strict=True):
        step = _against_random(axes, found, f"Att.+Lin1 {at}", labels)
        axes.set_title(f"attention and linear 1 of step {step} (the paper's {at})", fontsize=10)
        axes.set_ylabel("accuracy, %")
        axes.legend(fontsize=8)
    axes.set_xlabel("training step")
    save(small, folder / "figure_3b.png")
    large = Figure(figsize=(2.4 * len(CHECKPOINTS), 2.6 * len(PARTS)), layout="constrained")
    grid = large.subplots(len(PARTS), len(CHECKPOINTS), sharex=True, sharey=True, squeeze=False)
    for row, name in enumerate(PARTS):
        for axes, at in zip(grid[row], CHECKPOINTS, strict=True):
            step = _against_random(axes, found, f"{name} {at}", ("mean, test", "training", "random, test"))
            axes.set_title(f"step {step} (the paper's {at})", fontsize=9)
            axes.set_ylim(-2, 102)
        grid[row][0].set_ylabel(f"{name}\naccuracy, %")
    grid[0][0].legend(fontsize=7)
    save(large, folder / "figure_8.png")
    seeds = f"mean and deviation over {found.sizes['seed']} seeds"
    return [
        Picture("figures/figure_3b.png", f"Figure 3b: training with attention and linear 1 taken over; {seeds}."),
        Picture("figures/figure_8.png", f"Figure 8: training from parts of checkpoints; {seeds}."),
    ]


def draw_longer(folder: Path, found: xr.Dataset) -> list[Picture]:
    """Figure 3b over more steps: training and test accuracy, mean and deviation over seeds."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, start in zip(figure.subplots(2, 2, sharex=True, sharey=True).flat, found.start.values, strict=True):
        one = found.sel(start=start)
        _band(axes, one.test_accuracy, "test", _COLOURS[0])
        _band(axes, one.train_accuracy, "training", _COLOURS[1])
        name = "all at random" if start == RANDOM else f"{str(start).split(' ')[0]} of step {int(one.taken_at)}"
        axes.set(title=name, ylim=(-2, 102), xlabel="training step", ylabel="accuracy, %")
        axes.label_outer()
    axes.legend(fontsize=8)
    save(figure, folder / "figure_3b_longer.png")
    return [
        Picture(
            "figures/figure_3b_longer.png",
            f"Figure 3b, trained on; mean and deviation over {found.sizes['seed']} seeds.",
        )
    ]


def draw_swapping(folder: Path, found: xr.Dataset, subject: Subject) -> list[Picture]:
    """Figure 7: accuracy differences, and confusion matrices before and after."""
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.1, 1))[0]
    axes = left.subplots()
    for name, colour in zip(SWAPS, _COLOURS, strict=False):
        axes.plot(found.step, 100 * found.change.sel(swap=name), label=name, color=colour)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="checkpoint (training step)", ylabel="accuracy gained, points", title="final layers swapped in")
    axes.legend(fontsize=8)
    p = subject.setting.p
    for row, (at, line) in enumerate(zip(SHOWN, right.subplots(2, 2), strict=True)):
        for edited, one in enumerate(line):
            counts = found.confusion.isel(stage=row, edited=edited).values[:p, :p]
            one.imshow(np.log1p(counts), cmap="magma", interpolation="nearest")
            what = "Emb.+Lin2+Dec. swapped" if edited else f"the paper's {at}"
            accuracy = np.trace(counts) / max(counts.sum(), 1)
            one.set_title(f"step {int(found.stage[row])}, {what}: {accuracy:.1%}", fontsize=8)
            one.set(xlabel="predicted", ylabel="true")
    save(figure, folder / "figure_7.png")
    return [Picture("figures/figure_7.png", "Figure 7: accuracy gained by swapping; confusion matrices (log counts).")]


def layer_matrices(slices: Slices, subject: Subject, what: str, layer: str, stage: int, *, modular: bool) -> np.ndarray:
    """A kernel slice ``[train, prediction]`` or a similarity, ordered by a + b, or by (a + b) mod p first.

    Args:
        what: ``"test"``, ``"train"`` (whose predictions), or ``"similarity"``.
    """
    part, n, p = slices.stages[stage], len(subject.explained), subject.setting.p

    def order(tokens: Tensor) -> np.ndarray:
        values = sums(tokens)
        return np.lexsort((values, values % p)) if modular else np.argsort(values, kind="stable")

    train, test = subject.task.train_inputs, subject.explained
    if what == "similarity":
        place = order(test)
        similar: np.ndarray = test_similarity(part, subject, layer)[np.ix_(place, place)]
        return similar
    kernel: np.ndarray = part.kernel.sel(layer=layer).transpose("train", "test").values
    columns = kernel[:, :n] if what == "test" else kernel[:, n:]
    shown = test if what == "test" else train[: columns.shape[1]]
    ordered: np.ndarray = columns[np.ix_(order(train), order(shown))]
    return ordered


def draw_kernels(folder: Path, slices: Slices, subject: Subject) -> list[Picture]:
    """Figures 4, 5 and 6: decoder; similarities; all layers; each in both orders."""
    orders = {False: "a + b", True: f"(a + b) mod {subject.setting.p}"}
    found = []
    for modular, words in orders.items():
        suffix = "_mod" if modular else ""
        for name, what, layers, title in (
            ("figure_4", ("test", "train"), ("decoder",), "Figure 4: kernel of the decoder"),
            ("figure_6_test", ("test",), tuple(LAYERS), "Figure 6: kernel of every layer, predictions of the test set"),
            ("figure_6_train", ("train",), tuple(LAYERS), "Figure 6: kernel of every layer, of the training set"),
            ("figure_5", ("similarity",), tuple(LAYERS), "Figure 5: similarity of test predictions"),
        ):
            rows = [(kind, layer) for kind in what for layer in layers]
            figure = Figure(figsize=(3 * len(PAPER_STAGES), 2.6 * len(rows)), layout="constrained")
            grid = figure.subplots(len(rows), len(PAPER_STAGES), squeeze=False)
            for row, (line, (kind, layer)) in enumerate(zip(grid, rows, strict=True)):
                for axes, stage in zip(line, PAPER_STAGES, strict=True):
                    values = layer_matrices(slices, subject, kind, layer, stage, modular=modular)
                    _matrix(axes, values, symmetric=kind != "similarity")
                    axes.set_xticks([])
                    axes.set_yticks([])
                    if row == 0:
                        axes.set_title(f"before step {slices.steps[stage].stop - 1} (the paper's {stage})", fontsize=9)
                kinds = {"test": "test predictions", "train": "training predictions", "similarity": "test"}
                line[0].set_ylabel(f"{layer}\n{kinds[kind]}", fontsize=9)
            figure.suptitle(f"{title}; ordered by {words}")
            save(figure, folder / f"{name}{suffix}.png", dpi=90, colours=128)
            axis = "test samples" if name == "figure_5" else "rows: training samples, columns: predictions"
            found.append(Picture(f"figures/{name}{suffix}.png", f"{title}; {axis}, ordered by {words}."))
    return found


def draw_lasso(folder: Path, found: xr.Dataset, slices: Slices, subject: Subject) -> list[Picture]:
    """Figure 9: measured and predicted similarities, and the coefficients."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    order = np.argsort(sums(subject.explained), kind="stable")
    for layer, line in zip(("linear 2", "decoder"), figure.subplots(2, 3), strict=True):
        one = found.sel(layer=layer)
        measured = test_similarity(slices.stages[PAPER_STAGES[-1]], subject, layer)
        for axes, values, words in ((line[0], measured, "measured"), (line[1], one.predicted.values, "predicted")):
            shown = axes.imshow(
                values[np.ix_(order, order)], cmap="viridis", aspect="auto", interpolation="antialiased"
            )
            axes.set_title(f"{layer}: similarity, {words}", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            figure.colorbar(shown, ax=axes)
        line[2].stem(one.frequency, one.cosine, markerfmt=" ", basefmt="grey")
        line[2].set(
            xlabel="frequency f (a period)", ylabel="coefficient", title=f"{layer}: cosines, R2 {float(one.r2):.2f}"
        )
    save(figure, folder / "figure_9.png", dpi=90, colours=256)
    return [Picture("figures/figure_9.png", "Figure 9: lasso regression of similarities, ordered by a + b.")]
