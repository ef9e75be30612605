"""``explaind optimizers``: one line an optimizer, whole when piped, within a terminal's width otherwise."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import explaind_core as explaind
from explaind_core.cli.app import app
from explaind_core.cli.optimizers import UNNAMED, listed_optimizers, proof_word
from explaind_core.errors import QuestionError
from explaind_core.plugins import default_registry
from explaind_core.rules import RegisteredRule

COMMAND = [sys.executable, "-c", "from explaind_core.cli import main; main()", "optimizers"]
BOXES = set(map(chr, range(0x2500, 0x2580)))


def known():
    return {name for r in default_registry().rules() for name in r.rule.optimizers}


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_piped_every_optimizer_is_one_line_that_grep_finds_by_any_of_its_columns(columns):
    done = subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | {"COLUMNS": columns}, check=True)
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["optimizer", "rule", "package", "proof"]
    assert {line.split()[0] for line in lines} == known()
    assert len(lines) == len(known())
    (adamw,) = [line for line in lines if line.startswith("torch.optim.adamw.AdamW ")]
    assert "  explaind_optimizers.adam.AdamWRule  " in adamw
    assert "explaind-core 0.1.0" in adamw
    assert adamw.endswith("written")
    assert not BOXES & set(done.stdout)


def test_on_a_terminal_of_80_columns_no_line_is_longer_and_no_cell_wraps():
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(COMMAND, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    text = b""
    try:
        while piece := os.read(leader, 4096):
            text += piece
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    lines = text.decode().splitlines()
    assert len(lines) == 1 + len(known())
    assert max(map(len, lines)) <= 80
    assert sum("AdamWRule" in line for line in lines) == 1
    assert not BOXES & set(text.decode())


@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_a_narrow_table_keeps_the_name_of_every_class(width):
    for line in list(listed_optimizers(default_registry().rules(), width))[1:]:
        assert len(line) <= width
    classes = [line.split()[0].rpartition(".")[2] for line in listed_optimizers(default_registry().rules())]
    shown = [line.split()[0] for line in listed_optimizers(default_registry().rules(), 80)]
    assert sum(short.endswith(name) for short, name in zip(shown, classes, strict=True)) >= len(classes) - 1


def test_rules_without_a_proof_or_without_named_classes_are_listed_as_such():
    class Deciding(explaind.UpdateRule):
        def coefficients(self, step):
            return explaind.StepCoefficients(preconditioner=step.hyper["lr"])

    class Silent(Deciding):
        no_closed_form = "it is a secret"

    class Told(Deciding):
        optimizers = ("somewhere.Told",)

        def recursion(self, step):
            return step.theta

    assert [proof_word(rule()) for rule in (Deciding, Silent, Told)] == ["none", "no form", "written"]
    lines = list(listed_optimizers([RegisteredRule(r(), "p", "a-package", "2.0") for r in (Deciding, Told)]))
    assert lines[1].startswith(UNNAMED)
    assert "a-package 2.0  none" in lines[1]
    assert "a-package 2.0  written" in lines[2]


def test_a_name_chooses_and_shows_the_options_that_are_modelled():
    done = CliRunner().invoke(app, ["optimizers", "adamw.adamw"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()[:2]] == ["optimizer", "torch.optim.adamw.AdamW"]
    assert "  weight_decay\n" in done.output
    assert "  differentiable: False\n" in done.output
    wrong = CliRunner().invoke(app, ["optimizers", "nothing-like-it"])
    assert isinstance(wrong.exception, QuestionError)
