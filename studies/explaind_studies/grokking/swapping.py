"""Figure 7: swap layers of the final model into checkpoints."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from explaind_core.progress import track
from explaind_studies.findings import Claim, Table
from explaind_studies.grokking.subject import OUTER, Subject, names_of
from explaind_studies.workbook import Workbook

__all__ = ["SHOWN", "SWAPS", "swap_claims", "swap_table", "swapping"]

#: What is swapped in, as the paper's legend has it.
SWAPS = ("Emb.+Lin2+Dec.", "Decoder", "All but att.", "Emb.", "Emb.+Dec.")
#: The paper's checkpoints whose confusion matrices are shown.
SHOWN = (1100, 1700)
_SWAPPED = "Emb.+Lin2+Dec."


def swapping(book: Workbook, subject: Subject) -> xr.Dataset:
    """Accuracies over (swap, step) and confusion matrices over (stage, edited, true, predicted)."""
    return book.part("swapping", lambda: _swap(book, subject))


def _swap(book: Workbook, subject: Subject) -> xr.Dataset:
    stages, setting = subject.stages, subject.setting
    final = subject.run.theta(stages.last)
    steps = np.unique([*range(setting.test_every, stages.last + 1, setting.test_every), stages.last])
    model = subject.model()
    change = np.zeros((len(SWAPS), len(steps)))
    before = np.zeros(len(steps))
    for column, step in enumerate(track(steps.tolist(), len(steps), "swapping layers", enabled=book.progress)):
        before[column] = float(
            (_predicted(subject, model, step, final, ()) == subject.task.test_targets).double().mean()
        )
        for row, name in enumerate(SWAPS):
            right = _predicted(subject, model, step, final, OUTER[name]) == subject.task.test_targets
            change[row, column] = float(right.double().mean()) - before[column]
    confusion = np.stack([
        np.stack([
            _confusion(subject, _predicted(subject, model, stages.at(at), final, layers))
            for layers in ((), OUTER[_SWAPPED])
        ])
        for at in SHOWN
    ])  # fmt: skip
    return xr.Dataset(
        {
            "change": (("swap", "step"), change), "accuracy": ("step", before),
            "confusion": (("stage", "edited", "true", "predicted"), confusion),
        },
        coords={"swap": list(SWAPS), "step": steps, "stage": [stages.at(at) for at in SHOWN], "edited": [0, 1]},
    )  # fmt: skip


def _predicted(
    subject: Subject, model: torch.nn.Module, step: int, final: dict[str, Tensor], layers: tuple[str, ...]
) -> Tensor:
    """Decisions on the test set after ``step``, some layers being the final model's."""
    theta = subject.run.theta(step)
    swapped = names_of(layers, model) if layers else []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(final[name] if name in swapped else theta[name])
        decided: Tensor = model(subject.task.test_inputs).argmax(-1)
    return decided


def _confusion(subject: Subject, predicted: Tensor) -> np.ndarray:
    """Counts ``[true, predicted]`` of the p residues and the two tokens that are no numbers."""
    size = subject.task.vocabulary
    found: np.ndarray = (
        torch.bincount(subject.task.test_targets * size + predicted, minlength=size**2).view(size, size).numpy()
    )
    return found


def error_profile(confusion: np.ndarray, p: int) -> tuple[int, int]:
    """Errors; and those that lie on the three most frequent off-diagonals: values of ``(predicted - true) mod p``.

    Example:
        >>> error_profile(np.array([[5, 2, 0], [0, 5, 2], [1, 1, 5]]), 3)
        (6, 6)
    """
    inner = confusion[:p, :p]
    true, predicted = np.indices(inner.shape)
    by_difference = np.bincount(((predicted - true) % p).ravel(), inner.ravel(), minlength=p)
    wrong = int(confusion.sum() - by_difference[0])
    return wrong, int(np.sort(by_difference[1:])[-3:].sum())


def _mean(values: xr.DataArray) -> float:
    return float(values.mean()) if values.size else float("nan")


def swap_table(found: xr.Dataset, subject: Subject) -> Table:
    """What every swap does, by phase of the run."""
    stages = subject.stages
    phases = {
        f"up to {stages.memorised}": slice(None, stages.memorised),
        f"{stages.memorised + 1} to {stages.generalised}": slice(stages.memorised + 1, stages.generalised),
    }
    rows = []
    for name in SWAPS:
        change = found.change.sel(swap=name)
        best = int(change.values.argmax())
        rows.append([
            name, *(_mean(100 * change.sel(step=phase)) for phase in phases.values()),
            100 * float(change[best]), int(change.step[best]), 100 * float(change.min()),
        ])  # fmt: skip
    return Table(
        "swapping", "Figure 7a in numbers: accuracy gained by swapping in layers of the final model, in points",
        ("swapped in", *(f"mean over steps {phase}" for phase in phases), "most", "at step", "least"), rows,
        f"On {int(found.confusion.isel(stage=0, edited=0).sum())} test samples, every "
        f"{subject.setting.test_every} steps.",
    )  # fmt: skip


def swap_claims(found: xr.Dataset, subject: Subject) -> list[Claim]:
    """Appendix E's claims about swapping."""
    stages = subject.stages
    after = found.change.sel(step=slice(min(stages.memorised, stages.last), stages.last))
    gain = 100 * after.sel(swap=_SWAPPED)
    positive = float((gain > 0).mean())
    others = {n: 100 * float(after.sel(swap=n).mean()) for n in SWAPS if n != _SWAPPED}
    profile = {}
    for row, at in enumerate(SHOWN):  # by position: two stages of a short run may be one step
        counts = found.confusion.isel(stage=row).values
        profile[at] = [error_profile(counts[edited], subject.setting.p) for edited in (0, 1)]
    fewer = all(edited[1] < plain[1] for plain, edited in profile.values())
    return [
        Claim(
            "Figure 7a", "swapping in embedding, linear 2 and decoder improves accuracy by over 15 points",
            f"largest gain in points from memorisation (step {stages.memorised}) on; part of the checkpoints that gain",
            f"{float(gain.max()):.1f}; {positive:.0%}", float(gain.max()) > 15,
        ),
        Claim(
            "5.1", "the outer layers consistently improve the checkpoints' predictions, other combinations do not",
            f"mean gain over steps {stages.memorised} to {stages.last}, in points: {_SWAPPED}; the others",
            f"{float(gain.mean()):.1f}; " + ", ".join(f"{n} {v:.1f}" for n, v in others.items()),
            float(gain.mean()) > 0 and all(v < float(gain.mean()) for v in others.values())
            and any(v < 0 for v in others.values()),
        ),
        Claim(
            "5.2, Figure 7b to e", "swapping reduces the systematic, cyclic errors on the off-diagonals",
            "errors, and those on the three most frequent off-diagonals, before and after",
            "; ".join(f"{at}: {a[0]} ({a[1]}) to {b[0]} ({b[1]})" for at, (a, b) in profile.items()), fewer,
        ),
    ]  # fmt: skip
