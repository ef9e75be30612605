"""Figures 4, 5 and 6: kernel slices and similarities of every layer before four stages, and how cyclic they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xarray as xr

import explaind_core as explaind
from explaind_studies.findings import Claim, Table
from explaind_studies.grokking.stages import PAPER_STAGES
from explaind_studies.grokking.subject import Subject
from explaind_studies.modular_addition import LAYERS
from explaind_studies.workbook import Workbook

__all__ = ["Slices", "cyclic", "kernel_claims", "kernel_slices", "kernel_table", "measured", "test_similarity"]


#: (stage, layer, matrix) -> what :func:`cyclic` tells of it.
Measured = dict[tuple[int, str, str], dict[str, float]]


@dataclass(frozen=True)
class Slices:
    """Kernel slices and similarities of one stage after the other.

    Attributes:
        stages: the paper's step -> the Dataset of the window before it (see :func:`explaind_core.kernel_slices`);
            its test axis holds the explained test samples, then the explained training samples.
        steps: the paper's step -> the window's steps in this run.
    """

    stages: dict[int, xr.Dataset]
    steps: dict[int, range]


def kernel_slices(book: Workbook, subject: Subject) -> Slices:
    """A part of the study for every stage; outputs are summed, as in the paper's Figure 4."""
    setting = subject.setting
    inputs = torch.cat([subject.explained, subject.task.train_inputs[: setting.train_explained]])
    found, steps = {}, {}
    for stage in PAPER_STAGES:
        window = steps[stage] = subject.stages.window(stage, setting.window)
        found[stage] = book.part(
            f"kernel_{stage}",
            partial(_slices, book, subject, inputs, stage, window),
            f"steps {window.start} to {window.stop - 1}, {len(inputs)} predictions x {setting.train} samples",
        )
    return Slices(found, steps)


def _slices(book: Workbook, subject: Subject, inputs: torch.Tensor, stage: int, window: range) -> xr.Dataset:
    setting = subject.setting
    found = explaind.kernel_slices(
        subject.run, inputs, steps={str(stage): window}, layers=LAYERS, train=range(setting.train),
        nodes=setting.kernel_nodes, memory=setting.memory, progress=book.progress,
    )  # fmt: skip
    change = float(abs(found.final - found.initial).max())
    kept = found[["kernel", "similarity", "regularization", "residual"]].astype(np.float32).isel(step=0)
    return kept.drop_vars([n for n in kept.coords if kept[n].dtype == object]).assign_attrs(
        layers=list(LAYERS), closure=explaind.closure_error(found) / float(abs(found.final).max()),
        residual=float(abs(found.residual).max()) / change, update_error=float(found.update_error.max()),
        tail_dropped=str(found.attrs.get("tail_dropped", "")),
    ).assign_coords(layer=list(LAYERS))  # fmt: skip


def sums(tokens: torch.Tensor) -> np.ndarray:
    """``a + b`` of samples ``[a] [+] [b] [=]``."""
    found: np.ndarray = (tokens[:, 0] + tokens[:, 2]).numpy()
    return found


def test_similarity(part: xr.Dataset, subject: Subject, layer: str) -> np.ndarray:
    """``[n, n]`` of the test samples."""
    n = len(subject.explained)
    found: np.ndarray = part.similarity.sel(layer=layer).values[:n, :n]
    return found


def cyclic(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray, p: int) -> dict[str, float]:
    """How much of a matrix is due to its rows, its columns, and to the difference of residues; and its frequency.

    Args:
        matrix: ``[n, m]``.
        rows: the residues mod p of the samples of its rows, ``[n]``.
        columns: those of its columns, ``[m]``.
        p: the modulus.

    Returns:
        ``rows`` and ``columns``, the parts of the variance that their means explain; ``cyclic``, the part of what is
        left that the mean by ``(row - column) mod p`` explains; ``chance``, what it would for shuffled residues;
        ``frequency``, the k of the largest Fourier coefficient of these means, ``cos(2 pi k difference / p)``, and
        ``period``, p / k.

    Example:
        >>> residues = np.arange(7)
        >>> found = cyclic(np.cos(2 * np.pi * 2 * (residues[:, None] - residues) / 7), residues, residues, 7)
        >>> round(found["cyclic"], 6), found["frequency"], found["period"]
        (1.0, 2, 3.5)
    """
    values = matrix - matrix.mean()
    total = float((values**2).mean()) or 1.0
    by_row, by_column = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    rest = values - by_row - by_column

    def profile(r: np.ndarray) -> tuple[np.ndarray, float]:
        difference = (r[:, None] - columns) % p
        count = np.bincount(difference.ravel(), minlength=p)
        mean = np.bincount(difference.ravel(), rest.ravel(), minlength=p) / np.maximum(count, 1)
        return mean, float((count * mean**2).sum() / max(float((rest**2).sum()), 1e-300))

    mean, part = profile(rows)
    _, chance = profile(np.random.default_rng(0).permutation(rows))
    power = abs(np.fft.rfft(mean)) ** 2
    k = 1 + int(power[1:].argmax())
    return {
        "rows": float((by_row**2).mean()) / total, "columns": float((by_column**2).mean()) / total, "cyclic": part,
        "chance": chance, "frequency": k, "period": p / k,
        "concentration": float(power[k] / max(power[1:].sum(), 1e-300)),
    }  # fmt: skip


def measured(slices: Slices, subject: Subject) -> Measured:
    """How cyclic every matrix is."""
    p, n = subject.setting.p, len(subject.explained)
    train, test = sums(subject.task.train_inputs) % p, sums(subject.explained) % p
    found: Measured = {}
    for stage, part in slices.stages.items():
        for layer in LAYERS:
            kernel = part.kernel.sel(layer=layer).transpose("train", "test").values.astype(np.float64)
            found[stage, layer, "kernel, test set"] = cyclic(kernel[:, :n], train, test, p)
            found[stage, layer, "kernel, training set"] = cyclic(kernel[:, n:], train, train[: kernel.shape[1] - n], p)
            similar = test_similarity(part, subject, layer).astype(np.float64)
            known = np.isfinite(np.diagonal(similar))  # the others were influenced by nothing
            residues = test[known]
            found[stage, layer, "similarity, test set"] = cyclic(similar[np.ix_(known, known)], residues, residues, p)
    return found


def kernel_table(slices: Slices, found: Measured) -> Table:
    """How cyclic every matrix is (see :func:`measured`)."""
    rows = [
        [stage, f"{slices.steps[stage].start}-{slices.steps[stage].stop - 1}", layer, matrix, m["rows"], m["columns"],
         m["cyclic"], m["chance"], m["frequency"], m["period"], m["concentration"]]
        for (stage, layer, matrix), m in found.items()
    ]  # fmt: skip
    return Table(
        "cyclic", "Figures 4 to 6 in numbers: how cyclic kernels and similarities are",
        ("paper's step", "this run's steps", "layer", "matrix", "variance due to training samples (rows)",
         "to predictions (columns)", "of the rest, due to (difference of sums) mod p", "the same by chance",
         "strongest frequency k", "its period p / k", "its part of the power"),
        rows, "Rows are training samples (for similarities: test samples), columns predictions. A pattern that repeats "
        "whenever the sums differ by a multiple of p / k has the frequency k; the paper gives periods as frequencies.",
    )  # fmt: skip


def kernel_claims(found: Measured) -> list[Claim]:
    """Section 5.2's claims about kernels and similarities (see :func:`measured`)."""
    decoder = {stage: found[stage, "decoder", "kernel, test set"] for stage in PAPER_STAGES}
    bands = {stage: m["rows"] for stage, m in decoder.items()}
    part = {stage: m["cyclic"] / max(m["chance"], 1e-300) for stage, m in decoder.items()}
    periods = {stage: m["period"] for stage, m in decoder.items()}
    last = {layer: found[PAPER_STAGES[-1], layer, "similarity, test set"] for layer in LAYERS}
    early = max(last[one]["cyclic"] for one in ("embedding", "attention encoder"))
    late = min(last[one]["cyclic"] for one in ("attention decoder", "linear 1", "linear 2", "decoder"))
    after = [part[stage] for stage in PAPER_STAGES[1:]]

    def told(values: dict[int, float], form: str) -> str:
        return ", ".join(f"{stage}: {value:{form}}" for stage, value in values.items())

    return [
        Claim(
            "5.2, Figure 4", "at all stages each training sample has a global influence (bands)",
            "part of the decoder kernel's variance that training samples' means explain, by stage: at least 10 %",
            told(bands, ".0%"), min(bands.values()) >= 0.1,
        ),
        Claim(
            "5.2, Figure 4", "after memorisation patterns aligned with residue classes emerge and sharpen",
            "variance explained by the difference of residues in the decoder's kernel, as a multiple of chance: rising "
            "over the last three stages, and above twice chance", told(part, ".3g"),
            after == sorted(after) and after[-1] > 2,
        ),
        Claim(
            "5.2", "cycles begin with a period of about 2 and shift to longer ones",
            "strongest period of the decoder's kernel by stage: at most 3 when it first exceeds twice chance; rising",
            told(periods, ".1f"), _shifts(periods, part),
        ),
        Claim(
            "5.2, Figure 5", "at the end the cyclic geometry is there from the attention decoders on, not before",
            "variance of the similarity explained by the difference of residues: every later layer above embedding and "
            "attention encoder", ", ".join(f"{layer} {m['cyclic']:.1%}" for layer, m in last.items()), late > early,
        ),
    ]  # fmt: skip


def _shifts(periods: dict[int, float], part: dict[int, float]) -> bool | None:
    """Whether the period is short where a cycle is first seen, and grows."""
    seen = [periods[stage] for stage in PAPER_STAGES if part[stage] > 2]
    return bool(seen[0] <= 3 and seen == sorted(seen) and seen[-1] > seen[0]) if len(seen) > 1 else None
