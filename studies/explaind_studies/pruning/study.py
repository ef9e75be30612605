"""The study: train and record, score every parameter, prune in four ways, compare."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
import xarray as xr

import explaind_core as explaind
from explaind_core import plots
from explaind_studies.findings import Picture
from explaind_studies.pruning.curves import curves, divergence, loaded
from explaind_studies.pruning.findings import checks, claims, figure_2, tables
from explaind_studies.pruning.setting import Setting, Task, images
from explaind_studies.pruning.training import accuracy, network, outputs, record
from explaind_studies.report import Report
from explaind_studies.workbook import Workbook

__all__ = ["study"]


def study(workbook: Workbook, setting: Setting) -> Report:
    """Run it: for every seed the parts ``scores-SEED`` and ``pruned-SEED``.

    A recording is deleted when its parameters are scored; an interrupted study takes up a finished recording, and
    starts an unfinished one over.
    """
    setting = setting.resolved()
    seeds = range(setting.seed, setting.seed + setting.seeds)
    scores, found, runs = {}, [], []
    for seed in seeds:
        task = images(setting, seed)
        scores[seed] = workbook.part(f"scores-{seed}", partial(_scores, workbook, setting, task, seed))
        shutil.rmtree(workbook.folder / f"recording-{seed}", ignore_errors=True)
        model = loaded(network(setting, task, seed), torch.from_numpy(scores[seed].theta.values))
        counted = len(scores[seed].theta) - model.head.weight.numel()
        importance = torch.from_numpy(scores[seed].importance.values[:counted])
        found.append(workbook.part(f"pruned-{seed}", partial(curves, model, importance, task, setting, seed)))
        runs.append(_row(seed, scores[seed], task, model))
    together = xr.concat(found, "seed").assign_coords(seed=list(seeds))
    title = f"{_data(setting)}, {setting.seeds} seed{'s' if setting.seeds > 1 else ''}: mean and standard deviation"
    plots.save(figure_2(together, title), workbook.figures / "figure_2.png")
    return Report(
        study="pruning",
        title="Pruning by importance (section 4.2, Figure 2)",
        summary=_summary(setting, task, model),
        settings=asdict(setting),
        claims=claims(together),
        tables=tables(together, runs),
        pictures=[
            Picture(
                "figures/figure_2.png",
                "Figure 2 of this run: networks with parameters pruned by their accumulated kernel importance, by "
                "magnitude or at random, not retrained, and with filters pruned and retrained after Li et al. (2017). "
                "Bands: one standard deviation.",
            )
        ],
        checks=checks(scores),
        parts=workbook.parts,
    )


def _data(setting: Setting) -> str:
    return "scikit-learn's digits" if setting.data is None else "CIFAR-10's cats and dogs"


def _scores(workbook: Workbook, setting: Setting, task: Task, seed: int) -> xr.Dataset:
    run = record(task, setting, workbook.folder / f"recording-{seed}", seed, progress=workbook.progress)
    found = explaind.parameter_importance(
        run, task.score_images, nodes=setting.nodes, at_once=setting.samples_at_once, memory="4GiB",
        progress=workbook.progress,
    )  # fmt: skip
    last = run.theta(len(run.steps))
    names = [name for name, _ in network(setting, task, seed).named_parameters()]
    assert names == list(run.parameters)  # the scores stand in the order of the run's
    theta = torch.cat([last[name].reshape(-1) for name in names])
    # One number for every entry of all tensors, one behind the other.
    scores = xr.Dataset({"importance": ("parameter", found.kernel.values), "theta": ("parameter", theta.numpy())})
    return scores.assign(found[["initial", "final", "residual"]].drop_vars(("test", "output"))).assign_attrs(
        steps=len(run.steps),
        nodes_per_step=found.attrs["nodes_used"] / len(run.steps),
        update_error=found.attrs["update_error"],
        closure=found.attrs["closure"],
    )


def _row(seed: int, scores: xr.Dataset, task: Task, model: torch.nn.Module) -> Mapping[str, float]:
    change, residual = abs(scores.final - scores.initial), abs(scores.residual)
    rebuilt = torch.from_numpy((scores.final - scores.residual).values)
    final = torch.from_numpy(scores.final.values)
    return {
        "seed": seed,
        "training accuracy": accuracy(outputs(model, task.train_images), task.train_targets),
        "accuracy": accuracy(outputs(model, task.test_images), task.test_targets),
        "steps": int(scores.attrs["steps"]),
        "nodes per step": float(scores.attrs["nodes_per_step"]),
        "residual, mean": float(residual.mean() / change.mean()),
        "residual, largest": float(residual.max() / change.max()),
        "agreement": accuracy(rebuilt, final.argmax(1)),
        # The rebuilt log-probabilities need not sum to one.
        "KL": divergence(final, rebuilt.log_softmax(1)),
        "closure error": float(scores.attrs["closure"]),
    }


def _summary(setting: Setting, task: Task, model: torch.nn.Module) -> list[str]:
    size = sum(p.numel() for p in model.parameters())
    per_epoch = -(-len(task.train_images) // (setting.batch or 1))
    data = (
        "**The data are not the paper's.** Without `--data FOLDER` (CIFAR-10's python files) this study runs on "
        "scikit-learn's digits: 1,797 grey images of 8 x 8 in 10 classes, every pixel repeated to 16 x 16, and a "
        f"ResNet-9 of width {setting.width} in place of 64, of the same architecture. Batches of {setting.batch} in "
        f"place of 256 make {setting.epochs * per_epoch} steps; the paper's are 480."
        if setting.data is None
        else f"Cats and dogs of CIFAR-10, a ResNet-9 of width {setting.width} (the paper's is 64)."
    )
    return [
        data,
        f"{size:,} parameters, {len(task.train_images):,} training samples, {setting.epochs} epochs of {per_epoch} "
        f"steps of SGD: batches of {setting.batch}, momentum {setting.momentum:g}, weight decay "
        f"{setting.weight_decay:g}, learning rate rising from 0 to {setting.peak:g} at the end of epoch "
        f"{setting.peak_epoch} and falling to 0. {setting.seeds} seeds draw split, initialisation, batches and the "
        "random choice.",
        f"Importance is summed over {len(task.score_images)} scored samples and all {task.classes} outputs "
        f"(log-probabilities), with {setting.nodes} Gauss-Legendre nodes a step. The paper does not say which "
        f"samples it scores; here they are neither in the training set nor among the {len(task.test_images):,} "
        "samples on which accuracy and KL are measured.",
        "Pruned parameters are set to zero. The output layer is spared, as in the paper, and not counted in "
        "fractions. Only the networks of Li et al. (2017) are retrained: in every layer the same share of filters "
        "goes, those of the smallest L1 norm, with their biases and what reads them; channels tied by a residual "
        f"addition go together, chosen by the shortcut's filters; then follow {setting.retrain_epochs} epochs at a "
        f"constant learning rate of {setting.retrain_rate:g} (Li et al. retrain a quarter of the original epochs at "
        "0.001), and the next level. Magnitude, which the paper does not show, prunes the single parameters of the "
        "smallest absolute value.",
    ]
