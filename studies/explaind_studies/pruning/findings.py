"""What the curves say: claims with their numbers, tables, and Figure 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from explaind_studies.findings import CLOSES, Claim, Table
from explaind_studies.pruning.curves import FILTERS, IMPORTANCE, METHODS, RANDOM

__all__ = ["MARGIN", "checks", "claims", "figure_2", "tables"]

#: By how much accuracy may be lower, on average over the levels, to count as competitive.
MARGIN = 0.02
#: A declared update may differ from the recorded one by this fraction: rounding of theta, as the rate falls to 0.
_UPDATE = 1e-2
#: As the paper's figure has them where it shows the method; told apart by the colour-blind too.
_COLOURS = {IMPORTANCE: "#0072B2", FILTERS: "#D55E00", RANDOM: "#009E73"}


def _spread(values: xr.DataArray) -> xr.DataArray:
    """Standard deviation over seeds (of a sample); NaN of a single one."""
    return values.std("seed", ddof=1) if values.sizes["seed"] > 1 else values.isel(seed=0) * np.nan


def claims(curves: xr.Dataset) -> list[Claim]:
    """The claims of section 4.2, each with its number.

    Args:
        curves: ``accuracy`` and ``kl`` over (seed, way, level).
    """
    mean = curves.mean("seed")
    ours, theirs, chance = (mean.sel(way=method) for method in (IMPORTANCE, FILTERS, RANDOM))
    count, levels = curves.sizes["seed"], curves.level.values
    difference = (ours.accuracy - theirs.accuracy).values
    lower = (ours.kl < theirs.kl).values
    better = (ours.accuracy > chance.accuracy).values
    worst = int(difference.argmin())
    seeds = f"means of {count} seeds" if count > 1 else "one seed"

    def everywhere(where: str, text: str, wanted: str, met: np.ndarray) -> Claim:
        return Claim(
            where,
            text,
            f"levels where {wanted} ({seeds}); supported if all",
            f"{int(met.sum())} of {len(levels)}",
            bool(met.all()),
            "" if met.all() else "not at " + ", ".join(f"{level:.0%}" for level in levels[~met]),
        )

    return [
        Claim(
            "4.2",
            f"competitive with Li et al. (2017) on sparsity levels from {levels[0]:.0%} to {levels[-1]:.0%}",
            f"accuracy less Li et al.'s, mean over {len(levels)} levels ({seeds}); supported at -{MARGIN} or more",
            float(difference.mean()),
            bool(difference.mean() >= -MARGIN),
            f"lowest {float(difference[worst]):.3f}, at {levels[worst]:.0%}; "
            f"not below -{MARGIN} at {int((difference >= -MARGIN).sum())} of {len(levels)} levels",
        ),
        everywhere(
            "4.2, Figure 2",
            "KL divergence from the full model lower than Li et al.'s over all levels of sparsity",
            "the mean KL is lower",
            lower,
        ),
        everywhere(
            "Figure 2",
            "better than a random choice of parameters",
            "the mean accuracy is higher than at random",
            better,
        ),
    ]


def tables(curves: xr.Dataset, runs: Sequence[Mapping[str, float]]) -> list[Table]:
    """Accuracy and KL by method and level, and the networks with the exactness of their scores.

    Args:
        curves: over (seed, way, level).
        runs: for every seed, what its row holds, by column.
    """
    mean = curves.mean("seed")
    accuracy, kl = _spread(curves.accuracy), _spread(curves.kl)
    rows = [
        [
            method,
            float(level),
            float(mean.pruned.sel(way=method, level=level)),
            float(mean.accuracy.sel(way=method, level=level)),
            float(accuracy.sel(way=method, level=level)),
            float(mean.kl.sel(way=method, level=level)),
            float(kl.sel(way=method, level=level)),
        ]
        for method in METHODS
        for level in curves.level.values
    ]
    columns = ("method", "level", "pruned", "accuracy", "deviation", "KL", "deviation of KL")
    note = (
        f"Means and standard deviations over {curves.sizes['seed']} seeds. Pruned: the fraction of parameters that is "
        "zero, the output layer not counted; whole filters meet a level as nearly as they can. The paper shows a "
        "figure and no numbers."
    )
    return [
        Table("pruning", "Accuracy and KL(full || pruned)", columns, rows, note),
        Table(
            "runs",
            "The networks, and how exact their scores are",
            tuple(runs[0]),
            [list(run.values()) for run in runs],
            "Before pruning. Residual: what the nodes leave unexplained of a scored output's change, mean and largest "
            "over scored samples and outputs, over the mean and the largest change. Agreement: of the rebuilt argmax "
            "with the model's, on scored samples; KL: of the model's output from the rebuilt one.",
        ),
    ]


def checks(scores: Mapping[int, xr.Dataset]) -> dict[str, tuple[bool, str]]:
    """The decompositions behind the scores close."""
    closure = max(s.attrs["closure"] / float(abs(s.final).max()) for s in scores.values())
    update = max(s.attrs["update_error"] for s in scores.values())
    return {
        "closure": (
            closure <= CLOSES,
            f"initial + kernel + regularization + residual is off by {closure:.1e} of the largest output at most "
            f"(bound {CLOSES:g})",
        ),
        "declared updates": (
            update <= _UPDATE,
            f"off by {update:.1e} of a recorded one at most (bound {_UPDATE:g}: theta is rounded to float32, and "
            "updates become small)",
        ),
    }


def figure_2(curves: xr.Dataset, title: str) -> Figure:
    """Accuracy, and KL from the full model, against the fraction of parameters pruned: means and deviations."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    mean = curves.mean("seed")
    for panel, (name, label) in zip(axes, (("accuracy", "accuracy"), ("kl", "KL(full || pruned)")), strict=True):
        spread = _spread(curves[name]).fillna(0)
        for method in METHODS:
            x, y = mean.pruned.sel(way=method).values, mean[name].sel(way=method).values
            colour = _COLOURS.get(method, "grey")
            style = "--" if method not in _COLOURS else "-"
            panel.plot(x, y, style, marker="o", markersize=3.5, color=colour, label=method)
            band = spread.sel(way=method).values
            panel.fill_between(x, y - band, y + band, color=colour, alpha=0.15, linewidth=0)
        panel.set_xlabel("fraction of parameters pruned")
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(visible=True, alpha=0.3)
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure
