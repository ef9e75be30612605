"""attribute(out=...): the result on disk, interrupted and taken up again."""

from __future__ import annotations

import importlib
from functools import lru_cache

import pytest
import torch
import xarray as xr
import zarr

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.run import Run
from explaind_core.testing import record_example

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.attribute")
storage = importlib.import_module("explaind_core.storage")
INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def run(dtype: torch.dtype = torch.float64) -> Run:
    # Momentum, and rates that fall: the first steps need more nodes than the last.
    return record_example(7, dtype=dtype, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.8, momentum=0.5))


def ask(out=None, **question) -> xr.Dataset:
    return explaind.attribute(run(), INPUTS, out=out, **({"nodes": 2, "progress": False} | question))


def values(result: xr.Dataset) -> xr.Dataset:
    """A result in memory, without the mark by which a stored one knows its question."""
    attrs = {key: value for key, value in result.attrs.items() if key not in ("question", "steps_done")}
    result = result.load().copy()
    result.attrs = attrs
    return result


@pytest.fixture
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", 2)


@pytest.fixture
def computed(monkeypatch):
    """The steps that were computed, one by one; ``computed.limit`` of them, then Ctrl-C."""

    class Computed(list):
        limit = 1000

    steps, stepwise = Computed(), module.stepwise

    def counting(*args, **kwargs):
        for part in stepwise(*args, **kwargs):
            if len(steps) >= steps.limit:
                raise KeyboardInterrupt
            steps.append(run().steps[part.window])
            yield part

    monkeypatch.setattr(module, "stepwise", counting)
    return steps


@pytest.mark.parametrize("keep", [("step",), ("step", "layer"), ("step", "layer", "test", "output")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_written_equals_what_is_returned(tmp_path, blocks_of_two, keep, dtype):
    question = {"keep": keep, "layers": ["0"], "nodes": "adaptive", "progress": False}
    inputs = INPUTS.to(dtype)
    stored = explaind.attribute(run(dtype), inputs, out=tmp_path / "result.zarr", **question)
    memory = explaind.attribute(run(dtype), inputs, **question)
    xr.testing.assert_identical(values(stored), values(memory))
    assert explaind.closure_error(stored) <= 1e-12


@pytest.mark.parametrize("nodes", [2, "adaptive"])
@pytest.mark.parametrize("limit", [1, 2, 5, 6])
def test_an_interrupted_result_is_taken_up_where_it_stopped(tmp_path, blocks_of_two, computed, nodes, limit):
    question = {"nodes": nodes, "tolerance": 1e-7}
    whole = ask(tmp_path / "whole.zarr", **question)
    computed.clear()
    computed.limit = limit
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "result.zarr", **question)
    finished = limit // 2 * 2  # whole blocks of two
    computed.clear()
    computed.limit = 1000
    resumed = ask(tmp_path / "result.zarr", **question)
    assert computed == list(range(finished + 1, 8))
    xr.testing.assert_identical(resumed.load(), whole.load())


def test_a_finished_result_is_not_computed_again(tmp_path, blocks_of_two, computed):
    first = ask(tmp_path / "result.zarr").load()
    computed.clear()
    xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), first)
    assert computed == []


@pytest.mark.parametrize("torn", ["kernel", "step", "omitted"])
@pytest.mark.parametrize("written", [False, True])
def test_a_block_that_was_cut_short_is_written_again(tmp_path, blocks_of_two, computed, torn, written):
    """Killed while appending: some variables are longer than others, or all are long and one is still empty."""
    whole = ask(tmp_path / "whole.zarr").load()
    computed.limit = len(computed) + 4
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "result.zarr")
    group = zarr.open_group(tmp_path / "result.zarr", mode="r+")
    for name, array in group.arrays():
        if "step" in array.attrs["_ARRAY_DIMENSIONS"] and (written or name == torn):
            array.resize((6, *array.shape[1:]))  # filled with zeros
    computed.clear()
    computed.limit = 1000
    resumed = ask(tmp_path / "result.zarr")
    assert computed == [5, 6, 7]
    xr.testing.assert_identical(resumed.load(), whole)


def test_a_first_block_that_was_cut_short_is_written_again(tmp_path, blocks_of_two, monkeypatch):
    whole = ask(tmp_path / "whole.zarr").load()
    write = xr.Dataset.to_zarr

    def torn(self, path, **options):
        write(self[["kernel", "initial"]], path, **options | {"encoding": {}})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(xr.Dataset, "to_zarr", torn)
        ask(tmp_path / "result.zarr")
    xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), whole)


@pytest.mark.parametrize(
    "other",
    [
        {"steps": slice(1, 7)},
        {"layers": ["0"]},
        {"layers": {"0": {"0.weight": slice(0, 2)}}},
        {"nodes": 3},
        {"nodes": "adaptive"},
        {"keep": ("step", "test")},
        {"output": explaind.Outputs([0])},
    ],
    ids=repr,
)
def test_the_result_of_another_question_is_not_touched(tmp_path, other):
    first = ask(tmp_path / "result.zarr").load()
    with pytest.raises(QuestionError, match="out= holds the result of another question") as error:
        ask(tmp_path / "result.zarr", **other)
    assert error.value.remedy == "choose another path, or delete it"
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "result.zarr", consolidated=False).load(), first)


def test_other_inputs_and_other_runs_are_other_questions(tmp_path):
    ask(tmp_path / "result.zarr")
    for other, inputs in ((run(), INPUTS + 1e-12), (record_example(7), INPUTS)):
        with pytest.raises(QuestionError, match="another question"):
            explaind.attribute(other, inputs, nodes=2, progress=False, out=tmp_path / "result.zarr")


def test_other_slices_of_the_same_parameters_are_another_question(tmp_path):
    ask(tmp_path / "result.zarr", layers={"a": {"0.weight": 0}})
    with pytest.raises(QuestionError, match="another question"):
        ask(tmp_path / "result.zarr", layers={"a": {"0.weight": 1}})


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(QuestionError, match="there is something at out= that is no result"):
        ask(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_zarr_store_of_something_else_is_not_touched(tmp_path):
    mine = xr.Dataset({"a": ("step", [1.0])})
    mine.to_zarr(tmp_path / "mine.zarr", zarr_format=2, consolidated=False)
    with pytest.raises(QuestionError, match="another question"):
        ask(tmp_path / "mine.zarr")
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "mine.zarr", consolidated=False).load(), mine)


def test_without_the_step_axis_there_is_nothing_to_write_block_by_block(tmp_path):
    with pytest.raises(QuestionError, match="out= needs the step axis") as error:
        ask(tmp_path / "result.zarr", keep=("layer",))
    assert "leave out= away" in str(error.value)


def test_a_result_on_disk_may_exceed_the_memory_budget(tmp_path):
    with pytest.raises(QuestionError, match="does not fit into the memory budget") as error:
        ask(memory=100)
    assert "write it with out=" in str(error.value)
    assert ask(tmp_path / "result.zarr", memory=100).sizes["step"] == 7
