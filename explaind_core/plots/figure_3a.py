"""Pictures of scores. Matplotlib's object interface only: nothing here touches global state or a screen."""

from __future__ import annotations

import io
import os
from pathlib import Path

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["COLOURS", "figure_3a", "save"]

#: Colours of up to eight layers, told apart by the colour-blind too (Okabe and Ito).
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#000000")


def figure_3a(metrics: xr.Dataset, scores: xr.Dataset, *, title: str = "") -> Figure:
    """The paper's Figure 3a: accuracies, kernel against regularization, and both layer by layer, over steps.

    Args:
        metrics: ``train_accuracy`` and ``test_accuracy`` (0..1) over step.
        scores: ``kernel`` and ``regularization`` over step (importance of the whole model), ``layer_kernel`` and
            ``layer_regularization`` over (step, layer), ``relative_regularization`` over (step, layer).
        title: a line above all.

    Returns:
        A matplotlib figure; :func:`save` writes it.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    (accuracies, layers), (terms, relative) = figure.subplots(2, 2, sharex=True)
    for name, label, colour in (("train_accuracy", "train", "#0072B2"), ("test_accuracy", "test", "#D55E00")):
        accuracies.plot(metrics.step, 100 * metrics[name], label=label, color=colour)
    _dress(accuracies, "accuracy", "%")
    for name, colour in (("kernel", "#0072B2"), ("regularization", "#D55E00")):
        terms.plot(scores.step, scores[name], label=name, color=colour)
    _dress(terms, "importance of kernel and regularization", "sum |influence|", positive=True)
    for index, layer in enumerate(scores.layer.values):
        colour = COLOURS[index % len(COLOURS)]
        one = scores.sel(layer=layer)
        layers.plot(scores.step, one.layer_kernel, label=str(layer), color=colour)
        relative.plot(scores.step, one.relative_regularization, label=str(layer), color=colour)
    _dress(layers, "kernel importance by layer", "sum |influence|", positive=True)
    _dress(relative, "relative regularization by layer: kernel minus regularization importance", "difference")
    relative.axhline(0, color="grey", linewidth=0.8)
    relative.set_yscale("symlog", linthresh=_threshold(scores.relative_regularization))
    for axes in (terms, relative):
        axes.set_xlabel("training step")
    if title:
        figure.suptitle(title)
    return figure


def _threshold(values: xr.DataArray) -> float:
    return max(float(abs(values).quantile(0.5)), 1e-12)


def _dress(axes: Axes, title: str, unit: str, *, positive: bool = False) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    if positive:
        axes.set_yscale("log")


def save(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 130, colours: int | None = None) -> Path:
    """Write a figure as PNG (or what the name says) and return where.

    Args:
        figure: what to write.
        path: where to write; its ending says as what.
        dpi: dots per inch.
        colours: at most so many, PNG only: pictures of large matrices are a quarter of the size with 256.
    """
    FigureCanvasAgg(figure)
    if colours is None:
        figure.savefig(path, dpi=dpi)
        return Path(path)
    whole = io.BytesIO()
    figure.savefig(whole, dpi=dpi, format="png")
    with Image.open(whole) as image:
        image.convert("RGB").quantize(colours).save(path, format="png", optimize=True)
    return Path(path)
