"""What the page of Table 1 says: rows beside the paper's, claims, checks, and residuals step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from explaind_core import plots
from explaind_studies.findings import CLOSES, Claim, Picture, Table, rounded
from explaind_studies.table1_models import Setting, Subject

__all__ = ["PUBLISHED", "Found", "checks", "claims", "figure", "models_table", "summary", "table"]

#: Table 1 of the paper: (model, nodes) -> EPK accuracy, KL divergence.
PUBLISHED: Mapping[tuple[str, str], tuple[float, float]] = {
    ("transformer", "midpoint:10"): (0.748, 0.885),
    ("transformer", "midpoint:100"): (1.0, 0.0),
    ("cnn", "midpoint:10"): (0.997, 0.0),
    ("cnn", "midpoint:100"): (1.0, 0.0),
}
#: "0.0" of three published digits.
_NO_KL = 5e-4
#: How far an accuracy may be from the published one to be the same: 100 samples tell 0.01 apart, and seeds differ.
_CLOSE = 0.05
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Found:
    """What was measured on one model: its training, and the verification with each rule."""

    subject: Subject
    trained: xr.Dataset
    rules: Mapping[int | str, xr.Dataset]
    peaks: Mapping[int | str, int]


def words(nodes: int | str) -> str:
    """A rule of quadrature.

    Example:
        >>> words("midpoint:10"), words("adaptive"), words(1), words("left")
        ('10 midpoints', 'adaptive', '1 Gauss-Legendre', 'left')
    """
    if isinstance(nodes, int):
        return f"{nodes} Gauss-Legendre"
    return f"{nodes.removeprefix('midpoint:')} midpoints" if nodes.startswith("midpoint:") else nodes


def table(found: Sequence[Found]) -> Table:
    """Table 1, longer."""
    columns = (
        "model", "data", "nodes of a step", "nodes per step", "evaluated per step", "EPK accuracy", "paper: accuracy",
        "KL", "paper: KL", "largest error", "largest output", "steps that missed the tolerance", "seconds",
        "peak memory, GiB",
    )  # fmt: skip
    rows = []
    for one in found:
        for nodes, check in one.rules.items():
            accuracy, kl = PUBLISHED.get((one.subject.name, str(nodes)), (None, None))
            rows.append(
                [
                    one.subject.title, one.subject.data, words(nodes), float(check.nodes_used),
                    float(check.nodes_evaluated), float(check.agreement), accuracy, float(check.kl), kl,
                    float(check.max_error), float(check.largest_output),
                    int(check.missed) if nodes == "adaptive" else None, float(check.seconds),
                    one.peaks[nodes] / 2**30,
                ]
            )  # fmt: skip
    note = (
        "EPK accuracy: the fraction of test samples whose rebuilt prediction decides as the model does. KL: from the "
        "model's distribution to the rebuilt one, mean over samples, in nats. The residual, which makes every result "
        "close, is left out of what is rebuilt. Errors and outputs are of log-probabilities. Peak memory is that of "
        "the whole process by then. The paper's CNN is a ResNet9 on CIFAR-2."
    )
    return Table("table1", "Rebuilt predictions", columns, rows, note)


def models_table(found: Sequence[Found]) -> Table:
    """What was trained."""
    columns = ("model", "data", "parameters", "steps", "training accuracy", "test accuracy", "test samples rebuilt")
    rows = [
        [
            one.subject.title, one.subject.data, int(one.trained.parameters), int(one.trained.steps),
            float(one.trained.train_accuracy), float(one.trained.test_accuracy),
            int(next(iter(one.rules.values())).samples),
        ]
        for one in found
    ]  # fmt: skip
    return Table("models", "The models", columns, rows)


def summary(found: Sequence[Found], setting: Setting) -> list[str]:
    """What was done, what came out, and what is not as in the paper."""
    lines = [
        "Each training is recorded, and the predictions of test samples are rebuilt from the initialisation and the "
        "declared updates alone, with several rules of quadrature for the test feature map: the paper's equal "
        "midpoints, and Gauss-Legendre nodes, whose number is chosen step by step ('adaptive': a step is refined "
        f"while it misses {setting.tolerance:g} of the largest change of an output, with up to 32 nodes) or fixed.",
    ]
    names = {one.subject.name for one in found}
    if "transformer" in names:
        lines.append(
            "**Transformer**: the run of `explaind demo`, AdamW with betas (0.9, 0.98), where the paper names "
            f"(0.98, 0.99); {setting.explained} test samples of the paper's 2,000."
        )
    if "cnn" in names:
        data = (
            "**CNN**: CIFAR-10 is not part of this package. Without `--data` the paper's ResNet9 learns scikit-learn's "
            f"digits (8 x 8, enlarged to 16 x 16, ten classes), with {setting.cnn_width} channels at first, not 64, in "
            f"batches of {setting.cnn_batch}, not 256"
            if setting.data is None
            else f"**CNN**: the paper's ResNet9 with {setting.cnn_width} channels at first, not 64, on CIFAR-2"
        )
        lines.append(
            f"{data}; SGD with momentum 0.9, weight decay 0.005, {setting.cnn_epochs} epochs, a learning rate that "
            f"peaks at 0.1 in epoch 5; {setting.explained} test samples."
        )
    if "resnet9" in names:
        left_out = _left_out(next(one for one in found if one.subject.name == "resnet9"))
        lines.append(
            f"**Size**: a ResNet9 of width {setting.resnet_width} on {setting.resnet_images:,} generated images, one "
            f"epoch of SGD (momentum 0.9, learning rate 0.01, weight decay 0.005), {setting.resnet_explained} test "
            f"images: a check that a model of the paper's size is verified here, not of its numbers.{left_out}"
        )
    for one in found:
        parts = [
            f"{words(nodes)}: {_percent(float(check.agreement))}, KL {rounded(float(check.kl))}"
            + (f" ({float(check.nodes_used):.2f} nodes a step)" if nodes == "adaptive" else "")
            for nodes, check in one.rules.items()
        ]
        lines.append(f"{one.subject.title} on {one.subject.data}, decisions reproduced: " + "; ".join(parts) + ".")
    return lines


def _left_out(one: Found) -> str:
    """Why the full-width network is not rebuilt with equal midpoints, unless it is."""
    if "midpoint:100" in one.rules:
        return ""
    measured = next((name for name in ("midpoint:10", "adaptive") if name in one.rules), None)
    if measured is None:
        return ""
    check, steps = one.rules[measured], int(one.trained.steps)
    seconds, evaluated = float(check.seconds), float(check.nodes_evaluated) * steps
    missing = [q for q in (10, 100) if f"midpoint:{q}" not in one.rules]
    estimates = " and ".join(f"{seconds * q * steps / evaluated:,.0f} s" for q in missing)
    return (
        f" {' and '.join(map(str, missing))} midpoints a step are left out by default: {evaluated:,.0f} nodes in "
        f"{steps} steps took {seconds:,.0f} s, so these would take about {estimates}."
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def claims(found: Sequence[Found], setting: Setting) -> list[Claim]:
    """Section 3.1's, with this run's numbers."""
    labels = {"transformer": "Transformer", "cnn": "ResNet9"}
    alike = {"transformer": setting.p == Setting().p, "cnn": setting.data is not None}
    made: list[Claim] = []
    for one in found:
        if (name := one.subject.name) not in labels:
            continue
        if "midpoint:100" in one.rules:
            made += _hundred(one, labels[name])
        if "midpoint:10" in one.rules:
            made.append(_ten(one, labels[name], alike=alike[name]))
        if "adaptive" in one.rules:
            made.append(_adaptive(one, labels[name]))
    return made


def _hundred(one: Found, label: str) -> list[Claim]:
    check, on = one.rules["midpoint:100"], f"{one.subject.title} on {one.subject.data}"
    accuracy, kl = float(check.agreement), float(check.kl)
    return [
        Claim(
            "3.1, Table 1", f"100 integration steps reproduce 100 % of the {label}'s decisions",
            f"decisions about {int(check.samples)} test samples of the {on}: all", _percent(accuracy), accuracy == 1.0,
        ),
        Claim(
            "3.1, Table 1", f"near-zero KL divergence with 100 integration steps ({label}: 0.0)",
            f"mean KL of the {on}: below {_NO_KL:g}", kl, kl < _NO_KL,
        ),
    ]  # fmt: skip


def _ten(one: Found, label: str, *, alike: bool) -> Claim:
    check, on = one.rules["midpoint:10"], f"{one.subject.title} on {one.subject.data}"
    accuracy, kl = float(check.agreement), float(check.kl)
    published = PUBLISHED[one.subject.name, "midpoint:10"]
    allowed = max(_NO_KL, 0.1 * published[1])
    same = abs(accuracy - published[0]) <= _CLOSE and abs(kl - published[1]) <= allowed
    text = f"10 integration steps reproduce {_percent(published[0])} of the {label}'s decisions, KL {published[1]}"
    return Claim(
        "3.1, Table 1", text, f"the same of the {on}: accuracy within {_CLOSE}, KL within {allowed:.1g}",
        f"{_percent(accuracy)}, KL {rounded(kl)}", same if alike else None,
        "" if alike else f"{one.subject.data} is another task: not comparable",
    )  # fmt: skip


def _adaptive(one: Found, label: str) -> Claim:
    check, on = one.rules["adaptive"], f"{one.subject.title} on {one.subject.data}"
    accuracy, kl, nodes = float(check.agreement), float(check.kl), float(check.nodes_used)
    enough = accuracy == 1.0 and kl < _NO_KL
    return Claim(
        "3.1", f"100 integration steps are needed for the {label} (and are used for the rest of the study)",
        f"Gauss-Legendre nodes a step, chosen adaptively, of the {on}: all decisions, KL below {_NO_KL:g}",
        f"{nodes:.3g} nodes ({float(check.nodes_evaluated):.3g} evaluated): {_percent(accuracy)}, KL {rounded(kl)}",
        nodes >= 100 if enough else None,
        "" if enough else "the tolerance is too large for every decision",
    )  # fmt: skip


def checks(found: Sequence[Found]) -> dict[str, tuple[bool, str]]:
    """All decisions with the paper's 100 midpoints and with adaptive nodes; every result closes."""
    made = {}
    for one in found:
        for nodes in ("midpoint:100", "adaptive"):
            if nodes in one.rules:
                value = float(one.rules[nodes].agreement)
                made[f"{one.subject.name}, {words(nodes)}: every decision"] = value == 1.0, f"agreement {value:.4f}"
        worst = max(float(check.closure) for check in one.rules.values())
        made[f"{one.subject.name}: every result closes"] = (
            worst <= CLOSES, f"closure error at most {worst:.1e} of the largest output (bound {CLOSES:g})",
        )  # fmt: skip
    return made


def figure(one: Found, folder: Path) -> Picture:
    """The largest residual of each step, for each rule; written into ``folder``."""
    picture = Figure(figsize=(9, 4.2), layout="constrained")
    axes = picture.subplots()
    for (nodes, check), colour in zip(one.rules.items(), _COLOURS * len(one.rules), strict=False):
        values = np.where(check.residual > 0, check.residual, np.nan)
        axes.plot(check.step, values, label=words(nodes), color=colour, linewidth=0.9, alpha=0.85)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("largest |residual|")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, title="nodes of a step", title_fontsize=8)
    axes.set_title(f"{one.subject.title} on {one.subject.data}", fontsize=10)
    name = f"residuals_{one.subject.name}.png"
    plots.save(picture, folder / name)
    return Picture(
        f"figures/{name}",
        f"{one.subject.title} on {one.subject.data}: what each step leaves open, the largest over test samples and "
        "outputs (log-probabilities).",
    )
