"""The command line's attribute: what it writes, takes up, refuses and returns."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import explaind_core as explaind
from explaind_core.results import result_writer as appending
from support.attribution_oracles import record
from support.command_line import INPUTS, QUESTION, command_line


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    with command_line(tmp_path, monkeypatch, capsys) as call:
        yield call


def written_as_asked(command, *arguments: str, **question) -> xr.Dataset:
    """What the command wrote, which must be what attribute() returns."""
    status, out, err = command("attribute", "run", *QUESTION, "--out", "result.zarr", "--nodes", "2", *arguments)
    assert status == 0, err
    assert "wrote result.zarr" in out
    wanted = explaind.attribute(command.run, INPUTS, progress=False, **{"nodes": 2, **question})
    written = explaind.open_result("result.zarr")
    assert set(written) == set(wanted)
    for name in {*wanted, *wanted.coords}:
        if wanted[name].dtype.kind == "f":  # a product depends, in its last bit, on where its factors lie in memory
            np.testing.assert_allclose(written[name], wanted[name], rtol=1e-12, atol=1e-14)
        else:
            np.testing.assert_array_equal(written[name], wanted[name])
    return written


ALL_AXES = "step,gradient_step,layer,parameter,train,test,output"


@pytest.mark.parametrize(
    "keep", ["step,layer,test,output", "layer,output", "step", "", "parameter", "train,test", "train", ALL_AXES]
)
def test_attribute_writes_the_result(command, keep):
    written = written_as_asked(command, "--keep", keep, keep=tuple(axis for axis in keep.split(",") if axis))
    assert ",".join(written.kernel.dims) == keep


@pytest.mark.parametrize(
    ("arguments", "question"),
    [
        (("--steps", "2:4"), {"steps": slice(2, 4)}),
        (("--steps", "2:"), {"steps": slice(2, None)}),
        (("--steps", "1::2"), {"steps": slice(1, None, 2)}),
        (("--steps", "1,3"), {"steps": [1, 3]}),
        (("--steps", "2"), {"steps": 2}),
        (("--steps", "a=1:3, b=3"), {"steps": {"a": slice(1, 3), "b": 3}}),
        (("--gradient-steps", "1,3"), {"gradient_steps": [1, 3]}),
        (("--gradient-steps", ":2"), {"gradient_steps": slice(None, 2)}),
        (("--train", "0:16"), {"train": slice(0, 16)}),
        (("--train", "5,2"), {"train": [5, 2]}),
        (("--train", "low=0:16,high=16:32"), {"train": {"low": slice(0, 16), "high": slice(16, 32)}}),
        (("--test", "1"), {"test": [1]}),
        (("--test", "-1:"), {"test": slice(-1, None)}),
        (("--test", "1,0"), {"test": [1, 0]}),
        (("--layers", "2,0.bias"), {"layers": ["2", "0.bias"]}),
        (("--nodes", "left"), {"nodes": "left"}),
        (("--nodes", "midpoint:3"), {"nodes": "midpoint:3"}),
    ],
)
def test_attribute_takes_restrictions_and_nodes(command, arguments, question):
    axes = ("step", "gradient_step", "layer", "train", "test")
    written_as_asked(command, "--keep", ",".join(axes), *arguments, keep=axes, **question)


@pytest.mark.parametrize(
    ("keep", "strategy", "axis"),
    [
        ("step,test", "forward", "step"), ("step,test", "reverse", "step"), ("step,train", "features", "step"),
        ("train,test", "adjoint", "test"), ("layer,test", "adjoint", "test"),
    ],
)  # fmt: skip
def test_a_strategy_writes_along_its_own_axis(command, keep, strategy, axis):
    """Block by block where this axis is kept, and can be taken up; in one go where it is not."""
    arguments = ("attribute", "run", *QUESTION, "--out", "result.zarr", "--strategy", strategy)
    for _ in range(2):
        assert command(*arguments, "--keep", keep)[0] == 0
        written = explaind.open_result("result.zarr")
        assert written.attrs["strategy"] == strategy
    other = ",".join(a for a in keep.split(",") if a != axis)
    status, _, err = command(*arguments, "--keep", other)
    assert status == 2
    assert "out= holds the result of another question" in err
    assert command(*arguments[:-1], strategy, "--keep", other, "--out", "other.zarr")[0] == 0
    assert explaind.open_result("other.zarr").attrs["strategy"] == strategy


def test_a_plan_is_printed_and_nothing_is_done(command):
    """The status tells whether the result fits."""
    asked = ("attribute", "run", *QUESTION, "--keep", "train,test", "--strategy", "adjoint", "--plan")
    status, out, _ = command(*asked, "--out", "result.zarr")
    assert status == 0
    assert out.startswith("adjoint mode: 3 steps x 2 nodes")
    assert not Path("result.zarr").exists()
    assert command(*asked)[0] == 0
    status, out, _ = command("attribute", "run", *QUESTION, "--plan", "--memory", "500B")
    assert status == 1
    assert "MORE than the memory budget" in out


def test_memory_is_a_bound_in_the_command_line_too(command):
    status, _, err = command(
        "attribute", "run", *QUESTION, "--out", "result.zarr", "--keep", "layer,test,output", "--memory", "64"
    )
    assert status == 2
    assert err.startswith("error: the result does not fit into the memory budget")


def test_attribute_takes_up_its_own_result_and_refuses_that_of_another_question(command):
    assert command("attribute", "run", *QUESTION, "--out", "result.zarr")[0] == 0
    assert command("attribute", "run", *QUESTION, "--out", "result.zarr")[0] == 0
    status, _, err = command("attribute", "run", *QUESTION, "--out", "result.zarr", "--layers", "0")
    assert status == 2
    assert "out= holds the result of another question" in err


def test_attribute_overwrites_nothing(command):
    (Path("mine.zarr")).mkdir()
    (Path("mine.zarr") / "notes.txt").write_text("mine")
    for keep in ("layer", "step,layer"):
        status, _, err = command("attribute", "run", *QUESTION, "--out", "mine.zarr", "--keep", keep)
        assert status == 2
        assert err.startswith("error: there is something at out= that is no result: notes.txt")
    assert [path.name for path in Path("mine.zarr").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("file", ["zarr.json", "kernel/zarr.json", "kernel/c/0/0/0/0"])
def test_a_damaged_result_is_an_error_that_names_the_file(command, file):
    arguments = ("attribute", "run", *QUESTION, "--out", "result.zarr")
    assert command(*arguments)[0] == 0
    path = Path("result.zarr") / file
    path.write_bytes(path.read_bytes()[:-3])
    status, out, err = command(*arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert f"result.zarr/{file}" in err
    assert "remedy:" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("file", ["manifest.json", "start.safetensors", "steps/000/000002.safetensors"])
@pytest.mark.parametrize("name", ["verify", "attribute"])
def test_a_damaged_run_is_an_error_that_names_the_file(command, name, file):
    shutil.copytree(command.run.path, "damaged")
    path = Path("damaged") / file
    path.write_bytes(path.read_bytes()[:-20])
    out = ("--out", "result.zarr") if name == "attribute" else ()
    status, out, err = command(name, "damaged", *QUESTION, *out)
    assert status == 2
    assert err.startswith("error: ")
    assert f"damaged/{file}" in err
    assert "Traceback" not in out + err
    assert not Path("result.zarr").exists()


def test_an_interrupted_attribution_says_how_to_go_on(command, monkeypatch):
    arguments = ("attribute", "run", *QUESTION, "--out", "result.zarr")
    with monkeypatch.context() as patch:
        patch.setattr(appending, "BLOCK", 1)
        write, made = appending.ResultWriter.append, []

        def interrupted(self, block, labels):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append(block)
            write(self, block, labels)

        patch.setattr(appending.ResultWriter, "append", interrupted)
        status, out, err = command(*arguments)
    assert status == 130
    assert "interrupted; what was finished lies at result.zarr: continue by the same command" in out + err
    assert explaind.open_result("result.zarr", unfinished=True).sizes["step"] == 2
    assert command(*arguments)[0] == 0
    assert explaind.open_result("result.zarr").sizes["step"] == 3


def test_an_output_of_zeros_closes(command):
    """A ratio to the largest output would divide 0 by 0."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in model[2].parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    record("flat", model, lambda ps: torch.optim.SGD(ps, lr=0.1), torch.randn(8, 4).double(), torch.randint(3, (8,)))
    assert command("attribute", "flat", *QUESTION, "--out", "result.zarr")[0] == 0


def test_attribute_fails_where_the_result_does_not_close(command, monkeypatch):
    monkeypatch.setattr(explaind, "closure_error", lambda _: 1.0)
    status, out, _ = command("attribute", "run", *QUESTION, "--out", "result.zarr")
    assert status == 1
    assert "closure error" in out
