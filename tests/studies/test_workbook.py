"""The folder of a study: parts are computed once, whatever interrupts them, and nothing foreign is touched."""

from __future__ import annotations

from io import StringIO

import pytest
import xarray as xr
from rich.console import Console

from explaind_core.errors import StoreError
from explaind_studies import workbook
from explaind_studies.workbook import Workbook
from support.study_setting import Setting


def book(folder, setting=None, study="example"):
    console = Console(file=StringIO(), width=200)
    return Workbook(folder, study, Setting() if setting is None else setting, console=console, progress=False)


def test_a_part_is_computed_once(tmp_path):
    made = xr.Dataset({"x": ("step", [1.5, 2.5])}, coords={"step": [1, 2]}, attrs={"note": "n"})
    first = book(tmp_path / "new")
    xr.testing.assert_identical(first.part("a", lambda: made, "about"), made)
    assert "a about" in first.console.file.getvalue()
    again = book(tmp_path / "new")
    xr.testing.assert_identical(again.part("a", lambda: 1 / 0), made)
    assert again.parts == first.parts
    assert "about" not in again.console.file.getvalue()


def test_an_interrupted_part_keeps_its_seconds_and_is_computed_again(tmp_path, monkeypatch):
    clock = iter([10.0, 13.0, 100.0, 104.5])
    monkeypatch.setattr(workbook.time, "perf_counter", lambda: next(clock))

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        book(tmp_path).part("a", interrupted)
    assert not (tmp_path / "parts" / "a.zarr").exists()
    second = book(tmp_path)
    assert int(second.part("a", lambda: xr.Dataset({"x": 7})).x) == 7
    assert second.parts["a"]["seconds"] == 7.5
    assert second.parts["a"]["attempts"] == 2
    assert second.parts["a"]["peak_bytes"] > 2**20


def test_a_part_that_was_half_written_is_not_taken_up(tmp_path, monkeypatch):
    """A kill while it is written, in its last moment: everything is there but its name."""
    written = xr.Dataset.to_zarr

    def killed(self, *arguments, **options):
        written(self, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(xr.Dataset, "to_zarr", killed)
        book(tmp_path).part("a", lambda: xr.Dataset({"x": 1, "old": 0}))
    assert [p.name for p in (tmp_path / "parts").iterdir() if p.is_dir()] == ["a.unfinished"]
    found = book(tmp_path).part("a", lambda: xr.Dataset({"x": 2}))
    xr.testing.assert_identical(found, xr.Dataset({"x": 2}))
    assert [p.name for p in (tmp_path / "parts").iterdir() if p.is_dir()] == ["a.zarr"]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    book(tmp_path).part("a", lambda: xr.Dataset({"x": 1}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="a study with other settings") as error:
        book(tmp_path, Setting(seed=3))
    assert error.value.expected == {"seed": 3}
    assert error.value.got == {"seed": 0}
    with pytest.raises(StoreError, match="other settings") as error:
        book(tmp_path, study="another")
    assert (error.value.expected, error.value.got) == ({"study": "another"}, {"study": "example"})
    assert sorted(tmp_path.rglob("*")) == before
    assert book(tmp_path, {"seed": 0, "sizes": [1, 2]}).settings == {"seed": 0, "sizes": [1, 2]}  # the same in JSON


def test_a_foreign_folder_is_refused_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    book(tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match="the folder is not empty, and holds no study") as error:
        book(tmp_path / "mine")
    assert "--out" in error.value.remedy
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damaged", ["{", "", '{"study": "exam'])
def test_settings_that_cannot_be_read_are_refused(tmp_path, damaged):
    book(tmp_path)
    (tmp_path / "settings.json").write_text(damaged)
    with pytest.raises(StoreError, match="settings cannot be read"):
        book(tmp_path)


@pytest.mark.parametrize("other", ["[]", "3", "null", "{}"])
def test_settings_of_another_kind_are_other_settings(tmp_path, other):
    book(tmp_path)
    (tmp_path / "settings.json").write_text(other)
    with pytest.raises(StoreError, match="other settings"):
        book(tmp_path)


def test_the_folder_of_pictures_is_made_when_asked_for(tmp_path):
    made = book(tmp_path)
    assert not (tmp_path / "figures").exists()
    assert made.figures == made.figures == tmp_path / "figures"
    assert (tmp_path / "figures").is_dir()
