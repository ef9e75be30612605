"""The demo, very small: what it writes, and that it can be interrupted anywhere."""

from __future__ import annotations

import shutil
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console

import explaind_core as explaind
from explaind_core.errors import ExplaindError
from explaind_studies import demo as study
from explaind_studies.demo import Setting, demo, train
from explaind_studies.modular_addition import LAYERS

#: A tolerance that one node a step always meets: quick, and the same nodes however the samples are cut into pieces.
TINY = Setting(p=7, train=20, test=8, seed=0, explained=8, most_steps=6, samples_at_once=8, tolerance=10.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    text = StringIO()
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, TINY, progress=False, console=Console(file=text, width=200)), text.getvalue()


def interrupt(monkeypatch, *, after: int) -> None:
    """Ctrl-C in the accuracy after that many steps (it is measured twice a step)."""
    calls, accuracy = [0], study.accuracy

    def measured(*args):
        calls[0] += 1
        if calls[0] > 2 * after:
            raise KeyboardInterrupt
        return accuracy(*args)

    monkeypatch.setattr(study, "accuracy", measured)


def last_theta(folder) -> dict[str, torch.Tensor]:
    run = explaind.open_run(folder)
    return run.theta(len(run.steps))


def test_it_writes_the_result_the_scores_and_the_picture(finished):
    folder, made, _ = finished
    result = explaind.open_result(folder / "result.zarr")
    assert dict(result.kernel.sizes) == {"step": 6, "layer": 6, "test": 8, "output": 9}
    assert result.layer.values.tolist() == list(LAYERS)
    scores = xr.open_zarr(folder / "scores.zarr", consolidated=False)
    assert dict(scores.layer_kernel.sizes) == {"step": 6, "layer": 6}
    assert scores.kernel.dims == ("step",)
    assert made.figure.read_bytes().startswith(b"\x89PNG")
    assert made.figure.stat().st_size > 10_000


def test_its_checks_are_those_of_the_library(finished):
    _, made, text = finished
    assert made.closure <= 1e-4
    assert made.check.update_error < 1e-4  # float32: rounding of theta (6e-8) against steps of 1e-3
    assert made.holds == (made.check.agreement == 1.0 and made.check.kl <= 2e-5 and made.closure <= 1e-4)
    assert ("checks hold" in text) == made.holds
    assert "recorded 6 steps" in text


def test_its_scores_are_the_importances_of_its_result(finished):
    _, made, _ = finished
    result = made.result.load()
    np.testing.assert_allclose(made.scores.layer_kernel, explaind.importance(result).kernel, rtol=1e-12)
    whole = abs(result.kernel.astype("float64").sum("layer")).sum(["test", "output"])
    np.testing.assert_allclose(made.scores.kernel, whole, rtol=1e-12)
    absolute, signed = (explaind.relative_regularization(result, form=form) for form in ("absolute", "signed"))
    np.testing.assert_allclose(made.scores.relative_regularization, absolute, rtol=1e-12)
    np.testing.assert_allclose(made.scores.relative_regularization_signed, signed, rtol=1e-12)


def test_it_logs_accuracies_and_losses_at_every_step(finished):
    metrics = finished[1].run.metrics
    assert metrics.step.values.tolist() == [1, 2, 3, 4, 5, 6]
    assert not metrics[["train_accuracy", "test_accuracy", "train_loss_before"]].isnull().any().to_array().any()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_interrupted_training_continues_to_the_same_bits(finished, tmp_path, monkeypatch, after):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        interrupt(patch, after=after)
        train(TINY, tmp_path / "run", progress=False)
    assert len(explaind.open_run(tmp_path / "run").steps) == after
    train(TINY, tmp_path / "run", progress=False)
    once, resumed = last_theta(finished[0] / "run"), last_theta(tmp_path / "run")
    assert all(torch.equal(once[n], resumed[n]) for n in once)
    logged = [explaind.open_run(path / "run").metrics for path in (finished[0], tmp_path)]
    xr.testing.assert_identical(*logged)


def test_training_without_recording_takes_the_same_path(finished, tmp_path):
    model = train(TINY, tmp_path, record=False, progress=False)
    once = last_theta(finished[0] / "run")
    assert all(torch.equal(once[n], p) for n, p in model.named_parameters())
    assert not any(tmp_path.iterdir())


def test_a_finished_demo_is_not_trained_again(finished, monkeypatch):
    folder, made, _ = finished
    monkeypatch.setattr(study, "train", None)
    again = demo(folder, TINY, progress=False, console=Console(file=StringIO()))
    xr.testing.assert_identical(again.scores, made.scores)
    xr.testing.assert_identical(again.result.load(), made.result.load())


@pytest.fixture
def copied(finished, tmp_path):
    """A folder that holds the trained run and nothing else."""
    shutil.copytree(finished[0] / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize("at_once", [3, 4])
def test_samples_in_several_pieces_have_the_scores_of_one_piece(finished, copied, at_once):
    pieces = demo(copied, replace(TINY, samples_at_once=at_once), progress=False, console=Console(file=StringIO()))
    assert pieces.result is None
    stored = [xr.open_zarr(path, consolidated=False) for path in copied.glob("piece*")]
    assert not any("residual" in piece for piece in stored)  # only scores stay on disk
    for name, score in pieces.scores.items():
        # float32 influences, which matrix products of other sizes round differently; sums of 72 of them, signs and all.
        largest = float(abs(finished[1].scores[name]).max())
        np.testing.assert_allclose(score, finished[1].scores[name], rtol=0, atol=1e-5 * largest, err_msg=name)


def test_interrupted_pieces_are_taken_up(copied, monkeypatch):
    setting, decomposed = replace(TINY, samples_at_once=3), []
    attribute = explaind.attribute

    def counted(run, piece, **question):
        if len(decomposed) == 2:
            raise KeyboardInterrupt
        decomposed.append(len(piece))
        return attribute(run, piece, **question)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(explaind, "attribute", counted)
        demo(copied, setting, progress=False, console=Console(file=StringIO()))
    decomposed[:] = ["restart"]
    monkeypatch.setattr(explaind, "attribute", counted)
    resumed = demo(copied, setting, progress=False, console=Console(file=StringIO()))
    assert decomposed == ["restart", 2]  # the third piece of 3 + 3 + 2 samples
    monkeypatch.undo()
    for path in copied.glob("piece*"):
        shutil.rmtree(path)
    whole = demo(copied, setting, progress=False, console=Console(file=StringIO()))
    xr.testing.assert_identical(resumed.scores, whole.scores)


@pytest.mark.parametrize("other", [{"tolerance": 3e-3}, {"explained": 7}])
def test_pieces_of_another_setting_are_not_taken_up(copied, other):
    quiet = {"progress": False, "console": Console(file=StringIO())}
    setting = replace(TINY, samples_at_once=4)
    demo(copied, replace(setting, **other), **quiet)
    mixed = demo(copied, setting, **quiet)
    for path in copied.glob("piece*"):
        shutil.rmtree(path)
    xr.testing.assert_identical(mixed.scores, demo(copied, setting, **quiet).scores)


@pytest.mark.parametrize("other", [{"seed": 1}, {"train": 19}])
def test_a_folder_with_the_run_of_another_setting_is_refused(copied, other):
    with pytest.raises(ExplaindError, match="the folder holds a demo of other data") as error:
        demo(copied, replace(TINY, **other), progress=False, console=Console(file=StringIO()))
    assert "--out" in error.value.remedy
