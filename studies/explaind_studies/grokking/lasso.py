"""Figure 9 and Table 2: the lasso of similarities on cosines and sines of differences of sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from explaind_studies.findings import Claim, Table
from explaind_studies.grokking.kernels import Slices, sums, test_similarity
from explaind_studies.grokking.subject import Subject
from explaind_studies.modular_addition import LAYERS
from explaind_studies.workbook import Workbook

__all__ = ["PAPER_TABLE_2", "fit", "lasso", "lasso_claims", "lasso_tables"]

#: The paper's Table 2: frequency of a cosine -> coefficient.
PAPER_TABLE_2 = {
    113: 0.112333, 76: 0.008232, 51: 0.004451, 75: 0.003616, 52: 0.001763, 37: 0.000679, 13: 0.000483, 28: 0.000259,
    38: 0.000093,
}  # fmt: skip
#: The stage whose window is that of the paper's regression: steps 1,850 to 1,900.
_STAGE = 1900


def fit(similarity: np.ndarray, values: np.ndarray, p: int, alpha: float) -> xr.Dataset:
    """Fit ``similarity[x, x'] ~ c + sum_f a_f cos(2 pi d / f) + b_f sin(2 pi d / f)``, d the difference of sums.

    scikit-learn's lasso, with its penalty ``alpha (sum |a| + sum |b|)`` beside half the mean squared error, over all
    ordered pairs of different samples. What the paper calls a frequency f is a period.

    Args:
        similarity: ``[n, n]``, of which the diagonal is left out, and NaN (samples that nothing influenced).
        values: the samples' sums a + b.
        p: the largest period; the smallest is 2.
        alpha: weight of the penalty.

    Returns:
        ``cosine`` and ``sine`` over ``frequency``; ``predicted`` ``[n, n]``; ``r2``, ``intercept``, ``iterations``,
        ``dual_gap`` (by how much the objective may be off) and ``left_out``, the number of NaN, in the attributes.
    """
    from sklearn.linear_model import Lasso

    n = len(values)
    one, other = np.nonzero(~np.eye(n, dtype=bool) & np.isfinite(similarity))
    frequencies = np.arange(2, p + 1)
    # Features depend on the difference alone: there are few different rows.
    differences, place = np.unique(values[:, None] - values, return_inverse=True)
    angle = 2 * np.pi * differences[:, None] / frequencies
    table = np.hstack([np.cos(angle), np.sin(angle)])
    place = place.reshape(n, n)
    target = similarity.astype(np.float64)
    # The mean squared error over pairs is, but for a constant, that of means by difference, weighted by their numbers.
    count = np.bincount(place[one, other], minlength=len(differences)).astype(np.float64)
    mean = np.bincount(place[one, other], target[one, other], minlength=len(differences)) / np.maximum(count, 1)
    model = Lasso(alpha=alpha, max_iter=1_000_000, tol=1e-6)
    model.fit(table, mean, sample_weight=count)
    predicted = model.predict(table)[place]
    error, variance = ((target - predicted)[one, other] ** 2).mean(), target[one, other].var()
    return xr.Dataset(
        {
            "cosine": ("frequency", model.coef_[: len(frequencies)]),
            "sine": ("frequency", model.coef_[len(frequencies) :]),
            "predicted": (("test", "other"), predicted),
        },
        coords={"frequency": frequencies},
        attrs={
            "r2": float(1 - error / variance) if variance > 0 else float("nan"), "intercept": float(model.intercept_),
            "iterations": int(model.n_iter_), "dual_gap": float(model.dual_gap_),
            "alpha": alpha, "left_out": n * (n - 1) - len(one),
        },
    )  # fmt: skip


def lasso(book: Workbook, subject: Subject, slices: Slices) -> xr.Dataset:
    """The regression of every layer's similarities in the window that ends with the paper's step 1,900."""

    def compute() -> xr.Dataset:
        values, setting = sums(subject.explained), subject.setting
        found = [
            fit(test_similarity(slices.stages[_STAGE], subject, layer), values, setting.p, setting.alpha)
            for layer in LAYERS
        ]
        scores = xr.Dataset(
            {
                name: ("layer", [one.attrs[name] for one in found])
                for name in ("r2", "intercept", "iterations", "dual_gap", "left_out")
            }
        )
        return xr.concat(found, "layer", combine_attrs="drop").assign_coords(layer=list(LAYERS)).merge(scores)

    return book.part("lasso", compute)


def lasso_tables(found: xr.Dataset, alpha: float) -> list[Table]:
    """Table 2 for linear 2, whose caption names it, and for the decoder, which the text names; and a line a layer."""
    tables = []
    for layer, name in (("linear 2", "lasso"), ("decoder", "lasso_decoder")):
        one = found.sel(layer=layer)
        order = one.frequency.values[np.argsort(-abs(one.cosine.values))]
        shown = [int(f) for f in order if float(one.cosine.sel(frequency=f)) != 0][:20]
        shown += [f for f in PAPER_TABLE_2 if f not in shown]
        rows = [
            [f, float(one.cosine.sel(frequency=f)) if f in one.frequency else None, PAPER_TABLE_2.get(f)] for f in shown
        ]
        tables.append(Table(
            name, f"Table 2: lasso coefficients of cosines, {layer}",
            ("cosine of frequency (period)", "coefficient", "the paper's"), rows,
            f"alpha {alpha:g} (the paper gives none); R2 {float(one.r2):.3f}; {int((one.cosine != 0).sum())} cosines "
            f"and {int((one.sine != 0).sum())} sines are not zero.",
        ))  # fmt: skip
    lines: list[list[Any]] = []
    for layer in LAYERS:
        one = found.sel(layer=layer)
        best = int(one.frequency.values[int(abs(one.cosine.values).argmax())])
        lines.append([layer, best, float(one.cosine.sel(frequency=best)), float(one.r2), int((one.cosine != 0).sum()),
                     int((one.sine != 0).sum())])  # fmt: skip
    columns = ("layer", "largest cosine: period", "coefficient", "R2", "cosines not zero", "sines not zero")
    return [*tables, Table("lasso_layers", "The same regression of every layer's similarities", columns, lines)]


def lasso_claims(found: xr.Dataset, p: int) -> list[Claim]:
    """Section 5.2's claim about the regression."""
    claims = []
    for layer in ("linear 2", "decoder"):
        one = abs(found.cosine.sel(layer=layer))
        order = np.argsort(-one.values)
        first, second = (int(one.frequency.values[i]) for i in order[:2])
        ratio = float(one.values[order[0]] / one.values[order[1]]) if one.values[order[1]] > 0 else float("inf")
        claims.append(Claim(
            "5.2, Table 2", f"the cosine of frequency (period) {p} has by far the largest coefficient ({layer})",
            "largest cosine, and how many times the second: at least 2",
            f"period {first}, {ratio:.1f} times that of period {second}; R2 {float(found.r2.sel(layer=layer)):.2f}",
            first == p and ratio >= 2,
        ))  # fmt: skip
    return claims
