"""The grokking study, very small: its report, its parts, and what it reads from curves and matrices."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import explaind_core as explaind
from explaind_core.errors import QuestionError, StoreError
from explaind_studies.grokking import GrokkingSetting, influences, interactive, kernels, lasso, pipelines, swapping
from explaind_studies.grokking.setting import EXPERIMENTS
from explaind_studies.grokking.stages import CHECKPOINTS, PAPER_STAGES, Stages, find_stages
from explaind_studies.grokking.subject import OUTER, names_of, trained
from explaind_studies.modular_addition import LAYERS, ModularTransformer
from explaind_studies.workbook import Workbook
from support.study_runs import run_quietly

TINY = GrokkingSetting(
    p=7, train=20, test=8, seed=0, most_steps=14, explained=8, train_explained=5, samples_at_once=4, tolerance=10.0,
    window=3, kernel_nodes=1, restarts=2, restart_steps=6, test_every=3, memory="1GiB",
)  # fmt: skip


def run(folder, setting=TINY, **options):
    return run_quietly("grokking", folder, setting, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grokking")
    return folder / "study", run(folder / "study", kept=folder / "kept"), folder / "kept"


@pytest.fixture(scope="module")
def subject(finished):
    return trained(Workbook(finished[0], "grokking", TINY, console=Console(file=StringIO()), progress=False), TINY)


# ---------------------------------------------------------------------- the report
def test_every_experiment_has_claims_tables_and_pictures(finished):
    folder, report, kept = finished
    assert report.holds
    assert {table.name for table in report.tables} >= {
        "stages", "layers", "pipelines", "longer", "cyclic", "swapping", "lasso", "lasso_decoder", "lasso_layers",
    }  # fmt: skip
    figures = {picture.file for picture in report.pictures}
    assert figures >= {
        f"figures/figure_{n}.png"
        for n in ("3a", "3b", "3b_longer", "4", "4_mod", "5", "6_test", "6_train", "7", "8", "9")
    }
    for name in figures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
        assert (kept / name).exists()
    assert len(report.claims) >= 20
    assert all(claim.measure and claim.value is not None for claim in report.claims)
    facts = json.loads((kept / "report.json").read_text())
    assert facts["settings"]["seed"] == 0
    assert set(facts["versions"]) >= {"torch", "python"}
    assert facts["hardware"]["cores"] >= 1
    assert {"training", "swapping", "lasso", *(f"kernel_{s}" for s in PAPER_STAGES)} <= set(facts["parts"])
    page = (kept / "README.md").read_text()
    assert "NOT supported" in page
    assert "figures/figure_7.png" in page


def test_pages_hold_every_matrix_and_need_no_network(finished):
    folder, *_ = finished
    for name in ("figure_3a.html", "kernels.html"):
        text = (folder / "figures" / name).read_text()
        assert "Plotly.newPlot" in text
        assert 'src="http' not in text
    assert text.count("predictions; decoder; before") >= 2 * 2 * len(PAPER_STAGES)


def test_a_finished_study_computes_nothing_again(finished, monkeypatch):
    folder, report, _ = finished
    monkeypatch.setattr(explaind, "attribute", None)
    monkeypatch.setattr(explaind, "kernel_slices", None)
    again = run(folder)
    assert again.claims == report.claims
    assert again.parts == report.parts


def test_some_experiments_of_the_same_study_can_be_asked_for(finished):
    folder, *_ = finished
    some = run(folder, replace(TINY, experiments=("swapping",)))
    assert {table.name for table in some.tables} == {"stages", "swapping"}
    assert set(some.parts) == {"training", "swapping"}
    with pytest.raises(QuestionError, match="no experiment 'cooking'"):
        run(folder, replace(TINY, experiments=("cooking",)))
    with pytest.raises(StoreError, match="other settings"):
        run(folder, replace(TINY, seed=1))


def test_importances_are_those_of_one_pass(finished, subject):
    folder, _report, _ = finished
    result = explaind.attribute(
        subject.run, subject.explained, layers=LAYERS, nodes="adaptive", tolerance=TINY.tolerance, progress=False
    )
    whole = explaind.importance(result).kernel
    book = Workbook(folder, "grokking", TINY, console=Console(file=StringIO()), progress=False)
    pieces = influences.influences(book, subject)
    np.testing.assert_allclose(pieces.layer_kernel.values, whole.values, rtol=1e-4)
    assert pieces.attrs["samples"] == 8


def test_kernel_slices_are_attributions(finished, subject):
    folder, *_ = finished
    book = Workbook(folder, "grokking", TINY, console=Console(file=StringIO()), progress=False)
    slices = kernels.kernel_slices(book, subject)
    inputs = torch.cat([subject.explained, subject.task.train_inputs[:5]])
    for stage, part in slices.stages.items():
        asked = explaind.attribute(
            subject.run, inputs, keep=("layer", "train", "test"), steps=list(slices.steps[stage]), layers=LAYERS,
            train=range(20), nodes=1, progress=False,
        )  # fmt: skip
        scale = float(abs(asked.kernel).max())
        got = part.kernel.transpose("layer", "train", "test").values
        np.testing.assert_allclose(got, asked.kernel.transpose("layer", "train", "test").values, atol=1e-4 * scale)


# ---------------------------------------------------------------------- stages
@given(memorised=st.integers(50, 2000), after=st.integers(1, 2000), step=st.integers(1, 1939))
def test_stages_keep_the_papers_order(memorised, after, step):
    stages = Stages(memorised, memorised + after, memorised + after, 0.99, 0.999, True)
    assert stages.at(800) == memorised
    assert stages.at(1939) == memorised + after
    assert 1 <= stages.at(step) <= stages.at(step + 1) <= stages.last
    if step > 800:
        assert stages.at(step) == round(memorised + (step - 800) * (after / 1139))
    window = stages.window(step, 50)
    assert len(window) == 50
    assert window.stop - 1 == max(stages.at(step), 50)


def test_a_run_that_does_not_grok_says_so():
    steps = np.arange(1, 101)
    accuracy = np.minimum(0.9, steps / 50)
    metrics = xr.Dataset(
        {"train_accuracy": ("step", accuracy), "test_accuracy": ("step", accuracy / 3)}, coords={"step": steps}
    )
    found = find_stages(metrics)
    assert not found.grokked
    assert found.train_level == pytest.approx(0.99 * 0.9)
    assert found.memorised == 45


# ---------------------------------------------------------------------- parts and swaps
@pytest.mark.parametrize(("group", "layers"), OUTER.items())
def test_groups_of_layers_are_whole(group, layers):
    model = ModularTransformer(9)
    names = names_of(layers, model)
    wanted = {
        "embedding": 1,
        "attention encoder": 4,
        "attention decoder": 4,
        "linear 1": 2,
        "linear 2": 2,
        "decoder": 1,
    }
    assert len(names) == sum(wanted[layer] for layer in layers)
    assert set(names) <= {name for name, _ in model.named_parameters()}


def test_what_is_taken_over_is_the_checkpoints_and_the_rest_is_drawn_anew(finished, subject, monkeypatch):
    book = Workbook(finished[0], "grokking", TINY, console=Console(file=StringIO()), progress=False)
    started = []
    optimizer = torch.optim.AdamW

    def watched(parameters, **options):
        parameters = list(parameters)
        started.append([p.detach().clone() for p in parameters])
        return optimizer(parameters, **options)

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    found = pipelines.train_from_parts(book, subject, OUTER["Att."], 9)
    names = [name for name, _ in subject.model().named_parameters()]
    theta = subject.run.theta(9)
    taken = names_of(OUTER["Att."], subject.model())
    for name, one, other in zip(names, *started, strict=True):
        assert torch.equal(one, other) == (name in taken), name
        assert torch.equal(one, theta[name]) == (name in taken), name
    assert found.test_accuracy.shape == (2, 3)
    assert found.tested.values.tolist() == [0, 3, 6]


def test_a_longer_training_begins_as_the_short_one(finished, subject):
    book = Workbook(finished[0], "grokking", TINY, console=Console(file=StringIO()), progress=False)
    short, long = pipelines.pipelines(book, subject), pipelines.longer(book, subject)
    assert long.start.values.tolist() == ["random", "Att. 1939", "Att.+Lin1 1539", "Att.+Lin1 1939"]
    assert long.sizes["step"] == 5 * short.sizes["step"] == 30
    for start in long.start.values:
        one, other = short.sel(start=start), long.sel(start=start)
        assert one.taken_at == other.taken_at
        assert one.train_accuracy.equals(other.train_accuracy.sel(step=one.step))
        assert one.test_accuracy.equals(other.test_accuracy.sel(tested=one.tested))


def restarted(**curves):
    """Trainings of 2 seeds over 4 steps, tested at each: (training, test) accuracies by start, a point apart."""
    train, test = (np.array([curves[start][i] for start in curves], dtype=float) for i in (0, 1))
    spread = 0.01 * np.arange(len(curves))[:, None]  # by start, so that differences have a standard error
    return xr.Dataset(
        {
            "train_accuracy": (("start", "seed", "step"), np.stack([train, train], 1)),
            "test_accuracy": (("start", "seed", "tested"), np.stack([test - spread, test + spread], 1)),
        },
        coords={
            "start": ["random", "Att. 1939", "Att.+Lin1 1539", "Att.+Lin1 1939"], "step": range(4), "tested": range(5)
        },
    )  # fmt: skip


def verdicts(**curves):
    return [claim.supported for claim in pipelines.longer_claims(restarted(**curves))]


MEMORISES = ([0, 0.5, 1, 1], [0, 0, 0, 0, 0.6])
GENERALISES = ([0, 0.5, 1, 1], [0, 0.4, 0.9, 1, 1])


def test_longer_trainings_are_judged_against_those_from_nothing():
    slightly = ([0, 0.5, 1, 1], [0, 0.4, 0.9, 0.95, 0.95])
    assert verdicts(a=MEMORISES, b=GENERALISES, c=slightly, d=GENERALISES) == [True, True, True, True]
    assert verdicts(a=GENERALISES, b=MEMORISES, c=MEMORISES, d=MEMORISES) == [False, False, True, False]
    nothing = ([0, 0, 0, 0.1], [0, 0, 0, 0, 0])
    assert verdicts(a=nothing, b=nothing, c=nothing, d=nothing) == [None, None, False, False]
    little = ([0, 0, 0, 0.1], [0, 0, 0, 0, 0.05])
    assert verdicts(a=nothing, b=little, c=nothing, d=little) == [None, None, False, False]
    assert verdicts(a=nothing, b=nothing, c=GENERALISES, d=GENERALISES) == [True, False, False, False]
    # Seed by seed 3 points apart, so that the standard error is 3 points.
    above = ([0, 0.5, 1, 1], [0, 0.4, 0.9, 1, 0.67])
    assert verdicts(a=MEMORISES, b=nothing, c=nothing, d=above)[0] is True
    assert verdicts(a=above, b=nothing, c=nothing, d=MEMORISES)[0] is False
    assert verdicts(a=MEMORISES, b=nothing, c=nothing, d=([0, 0.5, 1, 1], [0, 0.4, 0.9, 1, 0.65]))[0] is None
    claims = pipelines.longer_claims(restarted(a=nothing, b=nothing, c=GENERALISES, d=MEMORISES))
    assert claims[0].value == (
        "60.0% - 0.0% = 60.0 points, standard error 3.0; 50 % first: step 4, from nothing not reached"
    )
    assert claims[1].value == "100.0 points against 10.0; training accuracy 100.0%"


@pytest.mark.parametrize("layers", [(), ("decoder",), ("embedding", "linear 2", "decoder"), tuple(LAYERS)])
def test_swapped_are_the_named_layers_alone(subject, layers):
    torch.manual_seed(3)
    theta = subject.run.theta(2)
    final = {name: torch.randn_like(value) for name, value in theta.items()}
    expected, swapped = subject.model(), names_of(layers, subject.model()) if layers else []
    expected.load_state_dict({n: final[n] if n in swapped else theta[n] for n in theta})
    with torch.no_grad():
        decided = expected(subject.task.test_inputs).argmax(-1)
    assert torch.equal(swapping._predicted(subject, subject.model(), 2, final, layers), decided)


def test_confusion_counts_every_sample_once(subject):
    right = subject.task.test_targets
    predicted = right.clone()
    predicted[0] = (predicted[0] + 1) % 7
    counts = swapping._confusion(subject, predicted)
    assert counts.sum() == 8
    assert np.trace(counts) == 7
    assert counts[int(right[0]), int(predicted[0])] == 1
    assert swapping.error_profile(counts, 7) == (1, 1)


# ---------------------------------------------------------------------- what is read from matrices
@given(
    p=st.sampled_from([5, 7, 11]), k=st.integers(1, 2), bands=st.floats(0, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_cyclic_pattern_is_found_under_bands(p, k, bands, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(np.repeat(np.arange(p), 4)), rng.permutation(np.repeat(np.arange(p), 3))
    wave = np.cos(2 * np.pi * k * (rows[:, None] - columns) / p)
    found = kernels.cyclic(wave + bands * rng.standard_normal((len(rows), 1)), rows, columns, p)
    assert found["frequency"] == k
    assert found["cyclic"] == pytest.approx(1.0)
    assert found["period"] == p / k
    noise = kernels.cyclic(rng.standard_normal((len(rows), len(columns))), rows, columns, p)
    assert noise["cyclic"] < 0.3


@pytest.mark.parametrize("alpha", [1e-3, 1e-2])
def test_the_lasso_is_that_of_all_pairs(alpha):
    from sklearn.linear_model import Lasso

    rng = np.random.default_rng(3)
    values, p = rng.integers(0, 40, 24), 13
    difference = values[:, None] - values
    similarity = 0.3 * np.cos(2 * np.pi * difference / 13) + 0.1 * np.cos(2 * np.pi * difference / 6)
    similarity += 0.05 * rng.standard_normal(similarity.shape) + 0.2
    found = lasso.fit(similarity, values, p, alpha)
    pairs = ~np.eye(24, dtype=bool)
    angle = 2 * np.pi * difference[pairs][:, None] / np.arange(2, p + 1)
    plain = Lasso(alpha=alpha, max_iter=100_000, tol=1e-10).fit(
        np.hstack([np.cos(angle), np.sin(angle)]), similarity[pairs]
    )
    np.testing.assert_allclose(np.hstack([found.cosine, found.sine]), plain.coef_, atol=1e-5)
    assert found.attrs["intercept"] == pytest.approx(plain.intercept_, abs=1e-5)
    assert int(found.frequency[int(found.cosine.values.argmax())]) == 13


def test_matrices_are_ordered_by_sums_or_residues(finished, subject):
    from explaind_studies.grokking.figures import layer_matrices

    folder, *_ = finished
    book = Workbook(folder, "grokking", TINY, console=Console(file=StringIO()), progress=False)
    slices = kernels.kernel_slices(book, subject)
    train, test = kernels.sums(subject.task.train_inputs), kernels.sums(subject.explained)
    marked = slices.stages[250].copy(deep=True)
    marked.kernel.loc[{"layer": "decoder"}] = xr.DataArray(
        np.vstack([100.0 * t + np.append(test, np.zeros(5)) for t in train]), dims=("train", "test")
    ).transpose(*marked.kernel.sel(layer="decoder").dims)
    other = kernels.Slices({**slices.stages, 250: marked}, slices.steps)
    by_sum = layer_matrices(other, subject, "test", "decoder", 250, modular=False)
    assert (np.diff(by_sum, axis=0) >= 0).all()
    assert (np.diff(by_sum, axis=1) >= 0).all()
    by_residue = layer_matrices(other, subject, "test", "decoder", 250, modular=True)
    residues = np.round(by_residue[:, 0] / 100).astype(int) % 7
    assert (np.diff(residues) >= 0).all()


def test_bins_keep_the_mean():
    values = np.random.default_rng(0).standard_normal((40, 30))
    assert interactive.binned(values, 10).shape == (10, 10)
    assert interactive.binned(values, 10).mean() == pytest.approx(values.mean())


def test_experiments_are_those_of_the_paper():
    assert "Figure 7" in EXPERIMENTS["swapping"]
    assert CHECKPOINTS[-1] == 1939
