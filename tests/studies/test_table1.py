"""The study of Table 1, very small: its numbers, that it resumes, its page and tables, its claims."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_studies import demo, digits, table1_models
from explaind_studies.table1_models import Setting, subjects
from explaind_studies.table1_page import Found, checks, claims, summary, table
from support.study_runs import run_quietly
from support.table1_setting import TINY

#: What is trained and asked, in order.
PARTS = [
    "transformer-trained", "transformer-midpoint-10", "transformer-midpoint-100", "transformer-1",
    "cnn-trained", "cnn-midpoint-10", "cnn-midpoint-100", "cnn-1", "resnet9-trained", "resnet9-midpoint-10",
]  # fmt: skip


def run(folder, setting=TINY, **options):
    return run_quietly("table1", folder, setting, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "table1"
    return folder, run(folder, kept=folder.parent / "kept")


def column(found, name):
    return [row[list(found.columns).index(name)] for row in found.rows]


# ------------------------------------------------------------------ the numbers
@pytest.mark.parametrize(("name", "steps"), [("transformer", 2), ("cnn", 2), ("resnet9", 2)])
def test_a_part_holds_what_verify_says_of_the_recorded_run(finished, name, steps):
    folder, report = finished
    subject = next(s for s in subjects(TINY) if s.name == name)
    opened = explaind.open_run(folder / "runs" / name, model=subject.make())
    assert len(opened.steps) == steps
    check = explaind.verify(opened, subject.inputs(), nodes="midpoint:10", progress=False)
    kept = xr.open_zarr(folder / "parts" / f"{name}-midpoint-10.zarr", consolidated=False)
    for field in ("agreement", "kl", "max_error", "largest_output", "update_error", "nodes_used", "samples"):
        assert float(kept[field]) == getattr(check, field), field
    np.testing.assert_array_equal(kept.residual, abs(check.residual).max(["test", "output"]))
    assert float(kept.closure) == explaind.closure_error(check.result) / check.largest_output
    assert check.samples == (3 if name == "resnet9" else 5)
    row = next(r for r in report.tables[0].rows if r[1] == subject.data and r[2] == "10 midpoints")
    assert row[5] == check.agreement
    assert row[7] == check.kl


def test_the_rows_stand_beside_the_papers_values(finished):
    folder, report = finished
    made = report.tables[0]
    assert column(made, "nodes of a step") == ["10 midpoints", "100 midpoints", "1 Gauss-Legendre"] * 2 + [
        "10 midpoints"
    ]
    assert column(made, "nodes per step") == [10, 100, 1, 10, 100, 1, 10]
    assert column(made, "paper: accuracy") == [0.748, 1.0, None, 0.997, 1.0, None, None]
    assert column(made, "paper: KL") == [0.885, 0.0, None, 0.0, 0.0, None, None]
    assert min(column(made, "seconds")) > 0
    assert min(column(made, "peak memory, GiB")) > 0.05
    stored = json.loads((folder / "tables" / "table1.json").read_text())
    assert stored["rows"] == [list(row) for row in made.rows]
    models = json.loads((folder / "tables" / "models.json").read_text())
    assert [row[1:4] + row[6:] for row in models["rows"]] == [
        ["MOD-5", 75_200, 2, 5], ["digits", 604, 2, 5], ["generated images", 606, 2, 3],
    ]  # fmt: skip


def test_the_models_are_those_of_the_paper_made_small(finished):
    folder, _ = finished
    opened = explaind.open_run(folder / "runs" / "cnn")
    assert [len(opened.batch(s).targets) for s in opened.steps] == [720, 717]
    assert sorted(opened.batch(1).ids.tolist() + opened.batch(2).ids.tolist()) == list(range(1437))
    images = explaind.open_run(folder / "runs" / "resnet9").batch(2).inputs
    assert images.shape == (4, 3, 32, 32)


def test_the_page_has_claims_tables_pictures_and_what_departs(finished):
    folder, _ = finished
    page = (folder / "README.md").read_text()
    for part in (
        "Made by `explaind study table1`", "betas (0.9, 0.98), where the paper names (0.98, 0.99)",
        "scikit-learn's digits", "100 midpoints a step are left out by default: ", "Peak memory is that of the whole",
        "## Exactness",
        "![Transformer on MOD-5", "figures/residuals_cnn.png", "| ResNet9, width 1 | digits | 100 midpoints |",
    ):  # fmt: skip
        assert part in page, part
    kept = sorted(str(p.relative_to(folder.parent / "kept")) for p in (folder.parent / "kept").rglob("*.*"))
    figures = [f"figures/residuals_{name}.png" for name in ("cnn", "resnet9", "transformer")]
    assert kept == ["README.md", *figures, "report.json", "tables/models.json", "tables/table1.json"]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)


def test_with_midpoints_for_the_large_one_nothing_is_said_to_be_left_out(finished):
    found = Found(subjects(TINY)[2], xr.Dataset({"steps": 2}), {}, {})
    assert not any("left out by default" in line for line in summary([found], TINY))


# ------------------------------------------------------------------ resuming
def test_what_is_finished_is_not_computed_again(finished, monkeypatch):
    folder, report = finished
    assert list(report.parts) == PARTS
    for module, name in ((demo, "train"), (table1_models, "train_cnn"), (explaind, "verify")):
        monkeypatch.setattr(module, name, None)
    again = run(folder)
    assert again.parts == report.parts
    assert [t.rows for t in again.tables] == [t.rows for t in report.tables]


def test_an_interrupted_study_goes_on_behind_its_last_part(tmp_path, monkeypatch):
    verify, asked = explaind.verify, []
    setting = replace(TINY, experiments=("transformer",), nodes=("midpoint:2", "left", 1))

    def counted(opened, inputs, *, nodes, **options):
        asked.append(nodes)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return verify(opened, inputs, nodes=nodes, **options)

    monkeypatch.setattr(explaind, "verify", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "study", setting)
    monkeypatch.setattr(demo, "train", None)  # closed: not trained again
    report = run(tmp_path / "study", setting)
    assert asked == ["midpoint:2", "left", "left", 1]
    assert {name.removeprefix("transformer-"): part["attempts"] for name, part in report.parts.items()} == {
        "trained": 1, "midpoint-2": 1, "left": 2, "1": 1,
    }  # fmt: skip


def test_a_training_that_was_cut_short_is_made_again(tmp_path, monkeypatch):
    subject = next(s for s in subjects(TINY, progress=False) if s.name == "resnet9")
    measured = digits.accuracy
    monkeypatch.setattr(digits, "accuracy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        subject.trained(tmp_path / "run")
    assert not (tmp_path / "run" / "closed.json").exists()
    monkeypatch.setattr(digits, "accuracy", measured)
    assert int(subject.trained(tmp_path / "run").steps) == 2


def test_a_whole_run_is_not_trained_again(finished):
    """Killed between a training's end and its part's."""
    subject = replace(next(s for s in subjects(TINY) if s.name == "transformer"), train=None)
    assert int(subject.trained(finished[0] / "runs" / "transformer").steps) == 2


# ------------------------------------------------------------------ settings
def test_experiments_are_run_in_their_order_whatever_is_named_first():
    assert [s.name for s in subjects(Setting(experiments=("resnet9", "transformer")))] == ["transformer", "resnet9"]
    with pytest.raises(QuestionError, match="no experiment 'vgg'") as error:
        subjects(Setting(experiments=("cnn", "vgg")))
    assert error.value.expected == ["transformer", "cnn", "resnet9"]


def test_the_cnn_learns_cifar_where_it_is_given(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(9, 3, 32, 32, generator=generator), torch.tensor([0, 1, 1] * 3)
    found = SimpleNamespace(
        train_images=images[:6], train_targets=targets[:6], test_images=images[6:], test_targets=targets[6:]
    )
    asked = []
    monkeypatch.setattr(table1_models, "cifar2", lambda f: asked.append(f) or found)
    setting = replace(
        TINY, experiments=("cnn",), data=str(tmp_path), cifar_batch=4, nodes=("midpoint:10",), explained=2
    )
    report = run(tmp_path / "study", setting)
    assert set(asked) == {tmp_path}
    opened = explaind.open_run(tmp_path / "study" / "runs" / "cnn")
    assert [len(opened.batch(s).targets) for s in opened.steps] == [4, 2]
    assert opened.parameters["head.weight"].shape == (2, 2)
    assert report.tables[0].rows[0][1] == "CIFAR-2"
    assert report.claims[0].supported is not None  # the paper's own task


# ------------------------------------------------------------------ claims and checks
def measured(agreement=1.0, kl=0.0, closure=0.0):
    values = {
        "agreement": agreement, "kl": kl, "closure": closure, "samples": 5, "nodes_used": 1.5, "nodes_evaluated": 2.0,
        "max_error": 0.1, "largest_output": 9.0, "missed": 3, "seconds": 2.0,
    }  # fmt: skip
    return xr.Dataset(values)


def found(name="transformer", **rules):
    subject = next(s for s in subjects(Setting()) if s.name == name)
    named = {k.replace("midpoint", "midpoint:"): v for k, v in rules.items()}
    return Found(subject, xr.Dataset({"steps": 2}), named, dict.fromkeys(named, 2**30))


@pytest.mark.parametrize(
    ("agreement", "kl", "supported"),
    [
        (0.748, 0.885, True), (0.71, 0.9, True), (1.0, 1e-5, False), (0.748, 1e-5, False), (1.0, 0.885, False),
        (0.69, 0.885, False),
    ],
)  # fmt: skip
def test_the_claim_of_ten_steps(agreement, kl, supported):
    (claim,) = claims([found(midpoint10=measured(agreement, kl))], Setting())
    assert claim.supported is supported
    assert claim.text == "10 integration steps reproduce 74.8 % of the Transformer's decisions, KL 0.885"
    assert f"{100 * agreement:.3g} %" in claim.value
    (other,) = claims([found(midpoint10=measured(agreement, kl))], Setting(p=7))
    assert other.supported is None
    (digits_,) = claims([found("cnn", midpoint10=measured(agreement, kl))], Setting())
    assert digits_.supported is None
    (cifar,) = claims([found("cnn", midpoint10=measured(agreement, kl))], Setting(data="here"))
    assert cifar.supported is (agreement == 1.0 and kl == 1e-5)


@pytest.mark.parametrize(
    ("agreement", "kl", "supported"),
    [(1.0, 4e-4, [True, True]), (0.99, 6e-4, [False, False]), (1.0, 6e-4, [True, False])],
)
def test_the_claims_of_a_hundred_steps(agreement, kl, supported):
    for name in ("transformer", "cnn"):
        made = claims([found(name, midpoint100=measured(agreement, kl))], Setting())
        assert [claim.supported for claim in made] == supported
    assert not claims([found("resnet9", midpoint100=measured())], Setting())


@pytest.mark.parametrize(("agreement", "kl", "supported"), [(1.0, 1e-6, False), (0.99, 1e-6, None), (1.0, 1e-3, None)])
def test_a_hundred_steps_are_not_needed_where_fewer_nodes_match(agreement, kl, supported):
    (claim,) = claims([found(adaptive=measured(agreement, kl))], Setting())
    assert claim.supported is supported
    assert claim.value == f"1.5 nodes (2 evaluated): {100 * agreement:.3g} %, KL {kl:.2e}".replace("1.00e-03", "0.001")
    assert ("tolerance is too large" in claim.note) is (supported is None)


def test_checks_are_every_decision_and_closure():
    made = checks([found(midpoint100=measured(), adaptive=measured(0.99), midpoint10=measured(0.5, closure=2e-4))])
    assert [holds for holds, _ in made.values()] == [True, False, False]
    assert list(made) == [
        "transformer, 100 midpoints: every decision", "transformer, adaptive: every decision",
        "transformer: every result closes",
    ]  # fmt: skip
    assert all(holds for holds, _ in checks([found(midpoint10=measured(0.5, closure=5e-5))]).values())


def test_only_an_adaptive_row_can_miss_its_tolerance():
    made = table([found(midpoint100=measured(), adaptive=measured())])
    assert column(made, "steps that missed the tolerance") == [None, 3]
