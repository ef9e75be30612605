"""attribute(out=...): the result on disk, interrupted and taken up again."""

from __future__ import annotations

import importlib
from functools import lru_cache

import pytest
import torch
import xarray as xr
import zarr

import explaind_core as explaind
from explaind_core.errors import QuestionError, StoreError
from explaind_core.run.run import Run
from explaind_core.strategies.stepwise import Stepwise
from explaind_core.testing import record_example

#: The module, which the function of the same name hides.
module = importlib.import_module("explaind_core.attribution.attribute")
appending = importlib.import_module("explaind_core.results.result_writer")
INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@lru_cache
def run(dtype: torch.dtype = torch.float64) -> Run:
    # Momentum, and rates that fall: the first steps need more nodes than the last.
    return record_example(7, dtype=dtype, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.8, momentum=0.5))


def ask(out=None, **question) -> xr.Dataset:
    return explaind.attribute(run(), INPUTS, out=out, **({"nodes": 2, "progress": False} | question))


@pytest.fixture
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(appending, "BLOCK", 2)


@pytest.fixture
def computed(monkeypatch):
    """The steps that were computed, one by one; ``computed.limit`` of them, then Ctrl-C."""

    class Computed(list):
        limit = 1000

    steps, contributions = Computed(), Stepwise.contributions

    def counting(*args, **kwargs):
        for part in contributions(*args, **kwargs):
            if len(steps) >= steps.limit:
                raise KeyboardInterrupt
            steps.append(run().steps[part.window])
            yield part

    monkeypatch.setattr(Stepwise, "contributions", counting)
    return steps


@pytest.mark.parametrize("keep", [("step",), ("step", "layer"), ("step", "layer", "test", "output")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_written_equals_what_is_returned(tmp_path, blocks_of_two, keep, dtype):
    question = {"keep": keep, "layers": ["0"], "nodes": "adaptive", "progress": False}
    inputs = INPUTS.to(dtype)
    stored = explaind.attribute(run(dtype), inputs, out=tmp_path / "result.zarr", **question)
    memory = explaind.attribute(run(dtype), inputs, **question)
    xr.testing.assert_identical(stored.load(), memory)
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


@pytest.mark.parametrize(
    "torn", ["kernel/c/2/0/0/0", "omitted/c/2/0/0", "kernel/c/2/0/0/0.123.partial", "zarr.json.partial"]
)
def test_a_block_that_was_cut_short_is_written_again(tmp_path, blocks_of_two, computed, torn):
    """Killed while appending: a chunk is written, or half of one, or half of the file that counts it."""
    whole = ask(tmp_path / "whole.zarr").load()
    computed.limit = len(computed) + 4
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "result.zarr")
    assert not (tmp_path / "result.zarr" / torn).exists()
    (tmp_path / "result.zarr" / torn).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "result.zarr" / torn).write_bytes(b"{half of what should be here")
    computed.clear()
    computed.limit = 1000
    resumed = ask(tmp_path / "result.zarr")
    assert computed == [5, 6, 7]
    xr.testing.assert_identical(resumed.load(), whole)
    assert contents(tmp_path / "result.zarr") == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("created", [0, 3, 1000])
def test_a_first_block_that_was_cut_short_is_written_again(tmp_path, blocks_of_two, monkeypatch, created):
    whole = ask(tmp_path / "whole.zarr").load()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        interrupt_writing(patch, created)
        ask(tmp_path / "result.zarr")
    with pytest.raises(StoreError, match=r"the result is unfinished[\s\S]*expected: 7 step entries[\s\S]*got:      0"):
        explaind.open_result(tmp_path / "result.zarr", unfinished=True)
    xr.testing.assert_identical(ask(tmp_path / "result.zarr").load(), whole)
    assert contents(tmp_path / "result.zarr") == contents(tmp_path / "whole.zarr")


def interrupt_writing(patch, created: int) -> None:
    """Ctrl-C when so many arrays are there, or all of them."""
    create, made = zarr.Group.create_array, []

    def creating(self, *args, **options):
        if len(made) == created:
            raise KeyboardInterrupt
        made.append(args)
        return create(self, *args, **options)

    def filling(*_):
        raise KeyboardInterrupt

    patch.setattr(zarr.Group, "create_array", creating)
    patch.setattr(appending.ResultWriter, "_fill", filling)


def contents(path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


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
    ids=["steps", "layers", "parts", "nodes", "adaptive", "keep", "output"],
)
def test_the_result_of_another_question_is_not_touched(tmp_path, other):
    first = ask(tmp_path / "result.zarr").load()
    with pytest.raises(QuestionError, match="out= holds the result of another question") as error:
        ask(tmp_path / "result.zarr", **other)
    assert error.value.remedy == "choose another path, or delete it"
    xr.testing.assert_identical(explaind.open_result(tmp_path / "result.zarr").load(), first)


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


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_zarr_store_of_something_else_is_not_touched(tmp_path, zarr_format):
    mine = xr.Dataset({"a": ("step", [1.0])})
    mine.to_zarr(tmp_path / "mine.zarr", zarr_format=zarr_format, consolidated=False)
    with pytest.raises(QuestionError, match="there is something at out= that is no result: a zarr folder of"):
        ask(tmp_path / "mine.zarr")
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "mine.zarr", consolidated=False).load(), mine)


def test_without_the_step_axis_it_is_written_in_one_go(tmp_path, computed):
    question = {"keep": ("layer", "output"), "nodes": "adaptive"}
    stored = ask(tmp_path / "result.zarr", **question).load()
    xr.testing.assert_identical(stored, ask(**question))
    computed.clear()
    xr.testing.assert_identical(ask(tmp_path / "result.zarr", **question).load(), stored)
    assert computed == []
    with pytest.raises(QuestionError, match="does not fit into the memory budget"):
        ask(tmp_path / "other.zarr", keep=("layer",), memory=10)


def test_a_result_on_disk_may_exceed_the_memory_budget(tmp_path):
    with pytest.raises(QuestionError, match="does not fit into the memory budget") as error:
        ask(memory=100)
    assert "write it with out=" in str(error.value)
    assert ask(tmp_path / "result.zarr", memory=100).sizes["step"] == 7
