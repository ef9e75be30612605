"""out= of the strategies that go forwards in time: written block by block of steps, interrupted and taken up."""

from __future__ import annotations

import shutil

import pytest
import xarray as xr

import explaind_core as explaind
from explaind_core.results import result_writer as appending
from explaind_core.strategies.stepwise import Stepwise
from support.axes_oracle import AXES
from support.axes_runs import INPUTS, example

RUN = ("nesterov", "used")


def ask(keep, **question) -> xr.Dataset:
    options = {"nodes": 2, "progress": False} | question
    return explaind.attribute(example(*RUN), INPUTS, keep=keep, **options)


STEPWISE = {
    "reverse": {"keep": ("step", "parameter", "test")},
    "features": {"keep": ("step", "layer", "train", "test"), "gradient_steps": [1, 2, 4]},
    "features, all axes": {"keep": AXES},
    "features, windows": {"keep": ("step", "train"), "steps": {"a": [1], "b": [2], "c": [4]}},
    "reverse, chords and gaps": {"keep": ("step", "parameter"), "steps": [1, 2, 4], "chords": 2},
    "forward, chords": {"keep": ("step", "test", "output"), "chords": 2},
}


@pytest.mark.parametrize("name", STEPWISE)
@pytest.mark.parametrize("limit", [1, 2])
def test_steps_are_written_block_by_block_and_taken_up(name, limit, tmp_path, monkeypatch):
    """Blocks of one or two steps; what goes before the first step of a block is known again."""
    question = {"strategy": name.partition(",")[0], "nodes": "adaptive", "tolerance": 1e-7, **STEPWISE[name]}
    monkeypatch.setattr(appending, "BLOCK", 2 if limit == 2 else 1)
    whole = ask(out=tmp_path / "whole.zarr", **question)
    memory = ask(**question)
    xr.testing.assert_identical(whole.load(), memory)
    original, done = Stepwise.contributions, []

    def interrupted(*arguments, **options):
        for part in original(*arguments, **options):
            if len(done) == limit:
                raise KeyboardInterrupt
            done.append(part.window)
            yield part

    windows = whole.sizes["step"]
    with monkeypatch.context() as patch:
        patch.setattr(Stepwise, "contributions", interrupted)
        if limit < windows:
            with pytest.raises(KeyboardInterrupt):
                ask(out=tmp_path / "result.zarr", **question)
    assert limit >= windows or (tmp_path / "result.zarr").exists()
    resumed = ask(out=tmp_path / "result.zarr", **question)
    xr.testing.assert_identical(resumed.load(), whole.load())
    shutil.rmtree(tmp_path / "result.zarr")
