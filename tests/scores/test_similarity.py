"""similarity() against cosines of the oracle's explicit influence tensors, flattened; its memory; what it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.restrictions import Sample
from support.axes_oracle import influences
from support.axes_runs import BATCHES, DATA, INPUTS, OPTIMIZERS, TARGETS, example, network, record_batches
from support.similarity_oracle import (
    GRAM,
    LAYERS,
    MODULE,
    OUTPUTS,
    SUBSETS,
    TRAINED,
    ask,
    assert_same,
    cosines,
    oracle,
    questions,
)


# ------------------------------------------------------------------ the oracle
@settings(deadline=None, max_examples=25)
@given(
    case=st.sampled_from(TRAINED),
    question=questions,
    nodes=st.sampled_from([2, "left", "midpoint:3"]),
    output=st.sampled_from([*OUTPUTS]),
)
def test_any_similarity_is_the_cosine_of_the_flattened_tensors(case, question, nodes, output):
    found = ask(case, nodes=nodes, output=output, **question)
    assert_same(found, cosines(oracle(*case, nodes, output), **question))


@pytest.mark.parametrize("case", TRAINED)
def test_the_papers_similarity_of_every_optimizer(case):
    """Definition 4.4 as it stands, and by layer; momentum, matrices, secants, flat rules, repeated samples."""
    truth = oracle(*case)
    assert_same(ask(case), cosines(truth, GRAM))
    assert_same(ask(case, per="layer"), cosines(truth, GRAM, ("layer",)))


@pytest.mark.parametrize("over", SUBSETS)
def test_every_set_of_axes(over):
    assert_same(ask(("adamw", "micro"), over=over), cosines(oracle("adamw", "micro"), over))


@pytest.mark.parametrize(
    "over", [("step",), ("step", "train"), GRAM, ("parameter", "train"), ("gradient_step", "step")]
)
def test_windows_have_a_matrix_each_of_their_steps_flattened_or_summed(over):
    windows = {"first": [1, 3], "last": [4]}
    found = ask(("nesterov", "plain"), over=over, per="step", steps=windows)
    assert_same(found, cosines(oracle("nesterov"), over, ("step",), steps=windows))
    assert found.step.values.tolist() == ["first", "last"]
    # Without a matrix each, they say which steps there are: an entry of the tensors each, or summed.
    assert_same(ask(("nesterov", "plain"), over=over, steps=windows), cosines(oracle("nesterov"), over, steps=windows))


@pytest.mark.parametrize("per", [("step", "layer"), ("layer", "step")])
@pytest.mark.parametrize("over", [GRAM, ("train", "output")])
def test_matrices_come_in_the_order_that_they_are_asked_for(per, over):
    windows = {"a": [1], "b": [2, 3], "c": [4]}
    found = ask(("adamw", "plain"), per=per, over=over, steps=windows)
    assert found.dims == (*per, "test", "other")
    assert_same(found, cosines(oracle("adamw"), over, per, steps=windows))


def test_training_samples_left_out_do_not_count_whether_flattened_or_summed():
    """Summed: the recorded update would be that of all of them."""
    for over in (GRAM, ("step", "parameter", "output"), ("step", "parameter")):
        assert_same(ask(("adamw", "plain"), over=over, train=[0, 2]), cosines(oracle("adamw"), over, train=[0, 2]))
        everyone = cosines(oracle("adamw"), over)
        assert abs(ask(("adamw", "plain"), over=over, train=[0, 2]) - everyone).max() > 1e-3


def test_labels_and_what_is_told():
    found = ask(("adamw", "plain"), per=("step", "layer"), steps={"a": [1, 2], "b": 4}, test=[2, 0], over=GRAM)
    assert found.dims == ("step", "layer", "test", "other")
    assert found.step.values.tolist() == ["a", "b"]
    assert found.layer.values.tolist() == ["0", "2"]
    assert found.test.values.tolist() == found.other.values.tolist() == [2, 0]
    assert (found.name, found.dtype) == ("similarity", "float64")
    assert found.attrs["over"] == list(GRAM)
    assert found.attrs["summed_first"] == ["gradient_step"]
    assert (found.attrs["nodes_used"], found.attrs["steps_not_converged"]) == (3 * 2, 0)
    assert "sampled" not in found.attrs
    drawn = ask(("adamw", "plain"), train=Sample(3, seed=2), nodes=1)
    assert drawn.attrs["sampled"].endswith("drawn with seed 2")


def test_an_axis_needs_no_tuple():
    found = ask(("descent", "plain"), over="train", per="step")
    assert_same(found, cosines(oracle("descent"), ("train",), ("step",)))


def test_samples_that_nothing_influenced_are_like_nothing():
    """Their gradient is zero; no warning (which would be an error here)."""
    inputs = torch.cat([INPUTS, torch.zeros(1, 3).double()])
    for over in (GRAM, ("step", "parameter"), ("train",)):
        found = explaind.similarity(
            example("adamw"), inputs, over=over, output=lambda call, x: call(x) * x[:, :1], nodes=1, progress=False
        )
        assert np.isnan(found.values[3]).all()
        assert np.isnan(found.values[:, 3]).all()
        np.testing.assert_allclose(found.values[:3, :3].diagonal(), 1, rtol=1e-12)


# ------------------------------------------------------------------ nodes
@pytest.mark.parametrize("over", [GRAM, ("step", "parameter", "train")])
@pytest.mark.parametrize("layers", ["modules", "prefix"])
def test_adaptive_nodes_are_those_of_attribute(over, layers, monkeypatch):
    """Along the whole step, whatever layers are asked for; outputs summed first or not."""
    orders = []
    original = MODULE.order_of

    def spy(*arguments):
        orders.append(original(*arguments)[0])
        return original(*arguments)

    monkeypatch.setattr(MODULE, "order_of", spy)
    found = ask(("rmsprop", "plain"), over=over, layers=layers, nodes="adaptive", tolerance=1e-6)
    keep = ("step", "parameter", "test", *(a for a in over if a == "output"))
    taken = explaind.attribute(
        example("rmsprop"), INPUTS, keep=keep, layers=LAYERS[layers][0], nodes="adaptive", tolerance=1e-6,
        strategy="reverse", progress=False,
    )  # fmt: skip
    assert orders == taken.nodes.values.tolist()
    assert max(orders) > 2
    assert found.attrs["nodes_used"] == sum(orders)
    assert_same(found, cosines(influences(example("rmsprop"), INPUTS, orders), over, layers=layers))


@pytest.mark.parametrize("over", [GRAM, ("train",), ("step", "train")])
def test_steps_that_miss_the_tolerance_are_told(over):
    missed = ask(("adamw", "plain"), over=over, nodes="adaptive", tolerance=1e-9, max_nodes=1)
    assert (missed.attrs["nodes_used"], missed.attrs["steps_not_converged"]) == (4, 4)
    assert ask(("adamw", "plain"), over=over, nodes="adaptive").attrs["steps_not_converged"] == 0


# ------------------------------------------------------------------ progress
@pytest.mark.parametrize("question", [{}, {"memory": 5000}, {"over": ("step", "parameter")}, {"steps": [2, 4]}])
def test_the_bar_ends_where_it_should(question, monkeypatch):
    totals, done = [], []

    @contextmanager
    def counted(total, description, *, enabled):
        assert enabled
        totals.append(total)
        yield done.append

    monkeypatch.setattr(MODULE, "counted", counted)
    explaind.similarity(example("nesterov"), INPUTS, nodes=1, **question)
    assert totals == [sum(done)]


# ------------------------------------------------------------------ precision
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
@pytest.mark.parametrize("over", [GRAM, ("step", "parameter"), ("step", "train", "output"), ("train",)])
def test_a_run_in_float32_is_right_to_its_own_precision(optimizer, over):
    run = single(optimizer)
    found = ask(run, over=over, inputs=INPUTS.float())
    assert_same(found, cosines(influences(run, INPUTS.float(), 2), over), 5e-6)
    assert found.dtype == "float64"


@lru_cache
def single(optimizer):
    return record_batches(network(dtype=torch.float32), OPTIMIZERS[optimizer], DATA.float(), TARGETS, BATCHES)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("over", [GRAM, ("step", "parameter")])
def test_squares_of_small_and_large_numbers_are_no_matter(over, factor):
    """A saturated output: phi is 1e-25, and its square no number in single precision."""
    scaled = explaind.similarity(
        single("adamw"), INPUTS.float(), over=over, output=lambda call, x: factor * call(x), nodes=1, progress=False
    )
    plain = ask(single("adamw"), over=over, inputs=INPUTS.float(), nodes=1)
    np.testing.assert_allclose(scaled, plain, rtol=0, atol=2e-6)


# ------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "question",
    [
        {"over": ()}, {"over": ("test",)}, {"over": ("step", "parameters")}, {"over": ("step", "step")},
        {"per": ("train",)}, {"per": ("test",)}, {"per": ("layer", "layer")}, {"per": "layers"},
    ],
)  # fmt: skip
def test_axes_that_make_no_sense_are_refused(question):
    with pytest.raises(QuestionError, match="similarity cannot be taken like that") as error:
        ask(("descent", "plain"), **question)
    assert error.value.where == "over, per"
    assert "'train'" in error.value.expected
    assert "'test'" not in error.value.expected


@pytest.mark.parametrize(
    ("question", "wording"),
    [
        ({"train": [99]}, "no sample that was trained on"),
        ({"steps": [7]}, "the run has no step 7"),
        ({"nodes": 0}, "number of nodes"),
        ({"test": [5]}, "rows are outside"),
        ({"memory": "much"}, "no amount of memory"),
    ],
)
def test_other_arguments_are_refused_as_by_attribute(question, wording):
    with pytest.raises(QuestionError, match=wording):
        ask(("descent", "plain"), **question)


def test_a_run_whose_loss_is_not_known_has_no_training_samples():
    class Loss(nn.CrossEntropyLoss):
        pass

    run = record_batches(network(), OPTIMIZERS["descent"], DATA, TARGETS, BATCHES, loss=Loss())
    run = explaind.open_run(Path(run.path), model=network())
    with pytest.raises(QuestionError, match="loss is not known"):
        ask(run)
    assert ask(run, over=("step", "parameter")).shape == (3, 3)
