"""Docstrings have one argument, or one error, an entry, and name no argument that the code does not have."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from support.docstrings import described

ROOT = Path(__file__).parents[1]
PACKAGES = ("explaind_core", "optimizers/explaind_optimizers", "studies/explaind_studies")
# Folders and files whose entries still stand side by side.
NOT_YET: tuple[str, ...] = ()


def read(package):
    skipped = [ROOT / path for path in NOT_YET]
    return [d for d in described(ROOT / package) if not any(d.path.is_relative_to(path) for path in skipped)]


@pytest.mark.parametrize("package", PACKAGES)
def test_one_argument_or_error_an_entry(package):
    assert [line for found in read(package) for line in found.crowded()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_entry_of_an_argument_that_is_not_there(package):
    assert [line for found in read(package) for line in found.stale()] == []


# ---------------------------------------------------------------- what the tests above find
def written(folder, attributes, errors="OSError: never."):
    source = f'''
class Point:
    """A point.

    Attributes:
{textwrap.indent(attributes, " " * 8)}

    Raises:
{textwrap.indent(errors, " " * 8)}
    """

    x: float
    y: float
'''
    (folder / "module.py").write_text(source, encoding="utf-8")
    (found,) = described(folder)
    return found


@pytest.mark.parametrize(
    "attributes", ["x: across. y: up.", "x: across (to the right) y: up.", "x: across,\n    to the right. y: up."]
)
def test_two_entries_on_a_line_are_found(tmp_path, attributes):
    assert written(tmp_path, attributes).crowded() == [
        f"{tmp_path / 'module.py'}:6: Point: y has no entry of its own",
    ]


def test_two_errors_on_a_line_are_found(tmp_path):
    found = written(tmp_path, "x: across.\ny: up.", "OSError: it is. KeyError: it is not.")
    assert found.crowded() == [f"{tmp_path / 'module.py'}:10: Point: KeyError has no entry of its own"]


def test_prose_with_a_colon_is_no_entry(tmp_path):
    assert written(tmp_path, "x: across. Note: not up.\ny: one of two things: up, or down.").crowded() == []


def test_a_name_that_is_not_there_is_found(tmp_path):
    assert written(tmp_path, "x: across.\nz: deep.").stale() == [f"{tmp_path / 'module.py'}:7: Point has no z"]
