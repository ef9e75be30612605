"""The pruning study: importance against a dense oracle, its images, and its report."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import explaind_core as explaind
from explaind_core.errors import QuestionError, StoreError
from explaind_studies.catalogue import STUDIES
from explaind_studies.pruning import PAPER, QUICK, Setting
from explaind_studies.pruning import study as study_function
from explaind_studies.pruning.curves import IMPORTANCE
from explaind_studies.pruning.setting import LEVELS, Task, images
from explaind_studies.pruning.training import record
from explaind_studies.resnet import ResNet9
from support.cifar_files import write_cifar
from support.pruning_cases import TINY, small_task
from support.study_runs import run_quietly

# ---------------------------------------------------------------------- importance


def dense_importance(run: explaind.Run, model: ResNet9, samples: torch.Tensor, setting: Setting, nodes: int):
    """Sample by sample, step by step, node by node: what each training sample's gradients did to each output."""
    names, total, model = list(run.parameters), {}, copy.deepcopy(model).requires_grad_(True)
    where, weights = np.polynomial.legendre.leggauss(nodes)

    def gradients(theta, function):
        model.load_state_dict(theta)
        return torch.autograd.grad(function(), [model.get_parameter(n) for n in names])

    held: dict[int, list[torch.Tensor]] = {}  # a momentum buffer for every training sample
    for s in run.steps:
        before, after, batch, (group,) = run.theta(s - 1), run.theta(s), run.batch(s), run.hyper(s)
        for known in held.values():
            for buffer in known:
                buffer *= setting.momentum
        for image, target, sample in zip(batch.inputs, batch.targets, batch.ids.tolist(), strict=True):
            raw = gradients(before, lambda i=image, t=target: -model(i[None])[0, t])
            buffers = held.setdefault(sample, [torch.zeros_like(g) for g in raw])
            for buffer, g in zip(buffers, raw, strict=True):
                buffer += g / len(batch.ids)
        for x, image in enumerate(samples):
            for j in range(model.head.out_features):
                phi = None
                for t, w in zip((where + 1) / 2, weights / 2, strict=True):
                    point = {n: before[n] + t * (after[n] - before[n]) for n in names}
                    found = gradients(point, lambda i=image, j=j: model(i[None])[0, j])
                    phi = [w * f + (0 if phi is None else p) for f, p in zip(found, phi or found, strict=True)]
                influence = total.setdefault((x, j), [torch.zeros_like(p) for p in phi])
                for sample in held:
                    for place, p, h in zip(influence, phi, held[sample], strict=True):
                        place -= p * group["lr"] * h
    return torch.cat([sum(influence[i].abs() for influence in total.values()).reshape(-1) for i in range(len(names))])


def record64(task: Task, setting: Setting, folder) -> explaind.Run:
    """The study's own loop on a network in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return record(task, setting, folder, 7, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Nine steps in float64 of the narrowest network, under the study's own loop."""
    task, setting = small_task(), replace(TINY, width=1)
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return record64(task, setting, folder), task, setting, folder


def test_importance_equals_the_sum_over_steps_and_samples_one_by_one(recorded):
    run, task, setting, _ = recorded
    samples = task.score_images[:2]
    found = explaind.parameter_importance(run, samples, nodes=2, progress=False)
    truth = dense_importance(run, run.model, samples, setting, nodes=2)
    assert truth.abs().max() > 1e-3
    # Sums of some hundred products in float64.
    np.testing.assert_allclose(found.kernel, truth, rtol=0, atol=1e-10 * float(truth.max()))
    assert found.attrs["nodes_used"] == 2 * len(run.steps)
    assert found.attrs["closure"] < 1e-12


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_what_the_study_keeps_of_the_scores(recorded, monkeypatch, at_once):
    """Importance and final value of every entry, in the order of the network's parameters; how exact they are."""
    run, task, setting, folder = recorded
    module = importlib.import_module("explaind_studies.pruning.study")
    monkeypatch.setattr(module, "record", lambda *_, **__: run)
    workbook = SimpleNamespace(folder=folder.parent, progress=False)
    kept = module._scores(workbook, replace(setting, nodes=2, samples_at_once=at_once), task, 7)
    found = explaind.parameter_importance(run, task.score_images, nodes=2, progress=False)
    np.testing.assert_allclose(kept.importance, found.kernel, rtol=1e-12)
    last = run.theta(len(run.steps))
    flat = torch.cat([last[name].reshape(-1) for name, _ in run.model.named_parameters()])
    assert torch.equal(torch.from_numpy(kept.theta.values), flat)
    assert dict(kept.residual.sizes) == {"test": 5, "output": 3}
    for name in ("initial", "final", "residual"):
        np.testing.assert_allclose(kept[name], found[name], rtol=0, atol=1e-12 * float(abs(found.final).max()))
    assert kept.attrs == {
        "steps": 9, "nodes_per_step": 2, "update_error": found.attrs["update_error"], "closure": kept.attrs["closure"]
    }  # fmt: skip
    assert kept.attrs["closure"] < 1e-12


def test_training_is_the_papers(recorded):
    """SGD with momentum and weight decay, a triangle of learning rates, every sample once an epoch."""
    run, _, setting, _ = recorded
    groups = [run.hyper(s)[0] for s in run.steps]
    assert {(g["momentum"], g["weight_decay"], g["nesterov"]) for g in groups} == {(0.9, 0.005, False)}
    rates = [0, 1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # up in one epoch of 3 steps, down in two
    np.testing.assert_allclose([g["lr"] for g in groups], [setting.peak * r for r in rates], rtol=1e-12)
    epochs = [torch.cat([run.batch(s).ids for s in (e, e + 1, e + 2)]) for e in (1, 4, 7)]
    assert all(sorted(ids.tolist()) == list(range(20)) for ids in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert run.metrics.loss.notnull().all()


def test_a_finished_recording_is_taken_and_an_unfinished_one_started_over(recorded, tmp_path, monkeypatch):
    run, task, setting, folder = recorded
    with monkeypatch.context() as patch:
        patch.setattr(explaind, "Recorder", None)
        assert len(record64(task, setting, folder).steps) == 9
    log, calls = explaind.Recorder.log, []

    def interrupted(self, **metrics):
        calls.append(metrics)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return log(self, **metrics)

    monkeypatch.setattr(explaind.Recorder, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record64(task, setting, tmp_path / "run")
    monkeypatch.undo()
    again = record64(task, setting, tmp_path / "run")
    assert len(again.steps) == 9
    assert all(torch.equal(again.theta(9)[n], run.theta(9)[n]) for n in run.parameters)


# ---------------------------------------------------------------------- images and curves


@pytest.mark.parametrize("scored", [10, 57])
def test_digits_are_split_in_three_with_equal_shares_of_classes(scored):
    task = images(Setting(scored=scored), seed=1)
    assert (len(task.train_images), len(task.score_images), len(task.test_images)) == (1200, scored, 597 - scored)
    together = torch.cat([task.train_images, task.score_images, task.test_images]).flatten(1)
    from sklearn.datasets import load_digits

    digits = torch.from_numpy(load_digits().images).float()
    assert len(together.unique(dim=0)) == len(digits.flatten(1).unique(dim=0))  # every image once
    assert together.shape == (1797, 256)
    shares = torch.bincount(task.train_targets) / 1200
    assert (task.classes, task.channels) == (10, 1)
    assert float((torch.bincount(task.score_targets, minlength=10) / scored - shares).abs().max()) < 0.06
    assert abs(float(task.train_images.mean())) < 1e-5
    assert abs(float(task.train_images.std()) - 1) < 1e-5
    other = images(Setting(scored=scored), seed=2)
    assert not torch.equal(task.train_images, other.train_images)
    assert torch.equal(task.train_images, images(Setting(scored=scored), seed=1).train_images)


def test_cats_and_dogs_are_scored_and_evaluated_apart(tmp_path):
    write_cifar(tmp_path, 40)
    task = images(Setting(data=str(tmp_path), scored=4), seed=0)
    assert (len(task.train_images), len(task.score_images), len(task.test_images)) == (60, 4, 8)
    assert (task.classes, task.channels) == (2, 3)
    assert len(torch.cat([task.score_images, task.test_images]).flatten(1).unique(dim=0)) == 12


def test_questions_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(QuestionError, match="cannot be scored"):
        images(Setting(scored=590), seed=0)
    with pytest.raises(StoreError):
        images(Setting(data=str(tmp_path)), seed=0)
    for wrong in ({"levels": (0.9, 0.8)}, {"levels": (0.5, 1.0)}, {"levels": ()}, {"seeds": 0}):
        with pytest.raises(QuestionError):
            replace(PAPER, **wrong).resolved()


# ---------------------------------------------------------------------- the whole


def quiet(folder, setting, **options):
    return run_quietly("pruning", folder, setting, **options)


SMALL = Setting(seeds=2, width=2, batch=400, epochs=1, scored=10, nodes=1, levels=(0.7, 0.9), retrain_epochs=1)


def test_the_study_reports_and_is_taken_up(tmp_path, monkeypatch):
    report = quiet(tmp_path / "study", SMALL, kept=tmp_path / "kept")
    assert report.holds
    page = (tmp_path / "kept" / "README.md").read_text()
    assert "The data are not the paper's" in page
    assert (tmp_path / "kept" / "figures" / "figure_2.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert (facts["settings"]["width"], facts["settings"]["batch"]) == (2, 400)
    assert list(facts["parts"]) == ["scores-0", "pruned-0", "scores-1", "pruned-1"]
    table = json.loads((tmp_path / "kept" / "tables" / "pruning.json").read_text())
    assert [row[:2] for row in table["rows"][:2]] == [[IMPORTANCE, 0.7], [IMPORTANCE, 0.9]]
    assert not list((tmp_path / "study").glob("recording-*"))
    monkeypatch.setattr(explaind, "attribute", None)
    assert [c.value for c in quiet(tmp_path / "study", SMALL).claims] == [c.value for c in report.claims]


def test_the_study_of_cats_and_dogs(tmp_path):
    write_cifar(tmp_path / "data", 40)
    setting = replace(SMALL, data=str(tmp_path / "data"), seeds=1, batch=30, scored=4, levels=(0.7,))
    report = quiet(tmp_path / "study", setting)
    assert report.holds
    assert "Cats and dogs" in report.summary[0]
    assert report.tables[1].rows[0][3] == 2  # steps


def test_the_catalogue_knows_it():
    assert STUDIES["pruning"].setting() == PAPER
    assert STUDIES["pruning"].setting(quick=True, seed=4) == replace(QUICK, seed=4)
    assert (PAPER.seeds, PAPER.levels, PAPER.epochs, PAPER.peak_epoch) == (5, LEVELS, 12, 5)
    assert (replace(PAPER, data="x").resolved().width, replace(PAPER, data="x").resolved().batch) == (64, 256)
    assert callable(study_function)
