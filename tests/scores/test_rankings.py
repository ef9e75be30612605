"""The training samples and parameters that matter most, and scores of results whose terms have different axes."""

from __future__ import annotations

from functools import lru_cache
from unittest import mock

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.attribution.attribute import closure_error
from explaind_core.errors import QuestionError
from explaind_core.questions.question import Question
from explaind_core.questions.restrictions import Sample
from support.attribution_oracles import modules
from support.axes_oracle import influences
from support.axes_runs import CASES, INPUTS, example

PARTS = {"neuron": {"0.weight": 1}, "column": {"2.weight": (slice(None), 1)}}


@lru_cache
def oracle(optimizer: str, training: str = "plain", nodes: int = 1):
    return influences(example(optimizer, training), INPUTS, nodes)


@lru_cache
def answered(*keep: str, case: tuple[str, str] = ("adamw", "plain")) -> xr.Dataset:
    return explaind.attribute(example(*case), INPUTS, keep=keep, nodes=1, progress=False)


# ------------------------------------------------------------------ top_samples
SCORES = {"absolute": abs, "positive": lambda v: v, "negative": lambda v: -v}


def ranked(values, k, by):
    """Positions: the best first, of equals the first."""
    return sorted(range(len(values)), key=lambda n: (-SCORES[by](values[n]), n))[:k]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), by=st.sampled_from([*SCORES]), axis=st.integers(0, 2))
def test_top_samples_are_those_of_a_sorted_list(data, by, axis):
    """Of small whole numbers, so that there are ties; the train axis in any place."""
    n = data.draw(st.integers(1, 6))
    flat = data.draw(st.lists(st.integers(-2, 2), min_size=6 * n, max_size=6 * n))
    values = np.array(flat, dtype=float).reshape(2, 3, n)
    labels = data.draw(st.permutations(range(10, 10 + n)))
    kernel = xr.DataArray(
        np.moveaxis(values, 2, axis), dims=np.insert(["layer", "test"], axis, "train"),
        coords={"train": labels, "test": [4, 0, 2]},
    )  # fmt: skip
    k = data.draw(st.integers(1, n))
    top = explaind.top_samples(xr.Dataset({"kernel": kernel}), k, by=by)
    assert top.sample.dims == top.influence.dims == ("layer", "test", "rank")
    assert top.test.values.tolist() == [4, 0, 2]
    assert "train" not in top.coords
    assert top.attrs["ranked_by"] == by
    for a, b in np.ndindex(2, 3):
        best = ranked(values[a, b], k, by)
        assert top.sample.values[a, b].tolist() == [labels[p] for p in best]
        assert top.influence.values[a, b].tolist() == values[a, b, best].tolist()


@pytest.mark.parametrize("by", [*SCORES])
def test_top_samples_of_a_run_are_those_of_the_oracle(by):
    expected = oracle("adamw").expected(("step", "train", "test", "output"))["kernel"]
    top = explaind.top_samples(answered("step", "train", "test", "output"), 3, by=by)
    ids = answered("step", "train", "test", "output").train.values
    for s, x, j in np.ndindex(4, 3, 2):
        best = sorted(expected[s, :, x, j], key=SCORES[by], reverse=True)[:3]
        np.testing.assert_allclose(top.influence.values[s, x, j], best, rtol=0, atol=1e-13)
        for k, value in zip(top.sample.values[s, x, j], top.influence.values[s, x, j], strict=True):
            assert expected[s, ids.tolist().index(k), x, j] == pytest.approx(value, abs=1e-13)


def test_groups_are_ranked_by_name_and_parameters_keep_their_tensors():
    result = explaind.attribute(
        example("adamw"), INPUTS, keep=("parameter", "train"), train={"few": [0], "many": [1, 2, 3, 4]}, nodes=1,
        progress=False,
    )  # fmt: skip
    top = explaind.top_samples(result, 1)
    larger = abs(result.kernel).argmax("train")
    assert top.sample.values[:, 0].tolist() == [["few", "many"][n] for n in larger.values]
    assert {*top.sample.values[:, 0]} == {"few", "many"}
    assert top.tensor.values.tolist() == result.tensor.values.tolist()


def test_a_ranking_of_what_is_not_told_apart_is_refused():
    with pytest.raises(QuestionError, match="does not tell training samples apart") as error:
        explaind.top_samples(answered("test", "output"))
    assert error.value.got == ("test", "output")
    for other in (xr.Dataset({"change": ("step", [1.0])}), xr.Dataset()):
        with pytest.raises(QuestionError, match="does not tell training samples apart"):
            explaind.top_samples(other)


@pytest.mark.parametrize("question", [{"k": 0}, {"k": 9}, {"k": -1}, {"k": 2.0}, {"k": 2, "by": "size"}])
def test_a_ranking_that_there_is_not_is_refused(question):
    with pytest.raises(QuestionError, match="there is no such ranking") as error:
        explaind.top_samples(answered("train", "test"), **question)
    assert "1..8" in error.value.expected


def test_the_number_may_be_one_of_numpy():
    assert explaind.top_samples(answered("train"), np.int64(8)).sizes == {"rank": 8}


# ------------------------------------------------------------------ parameter_importance
@settings(deadline=None, max_examples=20)
@given(
    case=st.sampled_from(CASES),
    steps=st.sampled_from([None, [2, 4], {"a": [1], "b": [3, 4]}]),
    train=st.sampled_from([None, None, [0, 3], {"x": [0, 1], "y": [2, 3]}]),
    layers=st.sampled_from([None, ["2"], PARTS]),
    test=st.sampled_from([None, [2, 0]]),
    together=st.sampled_from([1, 2, 3]),
    at_once=st.sampled_from([None, None, 1, 2, 7]),
)
def test_the_importance_of_parameters_is_the_oracles(case, steps, train, layers, test, together, at_once):
    """sum over test, output of |sum over steps and train|, whatever is restricted, in blocks of any size."""
    run, truth = example(*case), oracle(*case)
    question = {"steps": steps, "train": train, "test": test}
    last = truth.mask(*(n for n in truth.where if n.startswith("2.")))
    masks = modules(truth) if layers is None else {"2": last} if layers != PARTS else {
        "neuron": truth.mask("0.weight", entries=1), "column": truth.mask("2.weight", entries=(slice(None), 1)),
    }  # fmt: skip
    keep = ("parameter", "test", "output")
    asked = Question.ask(run, INPUTS, keep=keep, layers=layers, **question)
    enough = 4 * asked.result_bytes(2) * together // asked.function.samples if train is None else "4GiB"
    found = explaind.parameter_importance(
        run, INPUTS, layers=layers, nodes=1, memory=enough, at_once=at_once, progress=False, **question
    )
    # How exact every prediction is does not depend on blocks.
    edges = explaind.attribute(run, INPUTS, layers=layers, nodes=1, keep=("test", "output"), progress=False, **question)
    edges = edges[[name for name in ("initial", "final", "residual", "omitted") if name in edges]]
    xr.testing.assert_allclose(found[[*edges]], edges, rtol=0, atol=1e-11)
    assert found.attrs["closure"] < 1e-11
    expected = truth.expected(keep, layers=masks, **question)
    assert found.parameter.values.tolist() == truth.labels(keep, layers=masks, **question)["parameter"]
    terms = {"kernel", "regularization", "prehistory"} & {*expected}
    assert {*found} == terms | {*edges}
    for name in terms:
        assert found[name].dims == ("parameter",)
        np.testing.assert_allclose(found[name], abs(expected[name]).sum((1, 2)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_test_samples_are_worked_off_in_blocks_within_the_memory(together):
    inputs = torch.cat([INPUTS, 2 * INPUTS])[:5]
    one = 2 * 20 * 2 * 8 + 2 * 8 * 2  # two terms; residual and what is omitted
    blocks = []
    original = Question.ask.__func__

    def ask(cls, *arguments, **question):
        asked = original(cls, *arguments, **question)
        blocks.append(asked.function.samples)
        return asked

    question = {"tolerance": 1e-15, "max_nodes": 2, "progress": False}
    whole = explaind.parameter_importance(example("adamw"), inputs, **question)
    with mock.patch.object(Question, "ask", classmethod(ask)):
        found = explaind.parameter_importance(example("adamw"), inputs, memory=4 * one * together, **question)
    assert blocks == [5, *{1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[together]]
    assert (found.attrs["blocks"], whole.attrs["blocks"]) == (len(blocks) - 1, 1)
    xr.testing.assert_allclose(found, whole, rtol=1e-13)
    each = {"blocks", "closure"}  # the second one is rounding
    assert max(found.attrs["closure"], whole.attrs["closure"]) < 1e-12
    assert {k: v for k, v in found.attrs.items() if k not in each} == {
        k: v for k, v in whole.attrs.items() if k not in each
    }
    with mock.patch.object(Question, "ask", classmethod(ask)):
        blocks.clear()
        xr.testing.assert_allclose(
            explaind.parameter_importance(example("adamw"), inputs, at_once=together, **question), whole, rtol=1e-13
        )
    assert blocks == [5, *{1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[together]]


def test_what_is_told_of_the_importance_of_parameters():
    found = explaind.parameter_importance(
        example("adamw"), INPUTS, nodes="adaptive", tolerance=1e-9, max_nodes=1, test=Sample(2, seed=3), memory=4000,
        progress=False,
    )  # fmt: skip
    assert found.attrs["blocks"] == 2
    assert found.attrs["sampled"] == "test: 2 of 3 drawn with seed 3"
    assert (found.attrs["nodes_used"], found.attrs["steps_not_converged"]) == (4, 4)
    assert found.attrs["strategy"] == "reverse"
    assert found.attrs["score"].startswith("accumulated importance")
    assert "closes" not in found.attrs


def test_the_most_of_any_block_is_told():
    """Nothing depends on the second sample, so that one node a step is enough for it; the first needs more."""

    def output(call, x):
        return call(x) * x[:, :1]

    inputs = torch.cat([INPUTS[:1], torch.zeros(1, 3).double()])
    for order in ([0, 1], [1, 0]):
        found = explaind.parameter_importance(
            example("adamw"), inputs[order], output=output, tolerance=1e-8, memory=4000, progress=False
        )
        assert found.attrs["blocks"] == 2
        assert found.attrs["nodes_used"] > 4


@pytest.mark.parametrize("at_once", [0, -1, 1.5, "all"])
def test_a_block_of_no_samples_is_refused(at_once):
    with pytest.raises(QuestionError, match="no samples make no block"):
        explaind.parameter_importance(example("adamw"), INPUTS, at_once=at_once, progress=False)


def test_what_parameter_importance_refuses():
    with pytest.raises(QuestionError, match="keeps the parameter axis") as error:
        explaind.parameter_importance(example("adamw"), INPUTS, keep=("layer",), progress=False)
    assert (error.value.where, error.value.got) == ("keep", ("layer",))
    with pytest.raises(QuestionError, match="does not fit into the memory budget"):
        explaind.parameter_importance(example("adamw"), INPUTS, nodes=1, memory=600, progress=False)
    with pytest.raises(QuestionError, match="the run has no step 9"):
        explaind.parameter_importance(example("adamw"), INPUTS, steps=[9], progress=False)


# ------------------------------------------------------------------ by_parameter
@pytest.mark.parametrize("layers", [None, ["2"], PARTS])
def test_entries_are_put_back_into_their_tensors(layers):
    run = example("adamw")
    result = explaind.attribute(
        run, INPUTS, keep=("step", "parameter", "output"), layers=layers, nodes=1, progress=False
    )
    found = explaind.by_parameter(result.kernel, run.parameters)
    flat = result.kernel.transpose("step", "output", "parameter")
    where, covered = oracle("adamw").where, result.parameter.values.tolist()
    assert [*found] == [n for n in run.parameters if any(where[n].start <= p < where[n].stop for p in covered)]
    seen = 0
    for name, values in found.items():
        assert values.shape == (4, 2, *run.parameters[name].shape)
        for place in np.ndindex(*run.parameters[name].shape):
            position = where[name].start + np.ravel_multi_index(place, run.parameters[name].shape)
            entry = values[(slice(None), slice(None), *place)]
            if position in covered:
                seen += 1
                np.testing.assert_array_equal(entry, flat.sel(parameter=position))
            else:
                assert np.isnan(entry).all()
    assert seen == len(covered)


def test_what_has_no_or_another_parameter_axis_is_refused():
    run = example("adamw")
    with pytest.raises(QuestionError, match="there is no parameter axis"):
        explaind.by_parameter(answered("train").kernel, run.parameters)
    for position in (-1, 20):
        other = xr.DataArray([1.0, 2.0], dims="parameter", coords={"parameter": [3, position]})
        with pytest.raises(QuestionError, match="one of other parameters") as error:
            explaind.by_parameter(other, run.parameters)
        assert error.value.expected == "positions within 0..19"


# ------------------------------------------------------------------ scores of terms with different axes
FULL = ("step", "gradient_step", "layer", "train", "test", "output")


def test_importance_of_terms_without_a_train_axis():
    """The regularization is one value where the kernel has one per sample, and is not counted once for each."""
    kernel, decay = (answered(*FULL)[name].values for name in ("kernel", "regularization"))
    scores = explaind.importance(answered(*FULL), accumulate=("train", "gradient_step"))
    np.testing.assert_allclose(scores.kernel, abs(kernel.sum((1, 3))).sum((2, 3)), rtol=1e-12)
    np.testing.assert_allclose(scores.regularization, abs(decay).sum((2, 3)), rtol=1e-12)
    assert scores.kernel.dims == scores.regularization.dims == ("step", "layer")
    xr.testing.assert_allclose(scores, explaind.importance(answered("step", "layer", "test", "output")), rtol=1e-12)

    scores = explaind.importance(answered(*FULL), over=("train", "test", "output"), accumulate="layer")
    np.testing.assert_allclose(scores.kernel, abs(kernel.sum(2)).sum((2, 3, 4)), rtol=1e-12)
    np.testing.assert_allclose(scores.regularization, abs(decay.sum(1)).sum((1, 2)), rtol=1e-12)
    assert scores.kernel.dims == ("step", "gradient_step")
    assert scores.regularization.dims == ("step",)

    scores = explaind.importance(answered("parameter", "train", "test"), over="test", accumulate=("train",))
    direct = explaind.importance(answered("parameter", "test"), over=("test",))
    xr.testing.assert_allclose(scores, direct, rtol=1e-11)


@pytest.mark.parametrize("over", [("test", "output"), ("train", "test", "output"), ("train", "gradient_step", "step")])
def test_relative_regularization_counts_the_regularization_once(over):
    """Not once for every training sample and gradient step."""
    accumulate = tuple(axis for axis in ("train", "gradient_step") if axis not in over)
    found = explaind.relative_regularization(answered(*FULL), over=over, accumulate=accumulate)
    gone = {*over, *accumulate}
    kernel, decay = (
        answered(*FULL)[n].sum([d for d in answered(*FULL)[n].dims if d in gone]) for n in ("kernel", "regularization")
    )
    xr.testing.assert_allclose(found, (kernel - decay).rename("relative_regularization"), rtol=1e-12)
    plain = answered("step", "layer", "test", "output")
    rest = explaind.relative_regularization(plain, over=[axis for axis in over if axis in plain.dims])
    xr.testing.assert_allclose(found, rest, rtol=1e-11)
    assert (found.dims, found.dtype) == (rest.dims, "float64")


def test_relative_regularization_in_its_absolute_form_with_a_train_axis():
    kernel, decay = (answered(*FULL)[name].values for name in ("kernel", "regularization"))
    found = explaind.relative_regularization(
        answered(*FULL), form="absolute", over=("train", "test", "output"), accumulate=("gradient_step",)
    )
    expected = abs(kernel.sum(1)).sum((2, 3, 4)) - abs(decay).sum((2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    found = explaind.relative_regularization(answered(*FULL), form="absolute", accumulate=("train", "gradient_step"))
    plain = explaind.relative_regularization(answered("step", "layer", "test", "output"), form="absolute")
    xr.testing.assert_allclose(found, plain, rtol=1e-11)


@pytest.mark.parametrize("form", ["signed", "absolute"])
@pytest.mark.parametrize(("keep", "accumulate"), [
    (("train", "test", "output"), ()), (("gradient_step", "test", "output"), ()), (FULL, ("train",)),
])  # fmt: skip
def test_regularization_relative_to_one_training_sample_is_refused(form, keep, accumulate):
    with pytest.raises(QuestionError, match="regularization has no share of the axis") as error:
        explaind.relative_regularization(answered(*keep), form=form, accumulate=accumulate)
    left = next(axis for axis in ("gradient_step", "train") if axis in keep and axis not in accumulate)
    assert repr(left) in error.value.what
    assert f"accumulate=['{left}']" in error.value.remedy


@pytest.mark.parametrize("score", [explaind.importance, explaind.relative_regularization])
def test_an_axis_is_summed_once(score):
    with pytest.raises(QuestionError, match="an axis is named twice") as error:
        score(answered(*FULL), over=("test", "train"), accumulate=("gradient_step", "train"))
    assert error.value.where == "over, accumulate"


@lru_cache
def checkpoints() -> xr.Dataset:
    run = example("adamw")
    return explaind.attribute_checkpoints([run.theta(s) for s in (0, 2, 4)], run.model, INPUTS, nodes=1, progress=False)


def test_scores_of_checkpoints():
    """One term, the change: its importance is one, and there is no regularization to relate to a kernel."""
    change = checkpoints().change.values
    scores = explaind.importance(checkpoints(), accumulate=("layer",))
    assert [*scores] == ["change"]
    np.testing.assert_allclose(scores.change, abs(change.sum(1)).sum((1, 2)), rtol=1e-12)
    with pytest.raises(QuestionError, match="does not keep the axis 'train'") as error:
        explaind.importance(checkpoints(), over=("train",))
    assert error.value.expected == "axes among ['step', 'layer', 'test', 'output']"
    for form in ("signed", "absolute"):
        with pytest.raises(QuestionError, match="does not tell the kernel apart") as error:
            explaind.relative_regularization(checkpoints(), form=form)
        assert error.value.got == ["change"]
    spread = explaind.spread_residual(checkpoints())
    assert closure_error(spread) < 1e-12
    assert abs(checkpoints().residual).max() > 1e-6
    assert not spread.residual.any()


@pytest.mark.parametrize(
    "keep", [FULL, ("train", "test", "output"), ("gradient_step",), ("step", "parameter", "test"), ("layer", "train")]
)
def test_a_residual_is_spread_over_every_entry_by_its_size(keep):
    """Terms have different axes: every entry of any term is a component."""
    made, spread = answered(*keep), explaind.spread_residual(answered(*keep))
    assert closure_error(spread) < 1e-12
    assert not spread.residual.any()
    dims = made.residual.dims
    for place in np.ndindex(*made.residual.shape):
        at = dict(zip(dims, place, strict=True))
        cells = {name: made[name].isel(at).values for name in ("kernel", "regularization")}
        weight = sum(abs(values).sum() for values in cells.values())
        for name, values in cells.items():
            expected = values + abs(values) / weight * float(made.residual.isel(at))
            np.testing.assert_allclose(spread[name].isel(at).values, expected, rtol=1e-12, atol=1e-16)
    for name in ("kernel", "regularization"):
        assert spread[name].dims == made[name].dims
