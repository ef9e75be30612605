"""What real loops do to gradients, against explicit sums: coupled samples, dropout, clipping, penalties, autocast."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core.errors import QuestionError, RecordingError
from support.loop_features import (
    BATCHES,
    DATA,
    FEATURES,
    INPUTS,
    KEPT,
    NODES,
    SAMPLES,
    TARGETS,
    check,
    expected,
    network,
    train,
    values,
)


def combined(*names: str) -> frozenset[str]:
    return frozenset(names)


@pytest.mark.parametrize("strategy", ["features", "adjoint"])
@pytest.mark.parametrize(
    "features",
    [
        combined(), *(combined(name) for name in FEATURES), combined("norm", "dropout", "clip", "penalty"),
        combined("dropout", "clip", "clip value"), combined("norm", "penalty", "noise"),
    ],
    ids=lambda f: " + ".join(sorted(f)) or "plain",
)  # fmt: skip
def test_every_influence_is_the_explicit_sum(features, strategy):
    kept = train(features, BATCHES)
    check(kept, features, KEPT, strategy)


def test_a_walk_backwards_begins_again_in_the_middle_of_a_run():
    """Seven steps are kept in four segments: every filter state must be put back at their borders."""
    features = combined("penalty", "norm")
    check(train(features, [*BATCHES, *BATCHES[:3]]), features, KEPT, "adjoint")


@settings(max_examples=12, deadline=None)
@given(
    st.sets(st.sampled_from(FEATURES[:5])).filter(lambda f: not {"clip value", "penalty"} <= f),
    st.lists(
        st.lists(st.lists(st.integers(0, SAMPLES - 1), min_size=2, max_size=4), min_size=1, max_size=2),
        min_size=1, max_size=4,
    ),
    st.floats(0, 0.9), st.floats(0, 0.3), st.sets(st.sampled_from(KEPT)),
    st.sampled_from(["features", "adjoint", None]), st.sampled_from(["recorded", "final"]),
)  # fmt: skip
def test_any_combination_of_features_axes_and_batches(features, batches, mu, decay, keep, strategy, buffers):
    kept = train(frozenset(features), batches, mu=mu, decay=decay)
    keep = tuple(axis for axis in KEPT if axis in keep or axis == "train")
    check(kept, frozenset(features), keep, strategy, buffers=buffers)


def test_samples_summed_need_no_shares_and_tell_the_penalty_apart():
    features = combined("norm", "dropout", "clip", "penalty")
    kept = train(features, BATCHES)
    for keep in itertools.chain([("step", "layer", "test", "output")], [("layer",), ("step", "test")]):
        truth = expected(kept, features)
        result = explaind.attribute(kept.run, INPUTS, keep=keep, nodes=NODES, progress=False)
        for name in ("regularization", "penalty", "statistics"):
            axes = ("step", "test", "output") if name == "statistics" else ("step", "layer", "test", "output")
            gone = tuple(i for i, axis in enumerate(axes) if axis not in keep)
            np.testing.assert_allclose(result[name].values, truth[name].sum(gone), rtol=0, atol=1e-11, err_msg=name)
        assert explaind.closure_error(result) < 1e-12


def test_running_statistics_are_a_contribution_of_their_own():
    features = combined("norm")
    kept = train(features, BATCHES)
    result = explaind.attribute(kept.run, INPUTS, keep=("step", "test", "output"), nodes=NODES, progress=False)
    model = network(features)
    np.testing.assert_allclose(result.initial, values(model, kept.theta[0], kept.buffers[0]), rtol=0, atol=1e-14)
    np.testing.assert_allclose(result.final, values(model, kept.theta[-1], kept.buffers[-1]), rtol=0, atol=1e-14)
    assert float(abs(result.statistics).max()) > 0.01
    held = explaind.attribute(kept.run, INPUTS, nodes=NODES, buffers="final", progress=False)
    np.testing.assert_allclose(held.initial, values(model, kept.theta[0], kept.buffers[-1]), rtol=0, atol=1e-14)
    assert "statistics" not in held


def test_windows_chords_and_restrictions_close_with_moving_buffers():
    kept = train(combined("norm", "dropout"), BATCHES)
    for ask in (
        {"steps": {"a": [1], "b": [3, 4]}, "keep": ("step", "test")},
        {"steps": [2, 4], "keep": ("train", "test")},
        {"chords": 2, "keep": ("step", "layer")},
        {"chords": 3, "keep": ("step", "train"), "layers": ["4"]},
        {"train": [0, 4], "keep": ("step", "test", "output")},
    ):
        for buffers in ("recorded", "final"):
            result = explaind.attribute(kept.run, INPUTS, nodes=NODES, progress=False, buffers=buffers, **ask)
            assert explaind.closure_error(result) < 1e-12, ask
            assert float(abs(result.residual).max()) < 1e-3, ask


def test_what_no_sample_explains_is_refused_or_carried_with_its_size():
    kept = train(combined("noise"), BATCHES)
    with pytest.raises(RecordingError, match="not that of its declared samples") as error:
        explaind.attribute(kept.run, INPUTS, keep=("train",), nodes=1, progress=False)
    assert 'unattributed="carry"' in error.value.remedy
    results = [
        explaind.attribute(
            kept.run, INPUTS, keep=keep, nodes=NODES, strategy=strategy, unattributed="carry", progress=False
        )
        for keep in (("layer", "train", "test"), ("parameter", "train", "test"))
        for strategy in ("features", "adjoint")
    ]
    summed = explaind.attribute(kept.run, INPUTS, keep=("test",), nodes=NODES, progress=False)
    for result in results:
        assert explaind.closure_error(result) < 1e-12
        assert 0.01 < result.attrs["unattributed_gradient"] < 1
        whole = result.kernel.sum([d for d in result.kernel.dims if d != "test"])
        whole = whole + result.unattributed.sum([d for d in result.unattributed.dims if d != "test"])
        np.testing.assert_allclose(whole, summed.kernel, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            result.kernel.sum(result.kernel.dims[0]), results[0].kernel.sum("layer"), rtol=0, atol=1e-12
        )


def test_a_question_about_gradients_that_cannot_be_asked_is_refused():
    kept = train(combined(), BATCHES[:1])
    for name, value in (("unattributed", "ignore"), ("buffers", "first")):
        with pytest.raises(QuestionError, match=r"there (is|are) no such") as error:
            explaind.attribute(kept.run, INPUTS, progress=False, **{name: value})
        assert error.value.where == name
    kept = train(combined("penalty"), BATCHES[:2])
    without = explaind.open_run(kept.run.path, model=kept.run.model)
    with pytest.raises(QuestionError, match="opened without it"):
        explaind.attribute(without, INPUTS, progress=False)
    rows = explaind.open_run(kept.run.path, model=kept.run.model, penalty=lambda p: p["0.weight"].sum(0))
    with pytest.raises(QuestionError, match="penalty is not one number"):
        explaind.attribute(rows, INPUTS, progress=False)
    kept = train(combined("penalty", "clip value"), BATCHES[:2])
    with pytest.raises(RecordingError, match="clipped entry by entry"):
        explaind.attribute(kept.run, INPUTS, progress=False)


@pytest.mark.parametrize("mode", ["parameters", "snapshots"])
def test_all_features_are_computed_again_bit_by_bit_where_they_are_not_stored(mode):
    features = combined("norm", "dropout", "clip", "penalty")
    whole, less = train(features, BATCHES), train(features, BATCHES, mode=mode, snapshot_every=3)
    for s in whole.run.steps:
        for what in ("theta", "gradients", "buffers"):
            one, other = getattr(whole.run, what)(s), getattr(less.run, what)(s)
            assert all(torch.equal(one[n], other[n]) for n in {*one, *other})
    results = [explaind.attribute(kept.run, INPUTS, keep=KEPT, nodes=NODES, progress=False) for kept in (whole, less)]
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name])
    with pytest.raises(QuestionError, match="takes the penalty"):
        explaind.open_run(less.run.path, model=less.run.model).gradients(2)


def test_a_wrong_penalty_is_found_where_samples_are_told_apart():
    kept = train(combined("penalty"), BATCHES[:2])
    wrong = explaind.open_run(kept.run.path, model=kept.run.model, penalty=lambda p: 0.2 * p["0.weight"].pow(2).sum())
    with pytest.raises(RecordingError, match="not that of its declared samples"):
        explaind.attribute(wrong, INPUTS, keep=("train",), progress=False)


# ---------------------------------------------------------------------- autocast
def under_autocast(tmp_path: Path, *, inside: bool = True, norm: bool = False) -> explaind.Run:
    features = combined("norm", "dropout") if norm else combined()
    model = network(features).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.7)
    loss = nn.CrossEntropyLoss()
    torch.manual_seed(3)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        for step in BATCHES:
            optimizer.zero_grad()
            for k in step:
                batch, weight = torch.tensor(k), 1 / len(step)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    outputs = model(DATA[batch].float())
                    value = loss(outputs, TARGETS[batch]) if inside else None
                value = loss(outputs, TARGETS[batch]) if value is None else value
                (weight * value).backward()
                recorder.batch(DATA[batch].float(), TARGETS[batch], ids=batch, weight=weight)
            optimizer.step()
    return explaind.open_run(tmp_path / "run", model=model)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_met_to_the_last_bit_and_its_rounding_is_a_term(tmp_path, inside, norm):
    run = under_autocast(tmp_path, inside=inside, norm=norm)
    assert run.coarse
    results = [
        explaind.attribute(run, INPUTS.float(), keep=("layer", "train", "test"), nodes=4, strategy=s, progress=False)
        for s in ("adjoint", "features")
    ]
    for result in results:
        assert explaind.closure_error(result) < 1e-12
        assert result.attrs["gradient_factor"] == [1.0, 1.0]
        assert result.attrs["unattributed_gradient"] == 0  # the whole batch's gradient is the one that was fed
        # A sample's own gradient is rounded to 8 bits; of a loss in that precision, its cotangents are, too.
        bound = 0.02 if inside else 0.2
        assert 0 < float(abs(result.unattributed).max()) < bound * float(abs(result.kernel).max())
    np.testing.assert_allclose(results[0].kernel, results[1].kernel, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- chance that nobody recorded
class Chance(nn.Module):
    """Draws from numpy in training, whose state is nobody's business here."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (float(np.random.default_rng().normal()) if self.training else 0.0)


def test_random_numbers_that_were_not_recorded_are_an_error(tmp_path):
    model, loss = Chance(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    targets = torch.zeros(SAMPLES, 2, dtype=torch.float64)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:
        loss(model(DATA), targets).backward()
        recorder.batch(DATA, targets, ids=range(SAMPLES))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    with pytest.raises(RecordingError, match="depend on chance") as error:
        explaind.attribute(run, INPUTS, keep=("train",), nodes=1, progress=False)
    assert "torch's own generators" in error.value.remedy
