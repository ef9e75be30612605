"""Steps that are summed: chords that share one straight line, and windows with names; and members drawn of an axis."""

from __future__ import annotations

import dataclasses
import itertools
from functools import lru_cache
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.restrictions import Sample
from explaind_core.run.run import Run
from explaind_core.strategies.adjoint_walk import AdjointWalk
from explaind_core.testing import record_example
from support import axes_oracle
from support.axes_oracle import AXES, SUBSETS, Influences, assert_answers, influences
from support.axes_runs import INPUTS, example

RUNS = [("nesterov", "used"), ("adamw", "missing"), ("lbfgs", "micro"), ("schedule-free", "evaluated")]


def ask(run: Run, keep, inputs=INPUTS, **question) -> xr.Dataset:
    return explaind.attribute(run, inputs, keep=keep, **({"nodes": 2, "progress": False} | question))


# ------------------------------------------------------------------ chords
@lru_cache
def oracle(case: tuple[str, str], nodes: int | str, chords: tuple[tuple[int, ...], ...]) -> Influences:
    """Every step of a chord has the feature map of the straight line from the chord's first theta to its last."""
    run = example(*case)
    truth = influences(run, INPUTS, nodes)
    phi = truth.phi.clone()
    for chord in chords:
        ends = [run.theta(chord[0] - 1), run.theta(chord[-1])]
        straight = SimpleNamespace(
            model=run.model, buffers=run.buffers, parameters=run.parameters, steps=range(1, 2), theta=ends.__getitem__
        )
        with mock.patch.object(axes_oracle, "_updates"):
            line = influences(straight, INPUTS, nodes).phi[0]
        for s in chord:
            phi[s - 1] = line
    return dataclasses.replace(truth, phi=phi)


#: What is asked; what the windows of the answer are; and the chords.
CHORDS = {
    "pairs": ({"chords": 2}, {2: [1, 2], 4: [3, 4]}, ((1, 2), (3, 4))),
    "ragged": ({"chords": 3}, {3: [1, 2, 3], 4: [4]}, ((1, 2, 3), (4,))),
    "one": ({"chords": 9}, {4: [1, 2, 3, 4]}, ((1, 2, 3, 4),)),
    "some steps": ({"chords": 2, "steps": slice(2, 5)}, {3: [2, 3], 4: [4]}, ((2, 3), (4,))),
    "a gap": ({"chords": 3, "steps": [1, 2, 4]}, {2: [1, 2], 4: [4]}, ((1, 2), (4,))),
    "windows": (
        {"chords": 2, "steps": {"early": range(1, 4), "late": 4}}, {"early": [1, 2, 3], "late": [4]},
        ((1, 2), (3,), (4,)),
    ),
    "a gap in a window": ({"chords": 3, "steps": {"all": [1, 3, 4]}}, {"all": [1, 3, 4]}, ((1,), (3, 4))),
    "gradient steps": ({"chords": 2, "gradient_steps": [1, 3]}, {2: [1, 2], 4: [3, 4]}, ((1, 2), (3, 4))),
    "samples and parts": (
        {"chords": 3, "train": [4, 0], "test": [2, 0], "layers": {"part": {"0.weight": 1}, "last": "2"}},
        {3: [1, 2, 3], 4: [4]}, ((1, 2, 3), (4,)),
    ),
}  # fmt: skip


def compare(case, name, keep, nodes=2, **options) -> xr.Dataset:
    asked, windows, chords = CHORDS[name]
    asked = {"steps": slice(1, 5)} | asked  # more of them in a run of several iterations a step
    truth = oracle(case, nodes, chords)
    result = ask(example(*case), keep, nodes=nodes, **asked, **options)
    told = {axis: asked.get(axis) for axis in ("gradient_steps", "train", "test")}
    if "layers" in asked:
        told["layers"] = {
            "part": truth.mask("0.weight", entries=1), "last": truth.mask(*(n for n in truth.where if n[0] == "2")),
        }  # fmt: skip
    assert_answers(result, truth, keep, steps=windows, **told)
    return result


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, RUNS[n % 2]) for n, name in enumerate(CHORDS)),
        *(("ragged", case) for case in (*RUNS[1:], ("descent", "plain"))),
    ],
    ids=str,
)
def test_the_steps_of_a_chord_share_its_feature_map(name, case):
    """In every way to an answer, the sum over each chord is that of the straight line through its ends."""
    plain = not {"gradient_steps", "train"} & {*CHORDS[name][0]}
    for strategy, keep in (
        ("forward", ("step", "layer", "test", "output")),
        ("reverse", ("step", "parameter", "output")),
        ("features", ("step", "layer", "train", "test", "output")),
        ("features", ("gradient_step", "parameter")),
        ("adjoint", ("step", "layer", "train", "test", "output")),
        ("adjoint", ("gradient_step", "test")),
    ):
        if plain or strategy in ("features", "adjoint"):
            result = compare(case, name, keep, strategy=strategy)
            assert result.attrs["strategy"] == strategy


@settings(deadline=None, max_examples=10)
@given(
    case=st.sampled_from(RUNS), name=st.sampled_from([*CHORDS]), keep=st.sampled_from(SUBSETS),
    nodes=st.sampled_from([1, 3, "left"]),
)  # fmt: skip
def test_chords_are_right_on_any_axes(case, name, keep, nodes):
    compare(case, name, keep, nodes)


@pytest.mark.parametrize("strategy", ["forward", "reverse", "features", "adjoint"])
def test_adaptive_nodes_are_those_of_the_chord(strategy):
    keep = ("step", "train", "test", "output") if strategy in ("features", "adjoint") else ("step", "test", "output")
    question = {"chords": 3, "tolerance": 1e-9, "strategy": strategy}
    result = ask(example("adamw", "missing"), keep, nodes="adaptive", **question)
    assert len(set(result.nodes.values.tolist())) > 1
    assert result.converged.all()
    for s, nodes in zip(result.step.values.tolist(), result.nodes.values.tolist(), strict=True):
        expected = oracle(("adamw", "missing"), nodes, CHORDS["ragged"][2]).expected(keep, steps=CHORDS["ragged"][1])
        at = result.step.values.tolist().index(s)
        np.testing.assert_allclose(result.kernel.values[at], expected["kernel"][at], rtol=0, atol=1e-12)
        np.testing.assert_allclose(result.residual.values[at], expected["residual"][at], rtol=0, atol=1e-12)


def test_what_the_quadrature_of_a_window_took_is_counted_over_its_chords():
    run, question = example("nesterov", "rates"), {"nodes": "adaptive", "tolerance": 1e-9}
    steps = ask(run, ("step",), **question)
    window = ask(run, ("step",), steps={"all": slice(None)}, **question)
    for name in ("nodes", "evaluations"):
        assert steps[name].max() > 1
        assert window[name].values.tolist() == [steps[name].sum()]
    assert window.update_error.values.tolist() == [steps.update_error.max()]


@pytest.mark.parametrize("strategy", ["forward", "adjoint"])
def test_a_window_has_converged_where_all_of_its_steps_have(strategy):
    """Steps that fall: the first ones miss the tolerance, the last ones do not."""
    run = example("rmsprop", "rates")
    keep = ("step", "train", "test", "output") if strategy == "adjoint" else ("step", "test", "output")
    question = {"nodes": "adaptive", "max_nodes": 1, "strategy": strategy}
    for tolerance in (10.0**-k for k in range(9)):
        told = ask(run, keep, tolerance=tolerance, **question).converged.values.tolist()
        if len(set(told)) == 2:
            break
    windows = {"one": slice(1, 3), "other": slice(3, 5)}
    result = ask(run, keep, tolerance=tolerance, steps=windows, **question)
    assert result.converged.values.tolist() == [all(told[:2]), all(told[2:])]
    assert len(set(told)) == 2
    summed = ask(run, keep[1:], tolerance=tolerance, **question)
    assert summed.attrs["steps_not_converged"] == told.count(False)
    assert summed.attrs["update_error"] == float(ask(run, keep, tolerance=tolerance, **question).update_error.max())


def test_a_result_says_that_chords_are_an_approximation():
    run = example("nesterov", "used")
    result = ask(run, ("step",), chords=3)
    assert result.attrs["chords"] == 3
    assert result.attrs["approximation"] == "3 steps share one straight line; exact for their sum only"
    assert not {"chords", "approximation"} & {*ask(run, ("step",)).attrs}


@pytest.mark.parametrize("keep", [AXES, ("step", "layer", "test", "output"), ("train", "test"), ("parameter",)])
def test_a_chord_of_one_step_is_the_step(keep):
    run = example("nesterov", "used")
    xr.testing.assert_identical(ask(run, keep, chords=1), ask(run, keep))


def test_a_chord_knows_the_largest_error_of_its_steps():
    run = example("inferred")
    steps = ask(run, ("step",))
    for name in ("update_error", "correction"):
        single, last = steps[name].values, 0
        for m in (2, 3, 4):
            chords = ask(run, ("step",), chords=m)[name].values.tolist()
            parts = [single[a : a + m] for a in range(0, 4, m)]
            assert chords == [part.max() for part in parts]
            last += sum(part.max() != part[-1] for part in parts)
        assert last  # and not of the last of them


# ------------------------------------------------------------------ windows with names
LONG = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WINDOWS = {"first": range(2, 4), "second": [38, 40, 41], "third": slice(43, 45), "last": 48}


@lru_cache
def long_run() -> Run:
    """So long that momentum forgets its first gradients, to the last digit, and remembers those of a few steps."""
    return record_example(48, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.3, momentum=0.3, weight_decay=0.1))


@lru_cache
def long_result(keep, strategy=None) -> xr.Dataset:
    return ask(long_run(), keep, LONG, steps=WINDOWS, strategy=strategy)


@pytest.mark.parametrize(
    ("keep", "strategy"),
    [
        (("step", "layer", "train", "test", "output"), "adjoint"),
        (("step", "gradient_step", "test"), "adjoint"),
        (("step", "train", "output"), "features"),
        (("step", "layer", "test", "output"), "forward"),
        (("step", "parameter", "test"), "reverse"),
    ],
)
def test_windows_in_one_pass_are_the_windows_asked_for_one_by_one(keep, strategy):
    together = long_result(keep, strategy)
    assert together.step.values.tolist() == [*WINDOWS]
    assert explaind.closure_error(together) < 1e-13
    for name, steps in list(WINDOWS.items())[1:3]:  # others before and behind them
        alone = ask(long_run(), keep, LONG, steps={name: steps}, strategy=strategy)
        assert explaind.closure_error(alone) < 1e-13
        for variable in ("kernel", "regularization", "residual"):
            found, expected = together[variable].sel(step=name), alone[variable].sel(step=name)
            found, expected = xr.align(found, expected, join="outer", fill_value=0)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14, err_msg=f"{name}, {variable}")


def test_a_window_is_the_sum_of_its_steps():
    keep = ("step", "layer", "train", "test", "output")
    together = long_result(keep, "adjoint")
    steps = ask(long_run(), keep, LONG, strategy="features")
    for name, members in WINDOWS.items():
        members = range(members.start, members.stop) if isinstance(members, slice) else np.atleast_1d(members)
        for variable in ("kernel", "regularization"):
            expected = steps[variable].sel(step=list(members)).sum("step")
            found, expected = xr.align(together[variable].sel(step=name), expected, join="outer", fill_value=0)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14, err_msg=f"{name}, {variable}")


@pytest.mark.parametrize("keep", [("step", "train", "test", "output"), ("step", "gradient_step", "layer")])
def test_what_has_decayed_below_rounding_is_dropped_and_the_result_says_so(keep, monkeypatch):
    result = long_result(keep, "adjoint")
    told = result.attrs["tail_dropped"]
    dropped = {}
    for part in told.removeprefix("below rounding before step ").split(", "):
        step, _, name = part.partition(" (window ")
        dropped[name.removesuffix(")")] = int(step)
    # 0.3^27 is a rounding; the first window ends where the run does.
    assert [*dropped] == ["second", "third", "last"]
    assert all(38 > s > 3 for s in dropped.values())
    assert 20 < 48 - dropped["last"] < 40
    assert explaind.closure_error(result) < 1e-13

    monkeypatch.setattr(AdjointWalk, "_drop", mock.Mock())
    whole = ask(long_run(), keep, LONG, steps=WINDOWS, strategy="adjoint")
    assert "tail_dropped" not in whole.attrs
    for name in ("kernel", "regularization", "residual"):
        scale = float(abs(whole.kernel).max())
        difference = float(abs(result[name] - whole[name]).max())
        assert difference < 1e-13 * scale
    if "gradient_step" in keep:  # what was dropped is missing, and nothing else
        for name, s in dropped.items():
            assert not result.kernel.sel(step=name, gradient_step=slice(None, s - 1)).any()
            assert result.kernel.sel(step=name, gradient_step=s).any()
            assert whole.kernel.sel(step=name, gradient_step=slice(None, s - 1)).any()


def test_nothing_is_dropped_of_states_that_do_not_decay():
    result = ask(example("adamw", "plain"), ("train", "test"), strategy="adjoint")
    assert "tail_dropped" not in result.attrs


def test_plain_descent_forgets_at_once_which_is_exact_and_not_worth_telling():
    result = ask(example("descent", "plain"), ("step", "gradient_step", "test"), strategy="adjoint")
    assert "tail_dropped" not in result.attrs
    assert_answers(result, influences(example("descent"), INPUTS, 2), ("step", "gradient_step", "test"))


# ------------------------------------------------------------------ members drawn of an axis
@pytest.mark.parametrize(
    ("axis", "argument", "of"),
    [("step", "steps", 48), ("gradient_step", "gradient_steps", 48), ("train", "train", 32), ("test", "test", 3)],
)
def test_a_sample_of_an_axis_is_drawn_and_told_and_answered_as_if_named(axis, argument, of):
    keep = tuple(a for a in AXES if a in {"step", "test", axis} and (a != "step" or axis != "gradient_step"))
    size = 2 if axis == "test" else 3
    result = ask(long_run(), keep, LONG, nodes=1, **{argument: Sample(size, seed=1)})
    assert result.attrs["sampled"] == f"{axis}: {size} of {of} drawn with seed 1"
    drawn = result[axis].values.tolist()
    assert len(drawn) == size
    assert drawn == sorted(drawn)
    named = ask(long_run(), keep, LONG, nodes=1, **{argument: drawn})
    assert "sampled" not in named.attrs
    named.attrs["sampled"] = result.attrs["sampled"]
    xr.testing.assert_identical(result, named)


def test_samples_of_several_axes_and_of_parts_of_them_are_all_told():
    result = ask(
        long_run(), ("step", "gradient_step", "train"), LONG, nodes=1, test=Sample(1),
        steps={"a": Sample(2), "b": 48}, gradient_steps=Sample(3, seed=4), train={"x": Sample(5, seed=2)},
    )  # fmt: skip
    assert result.attrs["sampled"].split("; ") == [
        "step 'a': 2 of 48 drawn with seed 0",
        "gradient_step: 3 of 48 drawn with seed 4",
        f"train 'x': 5 of {len(_in_scope(result))} drawn with seed 2",
        "test: 1 of 3 drawn with seed 0",
    ]


def _in_scope(result: xr.Dataset) -> set[int]:
    return {k for i in result.gradient_step.values.tolist() for k in long_run().sample_ids(i).tolist()}


def test_gradients_are_drawn_of_those_that_were_taken_before_the_last_step_explained():
    result = ask(long_run(), ("gradient_step",), LONG, nodes=1, steps=[4], gradient_steps=Sample(3, seed=1))
    assert len(result.gradient_step) == 3
    assert result.gradient_step.max() <= 4
    assert result.attrs["sampled"] == "gradient_step: 3 of 4 drawn with seed 1"


@settings(deadline=None)
@given(members=st.lists(st.integers(0, 99), min_size=1, unique=True), data=st.data(), seed=st.integers(0, 9))
def test_a_draw_is_without_replacement_in_order_and_the_same_every_time(members, data, seed):
    members = sorted(members)
    size = data.draw(st.integers(1, len(members)))
    drawn = Sample(size, seed).draw(members, "")
    assert drawn == sorted(set(drawn)) == Sample(size, seed).draw(members, "")
    assert len(drawn) == size
    assert set(drawn) <= set(members)


def test_other_seeds_draw_others_and_all_members_are_drawn_alike():
    drawn = [Sample(3, seed).draw(range(10), "") for seed in range(200)]
    counts = np.bincount(list(itertools.chain(*drawn)), minlength=10)
    assert counts.sum() == 600
    assert counts.min() > 35  # 60 of each on average, and 6.5 off


@pytest.mark.parametrize("size", [0, -1, 4])
@pytest.mark.parametrize("argument", ["test", "train", "steps", "gradient_steps"])
def test_a_sample_is_no_larger_than_what_it_is_drawn_from(size, argument):
    run = example("nesterov", "plain")
    of = {"test": 3, "train": 8, "steps": 4, "gradient_steps": 4}[argument]
    size = of + 1 if size == 4 else size
    with pytest.raises(QuestionError, match="that many cannot be drawn") as error:
        ask(run, ("step",), **{argument: Sample(size)})
    assert (error.value.where, error.value.expected, error.value.got) == (argument, f"1..{of}", size)
