"""Runs, a result and a store of checkpoints as a release wrote them, kept under ``data/`` to be read by all later ones.

``from support.old_versions import main; main(FOLDER)`` writes them anew with the release that is installed: done once
for each version of the formats, before anything that could change them. What the release itself read from them and
answered about them lies beside them, as ``answers.json``: floats as hexadecimal strings, so that bits are compared.

Data and rates are small integers and powers of two wherever a run is computed again bit by bit, so that no order of
summation rounds: such a run is the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import explaind_core as explaind

DATA = Path(__file__).parent / "data"
MODES = ("steps", "parameters", "snapshots")
INPUTS = torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, -1.0], [0.0, 2.0, 2.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
TARGETS = torch.tensor([[1.0, 0.0], [0.0, -1.0], [2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)


def linear() -> nn.Module:
    """A model whose training on these data is exact in floating point."""
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) - 2)
        model.bias.copy_(torch.tensor([1.0, -1.0]))
    return model


def network() -> nn.Module:
    """A model with buffers that move, and two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Rates that are powers of two."""
    return torch.optim.SGD(model.parameters(), lr=2.0**-4, momentum=0.5, weight_decay=2.0**-3)


def inferred() -> explaind.InferredRule:
    """The rule that is assumed of :class:`Unknown`."""
    return explaind.InferredRule(momentum=0.5, decay="coupled", force=True)


class Unknown(torch.optim.SGD):
    """An optimizer that no plugin speaks for."""


def record(folder: Path, model: nn.Module, optimizer: Any, loss: Any, targets: Any, **options: Any) -> None:
    """Four steps of two samples."""
    each = optimizer if isinstance(optimizer, list) else [optimizer]
    with explaind.Recorder(folder, model, optimizer, loss, train_size=4, **options) as recorder:
        for s in range(4):
            ids = torch.tensor([s, (s + 1) % 4])
            for one in each:
                one.zero_grad()
            value = loss(model(INPUTS[ids]), targets[ids])
            value.backward()
            recorder.batch(INPUTS[ids], targets[ids], ids=ids)
            if s == 2:
                recorder.clip_grad_norm_(2.0**10)
            for one in each:
                one.step()
            recorder.log(loss=value.item())


def write(folder: Path, classification: Any) -> None:
    """Everything that is kept of a version."""
    labels = TARGETS.argmax(1)
    for mode in MODES:
        model = linear()
        every = {"snapshot_every": 2} if mode != "steps" else {}
        record(folder / mode, model, sgd(model), nn.MSELoss(reduction="sum"), TARGETS, mode=mode, **every)
    model = network()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    record(folder / "transformers_loss", model, adam, classification, labels)
    model = network()
    first, rest = list(model[0].parameters()), [p for m in model[1:] for p in m.parameters()]
    two = [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)]
    record(folder / "joint", model, two, nn.CrossEntropyLoss(), labels)
    model = linear()
    unknown = Unknown(model.parameters(), lr=2.0**-4, momentum=0.5, weight_decay=2.0**-3)
    record(folder / "inferred", model, unknown, nn.MSELoss(reduction="sum"), TARGETS, rule=inferred())
    run = opened(folder, "steps")
    explaind.attribute(run, INPUTS[:2], progress=False, nodes=2, out=folder / "forward.zarr")
    keep = ("step", "gradient_step", "train", "test")
    explaind.attribute(run, INPUTS[:2], keep=keep, progress=False, nodes=2, out=folder / "adjoint.zarr")
    checkpoints = [{n: t.clone() for n, t in run.theta(s).items()} for s in (0, 2, 4)]
    explaind.import_checkpoints(folder / "checkpoints", checkpoints, linear(), labels=[0, 2, 4], progress=False)


RUNS = (*MODES, "transformers_loss", "joint", "inferred")


def opened(folder: Path, name: str) -> explaind.Run:
    """One of the runs, with the model that was recorded."""
    model = network() if name in ("transformers_loss", "joint") else linear()
    return explaind.open_run(folder / name, model=model, rule=inferred() if name == "inferred" else None)


def floats(tensor: Any) -> list[str]:
    """Every entry as it is."""
    return [float(x).hex() for x in torch.as_tensor(tensor).double().flatten()]


def read(run: explaind.Run) -> dict[str, Any]:
    """What lies in a run: bits."""

    def tensors(found: Any) -> dict[str, list[str]]:
        return {name: floats(tensor) for name, tensor in found.items()}

    return {
        "theta": [tensors(run.theta(s)) for s in range(5)],
        "gradients": [tensors(run.gradients(s)) for s in run.steps],
        "buffers": [tensors(run.buffers(s)) for s in range(5)],
        "hyper": [[{k: repr(v) for k, v in g.items()} for g in run.hyper(s)] for s in run.steps],
        "ids": [run.sample_ids(s).tolist() for s in run.steps],
        "inputs": [floats(run.batch(s).inputs) for s in run.steps],
        "clips": [repr(run.clips(s)) for s in run.steps],
        "metrics": floats(run.metrics.loss.values),
        "rule": run.rule_name,
        "optimizer": run.manifest["optimizer"],
        "loss": repr(run.loss) if isinstance(run.loss, nn.Module) else getattr(run.loss, "__name__", None),
    }


def answers(run: explaind.Run) -> dict[str, list[str]]:
    """What is computed from a run; in the last bits that is the machine's."""
    model = network() if "1.running_mean" in run.buffers(0) else linear()
    split = explaind.attribute(run, INPUTS[:2], keep=("step", "layer", "test", "output"), nodes=2, progress=False)
    walked = explaind.attribute(run, INPUTS[:2], keep=("train", "test", "output"), nodes=2, progress=False)
    found = {
        f"split/{n}": floats(split[n].values) for n in ("kernel", "regularization", "residual", "initial", "final")
    }
    found |= {f"walked/{n}": floats(walked[n].values) for n in ("kernel", "regularization")}
    # What rounding leaves of a bias before a normalisation was in the residual then.
    left = walked.residual + walked.unattributed if "unattributed" in walked else walked.residual
    found["walked/residual"] = floats(left.values)
    optimizer = (
        [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(model[1:].parameters())]
        if len(run.optimizers) > 1
        else Unknown(model.parameters(), lr=0.1)
        if "Unknown" in run.manifest["optimizer"]
        else sgd(model)
        if run.manifest["optimizer"].endswith("SGD")
        else torch.optim.AdamW(model.parameters())
    )
    run.restore(model, optimizer, 3)
    found["restored"] = [x for p in model.parameters() for x in floats(p.detach())]
    return found


def result(path: Path) -> dict[str, Any]:
    """What lies in a stored result: bits."""
    found = explaind.open_result(path)
    attrs = {k: repr(v) for k, v in sorted(found.attrs.items())}
    return {
        "values": {n: floats(v.values) for n, v in found.data_vars.items()},
        "dims": dict(found.sizes),
        "attrs": attrs,
    }


def main(folder: Path) -> None:
    """Write them, and what this release reads and answers."""
    from explaind_core.integrations import losses

    folder.mkdir(parents=True, exist_ok=True)
    write(folder, losses.classification)
    runs = {name: opened(folder, name) for name in RUNS}
    found = {
        "read": {name: read(run) for name, run in runs.items()},
        "answers": {name: answers(run) for name, run in runs.items()},
        "results": {name: result(folder / f"{name}.zarr") for name in ("forward", "adjoint")},
    }
    (folder / "answers.json").write_text(json.dumps(found, indent=None))
