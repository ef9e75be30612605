"""Blocks of test samples that the reverse-time adjoint answers one after the other: in memory, and with out=."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import xarray as xr
import zarr

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions.restrictions import Sample
from explaind_core.run.run import Run
from explaind_core.strategies.adjoint_walk import AdjointWalk
from support.axes_runs import INPUTS, example

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.attribution.attribute")


def ask(run: Run, keep, **question) -> xr.Dataset:
    options = {"nodes": 2, "progress": False, "strategy": "adjoint"} | question
    return explaind.attribute(run, INPUTS, keep=keep, **options)


@pytest.fixture
def blocks(monkeypatch):
    """So many test samples in a pass."""
    original = module.choose

    def rows(size):
        monkeypatch.setattr(
            module, "choose", lambda *a: dataclasses.replace(original(*a), rows=size, passes=-(-3 // size))
        )

    return rows


@pytest.fixture
def walks(monkeypatch):
    """The blocks of test samples that were computed; ``walks.limit`` of them, then ``walks.error``."""

    class Walks(list):
        limit, error = 1000, KeyboardInterrupt

    done, original = Walks(), AdjointWalk.run

    def counting(self, *arguments):
        if len(done) >= done.limit:
            raise done.error
        done.append((self.block.start, self.block.stop))
        return original(self, *arguments)

    monkeypatch.setattr(AdjointWalk, "run", counting)
    return done


OUT = {
    "steps kept": {"keep": ("step", "layer", "train", "test", "output"), "nodes": "adaptive", "tolerance": 1e-7},
    "steps summed": {"keep": ("train", "test", "output"), "nodes": "adaptive", "tolerance": 1e-7},
    "missed": {"keep": ("train", "test"), "nodes": "adaptive", "tolerance": 1e-5, "max_nodes": 1},
    "restricted": {"keep": ("gradient_step", "test"), "test": [2, 0, 1], "train": [4, 0], "layers": ["2"]},
    "windows": {"keep": ("step", "train", "test"), "steps": {"early": [1], "late": [3, 4]}, "test": Sample(2)},
    "chords": {"keep": ("step", "train", "test"), "chords": 3, "nodes": "adaptive"},
}
RUN = ("nesterov", "used")


@pytest.mark.parametrize(("name", "rows"), [("steps kept", 1), *((name, 2) for name in OUT)])
def test_blocks_of_test_samples_are_put_together(name, rows, blocks, walks, tmp_path):
    """In memory and on disk; numbers as in one go, where the nodes are."""
    question = {"nodes": 3} | {k: v for k, v in OUT[name].items() if k not in ("nodes", "tolerance", "max_nodes")}
    whole = ask(example(*RUN), **question)
    samples = whole.sizes["test"]
    walks.clear()
    blocks(rows)
    cut = ask(example(*RUN), **question)
    assert walks == [(a, min(a + rows, samples)) for a in range(0, samples, rows)]
    xr.testing.assert_allclose(cut, whole, rtol=0, atol=1e-14)
    stored = ask(example(*RUN), out=tmp_path / "fixed.zarr", **question)
    xr.testing.assert_identical(stored.load(), cut)
    adaptive = ask(example(*RUN), **OUT[name])
    stored = ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name])
    for count in ("nodes_used", "nodes_evaluated"):  # in memory: the largest of any block, step by step
        if count in adaptive.attrs:
            assert 0 < stored.attrs[count] <= adaptive.attrs[count]
            adaptive.attrs[count] = stored.attrs[count]
    xr.testing.assert_identical(stored.load(), adaptive)
    assert explaind.closure_error(stored) < 1e-12


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["missed first", "missed last"])
@pytest.mark.parametrize("keep", [("step", "train", "test"), ("train", "test")])
def test_a_block_that_missed_the_tolerance_is_not_forgotten_for_one_that_met_it(keep, order, blocks, tmp_path):
    """One test sample's output is 0 throughout, which any number of nodes tells."""
    blocks(1)
    question = {"nodes": "adaptive", "max_nodes": 1, "tolerance": 1e-9, "output": lambda call, x: call(x) * x[:, :1]}
    inputs = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]], dtype=torch.float64)[order]
    options = {"keep": keep, "strategy": "adjoint", "progress": False, **question}
    memory = explaind.attribute(example(*RUN), inputs, **options)
    stored = explaind.attribute(example(*RUN), inputs, out=tmp_path / "result.zarr", **options)
    if "step" in keep:
        assert not memory.converged.any()
        assert not stored.converged.any()
    else:
        assert stored.attrs["steps_not_converged"] == memory.attrs["steps_not_converged"] == 4


@pytest.mark.parametrize(
    ("name", "limit", "error"),
    [("steps kept", 1, KeyboardInterrupt), ("steps summed", 2, KeyboardInterrupt), ("missed", 1, MemoryError)],
)
def test_an_interrupted_result_is_taken_up_behind_its_last_block(name, limit, error, blocks, walks, tmp_path):
    blocks(1)
    whole = ask(example(*RUN), out=tmp_path / "whole.zarr", **OUT[name]).load()
    walks.clear()
    walks.limit, walks.error = limit, error
    with pytest.raises(error):
        ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name])
    walks.clear()
    walks.limit = 1000
    resumed = ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name])
    assert walks == [(a, a + 1) for a in range(limit, 3)]
    xr.testing.assert_identical(resumed.load(), whole)
    walks.clear()
    xr.testing.assert_identical(ask(example(*RUN), out=tmp_path / "result.zarr", **OUT[name]).load(), whole)
    assert walks == []


@pytest.mark.parametrize("torn", ["kernel", "residual", "all"])
def test_a_block_that_was_cut_short_is_written_again(torn, blocks, walks, tmp_path):
    """Some chunks of it are written, whole or not; what is joined over the blocks is joined with it, or not."""
    blocks(1)
    question = OUT["steps kept"]
    whole = ask(example(*RUN), out=tmp_path / "whole.zarr", **question).load()
    walks.clear()
    walks.limit = 1
    with pytest.raises(KeyboardInterrupt):
        ask(example(*RUN), out=tmp_path / "result.zarr", **question)
    group = zarr.open_group(tmp_path / "result.zarr", mode="r+")
    for name, array in group.arrays():
        dims = array.metadata.dimension_names
        if "test" in dims and dims != ("test",) and torn in (name, "all"):
            array[tuple(1 if dim == "test" else slice(None) for dim in dims)] = 7.0
    if torn == "all":
        group["nodes"][...] = whole.nodes.values
    walks.clear()
    walks.limit = 1000
    xr.testing.assert_identical(ask(example(*RUN), out=tmp_path / "result.zarr", **question).load(), whole)
    assert walks == [(1, 2), (2, 3)]


def test_what_was_found_on_the_way_is_kept_with_the_result(tmp_path, blocks):
    """That tails were dropped, and the factor of the gradients: neither is known before the first block."""
    run = explaind.testing.record_example(
        30, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.2, momentum=0.1)
    )  # fmt: skip
    inputs, options = torch.ones(2, 4, dtype=torch.float64), {"nodes": 1, "progress": False, "strategy": "adjoint"}
    blocks(1)
    question = {"keep": ("train", "test"), "steps": [29, 30], **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdjointWalk, "run", _once(AdjointWalk.run))
        with pytest.raises(KeyboardInterrupt):
            explaind.attribute(run, inputs, out=tmp_path / "result.zarr", **question)
    stored = explaind.attribute(run, inputs, out=tmp_path / "result.zarr", **question)
    memory = explaind.attribute(run, inputs, **question)
    assert "tail_dropped" in stored.attrs
    assert stored.attrs["gradient_factor"] == [1, 1]
    xr.testing.assert_identical(stored.load(), memory)


def _once(run):
    calls = []

    def once(self, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(None)
        return run(self, *arguments)

    return once


@pytest.mark.parametrize(
    "other",
    [
        {"steps": {"a": [1, 2], "b": [4]}}, {"steps": {"a": [1], "c": [2, 4]}}, {"train": {"x": [0], "y": [4]}},
        {"train": {"x": [0], "y": [1]}}, {"gradient_steps": [1, 2]}, {"test": [0, 1, 2]}, {"test": [1, 0]},
        {"chords": 2}, {"nodes": "left"}, {"strategy": "features"}, {"keep": ("step", "train", "test")},
    ],
    ids=repr,
)  # fmt: skip
def test_the_result_of_another_question_is_not_touched(other, tmp_path):
    question = {"keep": ("step", "train", "test", "output"), "steps": {"a": [1], "b": [2, 4]}, "train": {"x": [0, 1]}}
    first = ask(example(*RUN), out=tmp_path / "result.zarr", **question).load()
    if other == {"test": [0, 1, 2]}:  # the same samples: the same question
        same = ask(example(*RUN), out=tmp_path / "result.zarr", **question | other)
        xr.testing.assert_identical(same.load(), first)
        return
    with pytest.raises(QuestionError, match="out= holds the result of another question"):
        ask(example(*RUN), out=tmp_path / "result.zarr", **question | other)
    xr.testing.assert_identical(explaind.open_result(tmp_path / "result.zarr").load(), first)


def test_without_the_test_axis_it_is_written_in_one_go(tmp_path):
    question = {"keep": ("step", "train"), "strategy": "adjoint"}
    stored = ask(example(*RUN), out=tmp_path / "result.zarr", **question).load()
    xr.testing.assert_identical(stored, ask(example(*RUN), **question))
