"""Section 3.1 and Table 1: are the rebuilt predictions those of the model, and with how many nodes a step?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import xarray as xr

from explaind_studies.report import Report
from explaind_studies.table1_models import MODELS, Setting, Subject, subjects
from explaind_studies.table1_page import Found, checks, claims, figure, models_table, summary, table
from explaind_studies.workbook import Workbook

__all__ = ["MODELS", "PAPER", "QUICK", "Setting", "study"]

PAPER = Setting()
QUICK = Setting(
    seed=0, explained=20, p=5, train=10, test=5, most_steps=40, cnn_width=2, cnn_epochs=1, cnn_batch=128,
    resnet_width=16, resnet_images=512, resnet_batch=128, resnet_explained=4,
)  # fmt: skip


def study(workbook: Workbook, setting: Setting) -> Report:
    """Train each model, rebuild test predictions with each rule of quadrature, and compare.

    Parts: ``NAME-trained``, and ``NAME-RULE`` for each rule. Recorded runs lie in ``runs/NAME``.

    Raises:
        QuestionError: the setting names an experiment that there is not.
    """
    found = [_found(workbook, subject, setting) for subject in subjects(setting, progress=workbook.progress)]
    return Report(
        study="table1",
        title="Table 1: the rebuilt predictions against the models",
        summary=summary(found, setting),
        settings=workbook.settings,
        claims=claims(found, setting),
        tables=[table(found), models_table(found)],
        pictures=[figure(one, workbook.figures) for one in found],
        checks=checks(found),
        parts=workbook.parts,
    )


def _found(workbook: Workbook, subject: Subject, setting: Setting) -> Found:
    path = workbook.folder / "runs" / subject.name
    trained = workbook.part(f"{subject.name}-trained", partial(subject.trained, path), f"on {subject.data}")
    rules: Mapping[int | str, xr.Dataset] = {
        nodes: workbook.part(
            f"{subject.name}-{_filename(nodes)}",
            partial(subject.verified, path, nodes, setting.tolerance, progress=workbook.progress),
            f"nodes: {nodes}",
        )
        for nodes in subject.nodes
    }
    peaks = {nodes: workbook.parts[f"{subject.name}-{_filename(nodes)}"]["peak_bytes"] for nodes in subject.nodes}
    return Found(subject, trained, rules, peaks)


def _filename(nodes: int | str) -> str:
    return str(nodes).replace(":", "-")
