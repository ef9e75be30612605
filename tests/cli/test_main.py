"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file
from torch import nn

import explaind_core as explaind
from explaind_core.cli import app as cli
from explaind_core.errors import QuestionError
from explaind_core.results import result_writer as appending
from explaind_core.testing import record_example
from explaind_studies import demo as study
from support.attribution_oracles import record

MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.a(left) * self.b(right)

number = 7
def wrong():
    return number
"""


example_run = lru_cache(record_example)
INPUTS = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command line in a folder with a run, its inputs and a module that builds its model."""
    (tmp_path / "tiny_architecture.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as for an installed command
    monkeypatch.chdir(tmp_path)
    example = example_run(3)
    (tmp_path / "run").symlink_to(example.path)
    save_file({"inputs": INPUTS}, tmp_path / "inputs.safetensors")
    monkeypatch.setattr(cli.console, "width", 200)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["explaind", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        text = capsys.readouterr()
        return exit_.value.code, text.out, text.err

    call.run = example
    yield call
    sys.modules.pop("tiny_architecture", None)


QUESTION = ("--model", "tiny_architecture:build", "--inputs", "inputs.safetensors")


def test_optimizers_lists_what_is_registered_and_from_where():
    """From outside, once: the installed command."""
    done = subprocess.run(
        [sys.executable, "-c", "from explaind_core.cli import main; main()", "optimizers"],
        capture_output=True, text=True, timeout=120, env={"COLUMNS": "200", "PATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("torch.optim.sgd.SGD", "torch.optim.adam.Adam", "explaind_optimizers.adam.AdamWRule", "explaind-core"):
        assert word in done.stdout


def test_verify_succeeds_where_the_prediction_is_rebuilt(command):
    status, out, _ = command("verify", "run", *QUESTION)
    assert status == 0
    assert "EPK accuracy (agreement)" in out
    assert "2.00 (2)" in out


def test_verify_takes_adaptive_nodes(command):
    status, out, _ = command("verify", "run", *QUESTION, "--nodes", "adaptive", "--tolerance", "1e-6")
    assert status == 0
    assert "(adaptive)" in out


def test_verify_fails_where_an_update_error_exceeds_its_bound(command):
    assert command("verify", "run", *QUESTION, "--max-update-error", "0")[0] == 1


def test_verify_fails_where_a_decision_differs(command, monkeypatch):
    """One node, and steps so large that it rebuilds another class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = torch.randn(40, 4, dtype=torch.float64)
    record("wild", model, lambda ps: torch.optim.SGD(ps, lr=20.0), inputs, torch.randint(3, (40,)), steps=5)
    save_file({"inputs": inputs}, "inputs.safetensors")
    status, out, _ = command("verify", "wild", *QUESTION, "--nodes", "1")
    assert status == 1
    assert "1.0000" not in out


def test_inputs_with_other_names_are_keywords(command, monkeypatch):
    monkeypatch.syspath_prepend(".")
    import tiny_architecture

    left, right, targets = torch.randn(12, 2), torch.randn(12, 2), torch.randint(3, (12,))
    record(
        "named", tiny_architecture.Named(), lambda ps: torch.optim.SGD(ps, lr=0.01),
        {"left": left, "right": right}, targets,
    )  # fmt: skip
    save_file({"left": left[:2], "right": right[:2]}, "pair.safetensors")
    question = ("--model", "tiny_architecture:Named", "--inputs", "pair.safetensors")
    assert command("verify", "named", *question)[0] == 0


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


WRONG = {
    "no run": (("verify", "nowhere", *QUESTION), "this is not a recorded run"),
    "no module": (
        ("verify", "run", "--model", "nothing_like_this:build", "--inputs", "inputs.safetensors"),
        "the model cannot be built: No module named 'nothing_like_this'",
    ),
    "no callable": (
        ("verify", "run", "--model", "tiny_architecture:missing", "--inputs", "inputs.safetensors"),
        "the model cannot be built",
    ),
    "no colon": (
        ("verify", "run", "--model", "tiny_architecture", "--inputs", "inputs.safetensors"),
        "the model cannot be built",
    ),
    "not callable": (
        ("verify", "run", "--model", "tiny_architecture:number", "--inputs", "inputs.safetensors"),
        "the model cannot be built",
    ),
    "no model": (
        ("verify", "run", "--model", "tiny_architecture:wrong", "--inputs", "inputs.safetensors"), "that is no model",
    ),
    "no inputs": (
        ("verify", "run", "--model", "tiny_architecture:build", "--inputs", "missing.safetensors"),
        "the inputs cannot be read",
    ),
    "other inputs": (
        ("verify", "run", "--model", "tiny_architecture:build", "--inputs", "tiny_architecture.py"),
        "the inputs cannot be read",
    ),
    "nodes": (("verify", "run", *QUESTION, "--nodes", "many"), "nodes is not a number of nodes"),
    "axis": (("attribute", "run", *QUESTION, "--out", "r", "--keep", "steps"), "there is no axis 'steps'"),
    "layer": (("attribute", "run", *QUESTION, "--out", "r", "--layers", "x"), "the layer 'x' matches no parameter"),
    "strategy": (("attribute", "run", *QUESTION, "--out", "r", "--strategy", "magic"), "there is no such strategy"),
    "memory": (("attribute", "run", *QUESTION, "--out", "r", "--memory", "much"), "memory is no amount of memory"),
    "nowhere": (("attribute", "run", *QUESTION), "it is not said where to write"),
    "outside": (("attribute", "run", *QUESTION, "--out", "r", "--steps", "0:2"), "the slice of steps reaches outside"),
    "windows of gradients": (
        ("attribute", "run", *QUESTION, "--out", "r", "--gradient-steps", "a=1:2"), "gradient_steps cannot be windows",
    ),
    "unknown sample": (
        ("attribute", "run", *QUESTION, "--out", "r", "--train", "1,99"), "1 ids are of no sample that was trained on",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_says_what_is_wrong_without_a_traceback(command, name):
    arguments, what = WRONG[name]
    status, _, err = command(*arguments)
    assert status == 2
    assert err.startswith(f"error: {what}")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "'' is no whole number"),
        ("1.5", "'1.5' is no whole number"),
        ("1,,2", "'' is no whole number"),
        ("1,2:3", "'2:3' is no whole number"),
        ("1-3", "'1-3' is no whole number"),
        ("1:b", "'1:b' is no range"),
        ("1:2:3:4", "'1:2:3:4' is no range"),
        ("1:3:0", "'1:3:0' is no range"),
        ("3:1:-1", "'3:1:-1' is no range"),
        ("a=1:2,3", "'3' has no name"),
        ("=1:2", "'=1:2' has no name"),
        ("a=1,a=2", "the name 'a' is given twice"),
        ("a=", "'' is no whole number"),
        ("a=1:x", "'1:x' is no range"),
    ],
)
def test_a_malformed_range_says_what_is_wrong_with_it_and_what_is_not(text, what):
    with pytest.raises(QuestionError) as error:
        cli._selection(text, "--steps")
    assert (error.value.what, error.value.where, error.value.got) == (what, "--steps", text)
    assert "a=200:250,b=450:500" in error.value.expected


@pytest.mark.parametrize("option", ["--steps", "--gradient-steps", "--train", "--test"])
def test_a_malformed_range_is_refused_before_any_work(command, option):
    status, _, err = command("attribute", "nowhere", *QUESTION, "--out", "r", option, "some")
    assert status == 2
    assert err.startswith(f"error: 'some' is no whole number\n  where:    {option}\n")


def test_a_missing_option_is_named(command):
    status, _, err = command("verify", "run")
    assert status == 2
    assert "--model" in err


def test_without_a_command_there_is_help(command):
    _, out, err = command()
    for name in ("demo", "verify", "attribute", "optimizers"):
        assert name in out + err


@pytest.mark.parametrize(
    ("flags", "folder", "changed"),
    [
        ((), "runs/demo", {}),
        (("--quick",), "runs/quick", {"p": 67}),
        (("--paper",), "runs/demo", {"explained": 2000}),
        (("--seed", "3", "--out", "here"), "here", {"seed": 3}),
    ],
)
@pytest.mark.parametrize("holds", [True, False])
def test_demo_chooses_its_setting_and_returns_whether_its_checks_hold(
    command, monkeypatch, flags, folder, changed, holds
):
    seen = []

    def demo(path, setting, *, console):
        seen.append((str(path), setting))
        return type("Result", (), {"holds": holds})

    monkeypatch.setattr(study, "demo", demo)
    assert command("demo", *flags)[0] == (0 if holds else 1)
    path, setting = seen[0]
    assert path == folder
    base = study.QUICK if "--quick" in flags else study.PAPER
    assert {n: getattr(setting, n) for n in changed} == changed
    assert [n for n in vars(base) if getattr(base, n) != getattr(setting, n) and n not in changed] in ([], ["suffix"])
