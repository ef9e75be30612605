"""Figure 3a: importance of kernel and regularization over all steps, layer by layer; what the paper reads from it."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import xarray as xr
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

import explaind_core as explaind
from explaind_studies import demo
from explaind_studies.findings import Claim, Table
from explaind_studies.grokking.subject import Subject
from explaind_studies.modular_addition import LAYERS
from explaind_studies.workbook import Workbook

__all__ = ["influence_claims", "influences", "layer_table", "peaks"]

#: Curves are averaged over so many steps before peaks are looked for.
SMOOTH = 25
#: Where memorisation begins in the paper's run. Before lies the first transient, which is larger than all that follows.
_BEGINNING = 200
_MIDDLE = ("attention encoder", "attention decoder", "linear 1", "linear 2")


def influences(book: Workbook, subject: Subject) -> xr.Dataset:
    """Importances by step and layer, summed over the explained samples; a part for every block of samples."""
    setting = subject.setting
    total: xr.Dataset | None = None
    closures, nodes, evaluated, missed = [], [], [], 0
    for start in range(0, setting.explained, setting.samples_at_once):
        inputs = subject.explained[start : start + setting.samples_at_once]
        scores = book.part(f"influences_{start:04d}_{start + len(inputs):04d}", partial(_block, book, subject, inputs))
        closures.append(scores.attrs["closure"])
        nodes.append(scores.attrs["nodes_per_step"])
        evaluated.append(scores.attrs["evaluated_per_step"])
        missed += int(scores.attrs["steps_not_converged"])
        total = scores if total is None else total + scores
    assert total is not None
    return total.assign_attrs(
        closure=max(closures), nodes_per_step=float(np.mean(nodes)), evaluated_per_step=float(np.mean(evaluated)),
        steps_not_converged=missed, samples=setting.explained,
    )  # fmt: skip


def _block(book: Workbook, subject: Subject, inputs: torch.Tensor) -> xr.Dataset:
    result = explaind.attribute(
        subject.run, inputs, layers=LAYERS, nodes="adaptive", tolerance=subject.setting.tolerance, memory="6GiB",
        progress=book.progress,
    )  # fmt: skip
    residual = abs(result.residual).max(("test", "output")) / float(abs(result.final - result.initial).max())
    return demo.layer_scores(result).assign(largest_residual=residual)


def smoothed(values: xr.DataArray) -> np.ndarray:
    """A curve over steps, averaged over ``SMOOTH`` of them."""
    found: np.ndarray = uniform_filter1d(values.values, min(SMOOTH, len(values)), mode="nearest")
    return found


def peaks(values: xr.DataArray) -> list[int]:
    """The steps at which a smoothed curve has peaks that stand out by a tenth of its highest value.

    Example:
        >>> step = np.arange(1, 301)
        >>> curve = xr.DataArray(np.exp(-((step - 100) / 20.0) ** 2) + 2 * np.exp(-((step - 220) / 20.0) ** 2),
        ...                      dims="step", coords={"step": step})
        >>> peaks(curve)
        [100, 220]
    """
    curve = smoothed(values)
    found, _ = find_peaks(curve, prominence=0.1 * curve.max())
    return [int(values.step.values[i]) for i in found]


def layer_table(scores: xr.Dataset, subject: Subject) -> Table:
    """When each layer matters."""
    rows = []
    stages = subject.stages
    since = stages.at(_BEGINNING)
    scores = scores.sel(step=slice(since, None))
    for layer in LAYERS:
        kernel, relative = scores.layer_kernel.sel(layer=layer), scores.relative_regularization.sel(layer=layer)
        curve = smoothed(kernel)
        half = int(kernel.step.values[int(np.argmax(curve >= curve.max() / 2))])
        memorising = kernel.sel(step=slice(1, stages.memorised))
        aligning = kernel.sel(step=slice(stages.memorised + 1, None))
        rows.append([
            layer, int(kernel.step.values[int(curve.argmax())]), half, ", ".join(map(str, peaks(kernel))) or None,
            float(memorising.sum()), float(aligning.sum()), int(relative.step.values[int(smoothed(relative).argmin())]),
            float(smoothed(relative).min()),
        ])  # fmt: skip
    return Table(
        "layers", "Figure 3a in numbers: when each layer's importance peaks",
        ("layer", "highest kernel importance at step", "half of it first at step", "peaks at steps",
         f"kernel importance in steps {since} to {stages.memorised}", "and after",
         "regularization dominates most at step", "kernel minus regularization importance there"),
        rows,
        f"Importance of {scores.attrs['samples']} test samples (Definition 4.2), from step {since} on (the "
        f"paper's {_BEGINNING}: the transient before it is larger than all that follows), averaged over "
        f"{SMOOTH} steps before peaks are looked for; a peak stands out by a tenth of the highest value.",
    )  # fmt: skip


def influence_claims(scores: xr.Dataset, subject: Subject) -> list[Claim]:
    """Section 5.1's claims about Figure 3a."""
    stages, metrics = subject.stages, subject.metrics
    at_memorised = float(metrics.test_accuracy.sel(step=stages.memorised))
    claims = [
        Claim(
            "5, Figure 3a", "training accuracy is nearly perfect at step 800, while test accuracy is close to zero",
            f"first step with training accuracy {stages.train_level:.1%}; test accuracy then, close to zero below 10 %",
            f"step {stages.memorised}, test accuracy {at_memorised:.1%}",
            stages.train_level == 0.99 and at_memorised < 0.1,
        ),
        Claim(
            "5", "test accuracy reaches 100 % at step 1,939",
            "first step with test accuracy of 99.9 %; highest test accuracy",
            f"step {stages.generalised}, {float(metrics.test_accuracy.max()):.1%}" if stages.grokked
            else f"never; {float(metrics.test_accuracy.max()):.1%} at most", stages.grokked,
        ),
    ]  # fmt: skip
    scores = scores.sel(step=slice(stages.at(_BEGINNING), None))
    return [*claims, *_balance(scores, subject), *_layers(scores, subject)]


def _balance(scores: xr.Dataset, subject: Subject) -> list[Claim]:
    """Kernel against regularization."""
    step, last = scores.step.values, subject.stages.last
    top = {name: int(step[int(smoothed(scores[name]).argmax())]) for name in ("kernel", "regularization")}
    growth = float(np.corrcoef(np.log(smoothed(scores.kernel)), np.log(smoothed(scores.regularization)))[0, 1])
    end = scores.isel(step=slice(-max(1, last // 20), None))
    ratio = float((end.regularization / end.kernel).mean())
    later = all(top[n] > subject.stages.memorised for n in top) and max(top.values()) <= last - SMOOTH
    return [
        Claim(
            "5.1",
            "kernel and regularization importance grow together, both peak near step 1,700 of 1,939, and decline",
            f"steps of the highest values, of {last} (88 % of it is {round(0.88 * last)}); both after memorisation, "
            "within a tenth of the run of each other, and before its end; correlation of their logarithms",
            f"kernel {top['kernel']}, regularization {top['regularization']}; {growth:.3f}",
            later and abs(top["kernel"] - top["regularization"]) <= last / 10,
        ),
        Claim(
            "5.1", "in the final phase the regularization dominates",
            "regularization over kernel importance, mean of the last twentieth of the steps: above 1", ratio, ratio > 1,
        ),
    ]  # fmt: skip


def _layers(scores: xr.Dataset, subject: Subject) -> list[Claim]:
    """Which layers matter when."""
    stages = subject.stages
    kernel = scores.layer_kernel
    memorising = slice(stages.at(_BEGINNING), stages.memorised)
    share = kernel.sel(step=memorising).mean("step")
    share = share / share.sum()
    strongest = str(share.layer.values[int(share.values.argmax())])
    first = {str(one): found[0] for one in kernel.layer.values if (found := peaks(kernel.sel(layer=one)))}
    earliest = min(first, key=lambda layer: first[layer]) if first else "none"
    decoder = peaks(kernel.sel(layer="decoder"))
    middle = {
        layer: [s for s in peaks(kernel.sel(layer=layer)) if s < decoder[-1]] if decoder else [] for layer in _MIDDLE
    }
    end = scores.isel(step=slice(-max(1, stages.last // 20), None)).mean("step")
    ratio = end.layer_regularization / end.layer_kernel
    dominated = {str(one) for one in ratio.layer.values if float(ratio.sel(layer=one)) > 1}
    tail = kernel.isel(step=slice(-max(2, round(0.15 * (stages.last - stages.memorised))), None))
    half = tail.sizes["step"] // 2
    change = tail.isel(step=slice(half, None)).mean("step") / tail.isel(step=slice(0, half)).mean("step") - 1
    others = [str(one) for one in change.layer.values if one != "embedding"]
    rising = ", ".join(f"{one} {float(change.sel(layer=one)):+.0%}" for one in change.layer.values)
    halfway = {}
    for one in map(str, kernel.layer.values):
        curve = smoothed(kernel.sel(layer=one))
        halfway[one] = int(kernel.step.values[int(np.argmax(curve >= curve.max() / 2))])
    return [
        Claim(
            "5.1", "the decoder is the most influential layer of memorisation",
            f"layer with the largest kernel importance over steps {memorising.start} to {memorising.stop}; its share",
            f"{strongest} {float(share.max()):.0%} (decoder {float(share.sel(layer='decoder')):.0%})",
            strongest == "decoder",
        ),
        Claim(
            "5.1", "the decoder's importance peaks first", "layer whose kernel importance has the earliest peak",
            f"{earliest} at step {first[earliest]}; decoder at {first.get('decoder', 'none')}" if first
            else "no layer's has a peak: all still rise", earliest == "decoder",
        ),
        Claim(
            "5.1", "the decoder's second peak is preceded by peaks of the attention and the linear layers",
            "peaks of the decoder; peaks of each middle layer before the decoder's last",
            f"decoder {decoder}; " + ", ".join(f"{layer} {steps}" for layer, steps in middle.items()),
            len(decoder) >= 2 and all(any(decoder[0] < s for s in steps) for steps in middle.values()),
        ),
        Claim(
            "5.1", "regularization acts primarily on embedding and decoder, little on the layers between",
            "regularization over kernel importance by layer, last twentieth of the steps: above 1 in these two alone",
            ", ".join(f"{one} {float(ratio.sel(layer=one)):.2f}" for one in ratio.layer.values),
            dominated == {"embedding", "decoder"},
        ),
        Claim(
            "5.1", "the embedding begins to matter only in circuit formation, after the other layers",
            "step at which half of a layer's highest kernel importance is first reached",
            ", ".join(f"{one} {s}" for one, s in halfway.items()), halfway["embedding"] == max(halfway.values()),
        ),
        Claim(
            "5.1", "at the end the embedding's kernel importance still rises while all others' decrease",
            f"change from the first to the second half of the last {tail.sizes['step']} steps", rising,
            float(change.sel(layer="embedding")) > 0 and bool((change.sel(layer=others) < 0).all()),
        ),
    ]  # fmt: skip
