"""Pages to look around in: Figure 3a's curves, and every kernel slice and similarity, as self-contained HTML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from explaind_core.plots import COLOURS
from explaind_studies.grokking.figures import layer_matrices
from explaind_studies.grokking.kernels import Slices
from explaind_studies.grokking.stages import PAPER_STAGES
from explaind_studies.grokking.subject import Subject
from explaind_studies.modular_addition import LAYERS

__all__ = ["binned", "write_curves", "write_matrices"]

#: Cells a side: more would make pages of tens of megabytes.
CELLS = 125


def write_curves(path: Path, scores: xr.Dataset, metrics: xr.Dataset) -> Path:
    """Accuracies and importances over steps; layers can be switched on and off."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=4, cols=1, shared_xaxes=True, vertical_spacing=0.04,
        subplot_titles=("accuracy, %", "importance", "kernel importance by layer", "kernel minus regularization"),
    )  # fmt: skip
    for name in ("train_accuracy", "test_accuracy"):
        figure.add_trace(
            Scatter(x=metrics.step.values, y=100 * metrics[name].values, name=name.replace("_", " ")), 1, 1
        )
    for name in ("kernel", "regularization"):
        figure.add_trace(Scatter(x=scores.step.values, y=scores[name].values, name=name), 2, 1)
    for number, layer in enumerate(map(str, scores.layer.values)):
        one, line = scores.sel(layer=layer), {"color": COLOURS[number % len(COLOURS)]}
        for row, curve in ((3, one.layer_kernel), (4, one.relative_regularization)):
            trace = Scatter(
                x=scores.step.values, y=curve.values, name=layer, legendgroup=layer, showlegend=row == 3, line=line
            )
            figure.add_trace(trace, row, 1)
    figure.update_yaxes(type="log", row=2, col=1)
    figure.update_yaxes(type="log", row=3, col=1)
    # The first transient is larger than all that follows; zooming out shows it.
    later = scores.relative_regularization.isel(step=slice(scores.sizes["step"] // 10, None))
    figure.update_yaxes(range=[1.1 * min(float(later.min()), 0), 1.1 * float(later.max())], row=4, col=1)
    figure.update_xaxes(title_text="training step", row=4, col=1)
    figure.update_layout(height=1200, hovermode="x unified", template="plotly_white", title="Figure 3a")
    figure.write_html(path, include_plotlyjs=True)
    return path


def binned(values: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """Means over blocks of rows and columns, such that no side has more than ``cells``.

    Example:
        >>> binned(np.arange(8.0).reshape(2, 4), 2)
        array([[0.5, 2.5],
               [4.5, 6.5]])
    """
    for axis in (0, 1):
        edges = np.unique(np.linspace(0, values.shape[axis], min(cells, values.shape[axis]) + 1).astype(int))
        counts = np.diff(edges)
        sums = np.add.reduceat(values, edges[:-1], axis)
        values = sums / np.expand_dims(counts, 1 - axis)
    return values


def write_matrices(path: Path, slices: Slices, subject: Subject) -> Path:
    """Every layer's kernel slice and similarity at every stage, chosen from a menu."""
    from plotly.graph_objects import Figure, Heatmap

    figure, names = Figure(), list[str]()
    for what in ("test", "train", "similarity"):
        for layer in LAYERS:
            for stage in PAPER_STAGES:
                for modular in (False, True):
                    cells = binned(
                        layer_matrices(slices, subject, what, layer, stage, modular=modular).astype(np.float64)
                    )
                    digits = np.array([float(f"{x:.3g}") for x in cells.ravel()]).reshape(cells.shape)
                    colours = {} if what == "similarity" else {"colorscale": "RdBu_r", "zmid": 0}
                    figure.add_trace(Heatmap(z=digits, visible=not names, **colours))
                    kind = "similarity" if what == "similarity" else f"kernel, {what} predictions"
                    order = f"(a + b) mod {subject.setting.p}" if modular else "a + b"
                    names.append(f"{kind}; {layer}; before the paper's step {stage}; by {order}")
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"visible": [i == k for i in range(len(names))]}, {"title.text": name}],
        }
        for k, name in enumerate(names)
    ]
    figure.update_layout(
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.12, "yanchor": "bottom"}], height=950,
        width=950, margin={"t": 170}, title={"text": names[0], "y": 0.86, "font": {"size": 14}},
        xaxis={"title": "predictions, in order"},
        yaxis={"title": "training samples (similarity: predictions), in order", "autorange": "reversed"},
        annotations=[{
            "text": f"means over blocks, at most {CELLS} a side", "showarrow": False, "x": 1, "y": -0.1,
            "xref": "paper", "yref": "paper",
        }],
    )  # fmt: skip
    figure.write_html(path, include_plotlyjs=True)
    return path
