"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from explaind_core.cli import app as cli
from explaind_core.errors import QuestionError
from explaind_studies import demo as study
from support.attribution_oracles import record
from support.command_line import QUESTION, command_line


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    with command_line(tmp_path, monkeypatch, capsys) as call:
        yield call


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
