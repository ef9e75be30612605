"""The picture of the house: names followed through faces, circles and levels counted, a stale page noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from house import House
from import_graph import Package, circles, levels, reduced, upward
from stages import main, mermaid, numbers, table, with_stages

ROOT = Path(__file__).parents[2]


def package(folder, files):
    """A small package of some files."""
    for name, text in files.items():
        path = folder / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Package(folder, "small")


FILES = {
    "__init__.py": "from small.store import Store",
    "errors.py": "",
    "names.py": "from small.store import *",
    "store/__init__.py": "from small.store.files import Store as Shelf\nfrom small.store.files import Store",
    "store/files.py": "from small import errors\nclass Store: ...",
    "store/size.py": "from small.store.files import Store",
    "run/__init__.py": "from small.run.run import Run",
    "run/run.py": "from small.store import Shelf, size\nimport small.errors as errors",
}


def test_a_name_is_followed_through_a_face_to_the_module_that_makes_it(tmp_path):
    small = package(tmp_path, FILES)
    assert small.modules == {
        "small": {"small.store.files"},
        "small.errors": set(),
        "small.names": {"small.store.files"},
        "small.store.files": {"small.errors"},
        "small.store.size": {"small.store.files"},
        "small.run.run": {"small.store.files", "small.store.size", "small.errors"},
    }
    assert small.folders == {
        "__init__": {"store"}, "errors": set(), "names": {"store"}, "store": {"errors"}, "run": {"store", "errors"}
    }  # fmt: skip
    assert levels(small.folders) == {"__init__": 3, "errors": 1, "names": 3, "store": 2, "run": 3}
    assert small.largest_folder == ("small", 3)


@pytest.mark.parametrize(
    "late",
    [
        "def late():\n    from small.run import Run",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small.run.run import Run",
    ],
)
def test_an_import_that_hides_in_a_function_or_is_for_types_alone_closes_a_circle(tmp_path, late):
    small = package(tmp_path, {**FILES, "store/size.py": late})
    assert circles(small.modules) == [["small.run.run", "small.store.size"]]
    assert circles(small.folders) == [["run", "store"]]
    assert len(upward(small.modules)) == 1


def test_a_circle_counts_as_one_level():
    graph = {"top": {"a"}, "a": {"b"}, "b": {"a", "low"}, "low": set()}
    assert levels(graph) == {"top": 3, "a": 2, "b": 2, "low": 1}


def test_what_another_path_implies_is_not_drawn():
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert reduced(graph) == {"a": {"b", "d"}, "b": {"c"}, "c": set(), "d": {"c"}}


def test_the_package_has_no_circle_and_the_page_is_what_its_imports_say():
    assert circles(Package(ROOT).modules) == circles(Package(ROOT).folders) == []
    assert main(["--check"]) == 0
    assert "upward imports               0\n" in numbers(ROOT)


def test_a_page_or_a_picture_that_is_stale_is_noticed(tmp_path, capsys):
    for name in ("explaind_core", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "studies"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert main([str(tmp_path), "--check"]) == 0
    picture = (tmp_path / "docs" / "architecture.svg").read_text()
    with (tmp_path / "explaind_core" / "progress.py").open("a") as file:
        file.write("\nfrom explaind_core import errors\n")
    assert main([str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err == (
        "docs/architecture.md is not what the imports say: make docs\n"
        "docs/architecture.svg is not what the imports say: make docs\n"
    )
    assert main([str(tmp_path)]) == main([str(tmp_path), "--check"]) == 0
    assert (tmp_path / "docs" / "architecture.svg").read_text() != picture


def test_what_the_contract_does_not_place_is_an_error(tmp_path):
    shutil.copytree(ROOT / "explaind_core", tmp_path / "explaind_core", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "explaind_core" / "attic.py").write_text("")
    with pytest.raises(ValueError, match=r"pyproject.toml places .*, the package has .*attic"):
        House.of(tmp_path)


def test_a_page_without_its_markers_is_an_error():
    with pytest.raises(ValueError, match="once each"):
        with_stages("# Architecture", House.of(ROOT))


def test_every_folder_is_drawn_and_described():
    house = House.of(ROOT)
    drawn, rows = mermaid(house), table(house)
    for path in (ROOT / "explaind_core").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f'{path.name}["{path.name}/"]' in drawn
            assert f"[{path.name}/](../explaind_core/{path.name}/)" in rows
            assert house.files[path.name] == len(list(path.glob("*.py"))) - 1
