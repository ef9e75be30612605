"""What all studies share: findings, the report that is written, the catalogue."""

from __future__ import annotations

import json
import math
from io import StringIO

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from explaind_core.errors import QuestionError, StoreError
from explaind_studies import catalogue
from explaind_studies.catalogue import STUDIES, Study, run_study
from explaind_studies.findings import Claim, Picture, Table, rounded
from explaind_studies.report import Report, keep
from support.study_setting import Setting


# ------------------------------------------------------------------ findings
@pytest.mark.parametrize(
    ("supported", "words"), [(True, "supported"), (False, "NOT supported"), (None, "cannot be told")]
)
def test_a_claim_says_whether_it_is_supported(supported, words):
    assert Claim("1", "text", "measure", 1, supported).verdict == words


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (0, "0"), (0.0, "0"), (1234567, "1,234,567"), (0.99499, "0.995"), (0.997, "0.997"), (0.9996, "1.00"),
        (1.0, "1.00"), (9.999, "10.00"), (12.34, "12.3"), (99.96, "100.0"), (123.4, "123"), (9999.0, "1e+04"),
        (12345.0, "1.23e+04"), (0.001, "0.001"), (0.000999, "9.99e-04"), (-0.5, "-0.5"), (-0.997, "-0.997"),
        (-12.34, "-12.3"), (None, "-"), (math.inf, "-"), (math.nan, "-"), (True, "True"),
        ("10 midpoints", "10 midpoints"),
        (np.float32(0.25), "0.25"), (np.int64(4000), "4,000"), (torch.tensor(0.5), "0.5"), (xr.DataArray(2.0), "2.00"),
    ],
)  # fmt: skip
def test_a_cell_has_three_significant_digits(cell, text):
    assert rounded(cell) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_what_is_shown_is_the_number_to_three_digits(number):
    assert float(rounded(number).replace(",", "")) == pytest.approx(number, rel=5.01e-3, abs=1e-300)


def test_a_table_has_as_many_cells_as_columns():
    with pytest.raises(ValueError, match="t: a row of 1 cells under 2 columns"):
        Table("t", "T", ("a", "b"), [[1, 2], [3]])


def test_a_table_is_written_with_all_digits_and_without_nan(tmp_path):
    path = Table("t", "T", ("a", "b"), [[1 / 3, math.nan], [np.float64(2.5), -math.inf], ["x", None]], "note").write(
        tmp_path / "new"
    )
    assert path == tmp_path / "new" / "t.json"
    assert json.loads(path.read_text()) == {
        "name": "t", "title": "T", "columns": ["a", "b"], "rows": [[1 / 3, None], [2.5, None], ["x", None]],
        "note": "note",
    }  # fmt: skip


def test_a_bar_in_a_cell_does_not_end_it():
    assert Table("t", "T", ("a|b",), [["|x|"]]).markdown() == "| a\\|b |\n|---|\n| \\|x\\| |"


# ------------------------------------------------------------------ the report
def report(**changes):
    parts = {
        "a": {"threads": 2, "seconds": 61.26, "peak_bytes": 3 * 2**29, "attempts": 1},
        "b": {"seconds": 2.0, "peak_bytes": 0},
    }
    whole = {
        "study": "example", "title": "An example", "summary": ["first", "second"],
        "settings": {"seed": 3, "sizes": [1, 20_000]},
        "claims": [Claim("5.1", "it falls", "slope", -0.123456, False, "a note")],
        "tables": [Table("t", "A table", ("a",), [[1.0]], "below it")],
        "pictures": [Picture("figures/p.png", "a picture")], "checks": {"closes": (True, "1e-9")}, "parts": parts,
    }  # fmt: skip
    return Report(**(whole | changes))


def test_a_report_holds_where_all_its_checks_do():
    assert report().holds  # whatever the paper's claims
    assert not report(checks={"one": (True, ""), "two": (False, "")}).holds
    assert report(checks={}).holds
    assert report().seconds == pytest.approx(63.26)


def test_the_page_has_everything_in_its_order(tmp_path):
    page = report().write(tmp_path, "explaind study example").read_text()
    places = [
        page.index(part)
        for part in (
            "# An example",
            "Made by `explaind study example`.",
            "first",
            "second",
            "## The paper's claims",
            "| 5.1 | it falls | slope | -0.123 (a note) | NOT supported |",
            "![a picture](figures/p.png)",
            "## A table",
            "| 1.00 |",
            "below it",
            "## Exactness",
            "| closes | holds | 1e-9 |",
            "## How it was made",
            "| seed | 3 |",
            "| sizes | 1, 20,000 |",
            "| versions | python",
            "| a | 61.3 | 2 | 1.50 |",
            "| all parts | 63.3 | - |",
        )
    ]
    assert places == sorted(places)
    bare = report(claims=(), checks={}, tables=(), pictures=()).write(tmp_path, "c").read_text()
    assert "claims" not in bare
    assert "Exactness" not in bare
    failed = report(checks={"closes": (False, "0.1")}).write(tmp_path, "c").read_text()
    assert "| closes | DOES NOT HOLD | 0.1 |" in failed


def test_the_reports_facts_are_json(tmp_path):
    report().write(tmp_path, "explaind study example")
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["claims"] == [
        {"where": "5.1", "text": "it falls", "measure": "slope", "value": -0.123456, "supported": False,
         "note": "a note", "verdict": "NOT supported"}
    ]  # fmt: skip
    assert facts["checks"] == {"closes": {"holds": True, "measured": "1e-9"}}
    assert facts["settings"] == {"seed": 3, "sizes": [1, 20_000]}
    assert facts["seconds"] == 63.3
    assert facts["tables"] == ["tables/t.json"]
    assert facts["figures"] == ["figures/p.png"]
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["parts"]["a"]["threads"] == 2
    assert json.loads((tmp_path / "tables" / "t.json").read_text())["rows"] == [[1.0]]


def test_only_the_report_its_tables_and_png_pictures_are_kept(tmp_path):
    folder, target = tmp_path / "study", tmp_path / "deep" / "kept"
    for name in (
        "figures/p.png",
        "figures/p.html",
        "figures/p.svg",
        "runs/cnn/start.safetensors",
        "parts/a.json",
        "other.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "settings.json").write_text("{}")
    report().write(folder, "c")
    for name in ("tables/former.json", "figures/former.png", "notes.md"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("former")
    keep(folder, target)
    kept = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert kept == {"README.md", "report.json", "tables/t.json", "figures/p.png", "notes.md"}
    assert (target / "figures" / "p.png").read_text() == "figures/p.png"
    assert (target / "README.md").read_text() == (folder / "README.md").read_text()


# ------------------------------------------------------------------ the catalogue
@pytest.fixture
def example(monkeypatch):
    """A study of its own, in a module of its own."""

    def study(found, setting):
        part = found.part("sum", lambda: xr.Dataset({"x": sum(setting.sizes)}))
        return report(study="example", parts=found.parts, settings=found.settings, claims=[
            Claim("1", "it is three", "the sum", int(part.x), int(part.x) == 3)
        ])  # fmt: skip

    class Module:
        PAPER, QUICK = Setting(), Setting(sizes=(1,))

    Module.study = staticmethod(study)
    monkeypatch.setattr(catalogue, "STUDIES", {**STUDIES, "example": Study("example", "An example", "its.module")})
    monkeypatch.setattr(catalogue, "import_module", {"its.module": Module}.__getitem__)
    return catalogue.STUDIES["example"]


def test_a_setting_is_the_papers_or_the_quick_one_with_changes(example):
    assert example.setting() == Setting()
    assert example.setting(quick=True, seed=4, sizes=None) == Setting(4, (1,))
    with pytest.raises(QuestionError, match="the study 'example' has no setting 'betas'") as error:
        example.setting(betas=(0.9, 0.98), data=None)
    assert error.value.expected == ["seed", "sizes"]


def test_a_study_is_run_written_and_kept(example, tmp_path):
    text = Console(file=StringIO(), width=200)
    made = run_study(
        "example", tmp_path / "run", Setting(), command="the command", kept=tmp_path / "kept", console=text
    )
    assert made.claims[0].supported
    assert "Made by `the command`" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "kept" / "tables" / "t.json").exists()
    printed = text.file.getvalue()
    assert "1: it is three -> supported: the sum: 3" in printed
    assert "holds: closes: 1e-9" in printed
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {
        "study": "example", "settings": {"seed": 0, "sizes": [1, 2]},
    }  # fmt: skip
    with pytest.raises(StoreError, match="other settings"):
        run_study("example", tmp_path / "run", Setting(1), command="c", console=text)


def test_a_study_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(QuestionError, match="there is no study 'figure 7'") as error:
        run_study("figure 7", tmp_path / "run", Setting(), command="c")
    assert error.value.expected == ["grokking", "pruning", "table1"]
    assert not (tmp_path / "run").exists()


def test_every_study_is_named_once():
    assert list(STUDIES) == [study.name for study in STUDIES.values()] == ["table1", "pruning", "grokking"]
    assert STUDIES["table1"].setting().experiments == ("transformer", "cnn", "resnet9")
