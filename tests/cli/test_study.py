"""``explaind study``, with a very small study of Table 1."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from typer.testing import CliRunner

from explaind_core.cli import app as cli
from explaind_core.cli import study as cli_study
from explaind_studies import table1
from support.table1_setting import TINY


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_study, "console", Console(file=StringIO(), width=200))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["explaind", "study", *arguments])
        result = CliRunner().invoke(cli.app, ["study", *arguments])
        return result, cli_study.console.file.getvalue()

    return call


def test_the_quick_study_by_its_command(command, tmp_path, monkeypatch):
    monkeypatch.setattr(table1, "QUICK", replace(TINY, experiments=("transformer",), nodes=("midpoint:10",)))
    result, text = command("table1", "--quick", "--seed", "3", "--keep", "kept", "--parts", "resnet9")
    assert result.exit_code == 0, result.exception
    assert "3.1" not in text  # no claim about that one
    assert "holds: resnet9: every result closes" in text
    facts = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert facts["command"] == "explaind study table1 --quick --seed 3 --keep kept --parts resnet9"
    assert facts["settings"]["seed"] == 3
    assert facts["settings"]["experiments"] == ["resnet9"]
    assert (tmp_path / "runs" / "studies" / "table1-quick" / "runs" / "resnet9" / "closed.json").exists()


def test_the_command_fails_where_a_check_does(command, monkeypatch):
    monkeypatch.setattr(table1, "QUICK", replace(TINY, experiments=("resnet9",)))
    monkeypatch.setattr(table1, "checks", lambda _: {"exact": (False, "it is not")})
    result, text = command("table1", "--quick")
    assert result.exit_code == 1
    assert "DOES NOT HOLD: exact: it is not" in text


def test_the_command_may_be_interrupted(command, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(table1, "study", interrupted)
    result, text = command("table1", "--quick")
    assert result.exit_code == cli_study.INTERRUPTED == 130
    assert "continue by the same command" in text


def test_studies_are_listed(command):
    result, text = command()
    assert result.exit_code == 0
    assert all(name in text for name in ("table1", "pruning", "grokking", "Table 1: the rebuilt predictions"))


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (("nonsense",), ("there is no study 'nonsense'", "grokking", "table1")),
        (("table1", "--betas", "3"), ("those are no betas", "0.9,0.98")),
        (("table1", "--betas", "0.9,1.0"), ("those are no betas",)),
        (("table1", "--betas", "0.9,0.98"), ("the study 'table1' has no setting 'betas'", "cnn_width")),
        (("table1", "--quick", "--parts", "vgg"), ("no experiment 'vgg'", "transformer")),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, capsys, arguments, wording):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["explaind", "study", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    text = " ".join(capsys.readouterr().err.split())
    assert all(words in text for words in wording), text
    assert not list(tmp_path.rglob("*.zarr"))
