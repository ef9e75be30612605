"""What is mutated and what is not, the copy that it is done in, and what is told of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import mutants
from mutants import copied, main, report, spans_of_annotations

SOURCE = '''\
from __future__ import annotations

LIMIT: int | None = 3

def clipped(x: int | float, *, most: float | None = LIMIT or None, **more: str | int) -> int | float:
    """``x | most``"""
    return x | LIMIT
'''


def test_annotations_are_found_and_nothing_else():
    lines = SOURCE.splitlines()
    spans = spans_of_annotations(SOURCE)
    assert [lines[first[0] - 1][first[1] : last[1]] for first, last in spans] == [
        "int | None", "int | float", "float | None", "str | int", "int | float",
    ]  # fmt: skip


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small one: a module, one test that notices some of its mutations, and a file that git ignores."""
    root = tmp_path / "root"
    files = {
        "small/__init__.py": "", "small/sums.py": "def added(a: int | None, b: int) -> int:\n    return a + b\n",
        "tests/small/test_sums.py": "from small.sums import added\n\ndef test_sums():\n    assert added(2, 2) == 4\n",
        ".gitignore": "large.bin\n", "large.bin": "0", "pyproject.toml": "",
    }  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    monkeypatch.setattr(mutants, "ROOT", root)
    return root


def test_the_copy_is_what_git_knows(checkout, tmp_path):
    folder = copied(tmp_path / "copy")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert found == {
        "small/__init__.py", "small/sums.py", "tests/small/test_sums.py", ".gitignore", "pyproject.toml", "conftest.py"
    }  # fmt: skip
    assert not (checkout / "conftest.py").exists()


def test_a_report_of_nothing_that_was_tried():
    assert report([("skipped", "")]) == "0 mutations: none; 1 not tried"


@pytest.mark.slow
def test_survivors_are_named_and_the_checkout_is_as_it_was(checkout, capfd):
    """2 + 2 is 2 * 2 and 2 ** 2, and no test tells them apart; the annotation is left alone."""
    pytest.importorskip("cosmic_ray")
    before = (checkout / "small/sums.py").read_text()
    assert main(["small/sums.py"]) == 0
    told = capfd.readouterr().out
    assert "+    return a * b" in told
    assert "+    return a ** b" in told
    assert "return a - b" not in told
    assert "a: int" not in [line for line in told.splitlines() if line.startswith("+")]
    assert " 2 survived" in told
    assert (checkout / "small/sums.py").read_text() == before
    assert main(["small/sums.py", "--sample", "1"]) == 0
    assert "1 mutations of small/sums.py" in capfd.readouterr().out


@pytest.mark.slow
def test_tests_that_fail_without_a_mutation_are_told(checkout, capfd):
    pytest.importorskip("cosmic_ray")
    Path(checkout / "tests/small/test_sums.py").write_text("def test_sums():\n    assert False\n")
    assert main(["small/sums.py"]) == 2
    assert "the tests fail without any mutation" in capfd.readouterr().out
