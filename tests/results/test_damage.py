"""Results on disk: damage of any file is found and named, and what is no finished result is told."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.errors import QuestionError, StoreError
from explaind_core.results import result_writer as appending
from support.asked_results import QUESTIONS, ask, files, finished, run


@pytest.fixture(autouse=True)
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(appending, "BLOCK", 2)


@pytest.fixture
def damaged(tmp_path):
    """A copy of a finished result of which one file is made to hold something else, or nothing, one after the other."""

    def each(name: str, damage) -> Iterator[str]:
        path = tmp_path / "result.zarr"
        shutil.copytree(finished(name), path)
        for key in files(path):
            content = (path / key).read_bytes()
            found = damage(content)
            if found is None:
                (path / key).unlink()
            else:
                (path / key).write_bytes(found)
            yield key
            (path / key).write_bytes(content)
        explaind.open_result(path)

    return each


# ------------------------------------------------------------------ damage
DAMAGE = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\n",
    "first bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "last bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["steps", "samples"])
def test_damage_of_any_file_is_found_and_named(name, kind, damaged, tmp_path):
    for key in damaged(name, DAMAGE[kind]):
        # Without zarr.json nothing says that it is a result.
        named = "no result" if (key, kind) == ("zarr.json", "missing") else re.escape(f"result.zarr/{key}")
        with pytest.raises(StoreError, match=named) as error:
            explaind.open_result(tmp_path / "result.zarr")
        assert error.value.remedy is not None


@pytest.mark.parametrize("name", ["windows", "whole"])
def test_damage_is_found_by_who_asks_again(name, damaged, tmp_path):
    for key in damaged(name, DAMAGE["last bit"]):
        with pytest.raises(StoreError, match=re.escape(f"result.zarr/{key}")):
            ask(tmp_path / "result.zarr", name)


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_flipped_bit_anywhere_is_found_and_named(data):
    name = data.draw(st.sampled_from(sorted(QUESTIONS)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.zarr"
        shutil.copytree(finished(name), path)
        # Metadata have most bytes: half of the draws go to chunks.
        keys = [k for k in files(path) if k.endswith("zarr.json") == data.draw(st.booleans())]
        key = data.draw(st.sampled_from(keys))
        content = bytearray((path / key).read_bytes())
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
        (path / key).write_bytes(content)
        with pytest.raises(StoreError, match=re.escape(key)):
            explaind.open_result(path)


def test_without_the_check_a_damaged_chunk_is_found_when_it_is_read(tmp_path):
    shutil.copytree(finished("steps"), tmp_path / "result.zarr")
    chunk = tmp_path / "result.zarr" / "kernel/c/1/0/0"
    chunk.write_bytes(DAMAGE["last bit"](chunk.read_bytes()))
    opened = explaind.open_result(tmp_path / "result.zarr", check=False)
    assert np.isfinite(opened.kernel.isel(step=slice(0, 2)).values).all()
    with pytest.raises(ValueError, match="checksum"):
        opened.kernel.load()
    chunk.unlink()
    with pytest.raises(StoreError, match="kernel/c/1/0/0"):
        explaind.open_result(tmp_path / "result.zarr", check=False)


def test_chunks_full_of_one_number_are_files_too(tmp_path):
    """Or else one that is missing could not be told from them."""
    result = ask(tmp_path / "result.zarr", steps=[1, 2, 3])  # contiguous: nothing is omitted
    assert not result.omitted.any()
    assert {k for k in files(tmp_path / "result.zarr") if k.startswith("omitted/c/")} == {
        "omitted/c/0/0",
        "omitted/c/1/0",
    }


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_reads_as_it_was_returned_and_any_zarr_reader_reads_it(name):
    memory = ask(None, name)
    xr.testing.assert_identical(explaind.open_result(finished(name)).load(), memory)
    for options in ({"chunks": None}, {"chunks": None, "consolidated": False}):
        plain = xr.open_zarr(finished(name), **options)
        for variable in memory.data_vars:
            np.testing.assert_array_equal(plain[variable].values, memory[variable].values)
        assert set(plain.coords) == set(memory.coords)


def test_large_chunks_are_cut_along_other_axes(tmp_path, monkeypatch):
    monkeypatch.setattr(appending, "_CHUNK", 200)
    stored = ask(tmp_path / "result.zarr", "windows", keep=("step", "parameter", "output"))
    sizes = [
        np.prod(a.chunks) * 8 for _, a in zarr.open_group(tmp_path / "result.zarr", mode="r").arrays() if a.ndim == 3
    ]
    assert sizes
    assert max(sizes) <= 200
    xr.testing.assert_identical(stored.load(), ask(None, "windows", keep=("step", "parameter", "output")))


def test_files_may_be_links_to_where_they_are_kept_if_that_is_said(tmp_path):
    path = tmp_path / "result.zarr"
    shutil.copytree(finished("steps"), tmp_path / "kept")
    for key in files(tmp_path / "kept"):
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).symlink_to(tmp_path / "kept" / key)
    with pytest.raises(StoreError, match="it is a symbolic link"):
        explaind.open_result(path)
    xr.testing.assert_identical(explaind.open_result(path, follow_links=True).load(), ask(None))


# ------------------------------------------------------------------ what is no result
def test_what_is_no_finished_result_is_told(tmp_path):
    with pytest.raises(StoreError, match=r"there is no result here[\s\S]*got: +nothing"):
        explaind.open_result(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"there is no result here[\s\S]*got: +an empty folder"):
        explaind.open_result(tmp_path)
    with pytest.raises(StoreError, match=r"no result of explaind[\s\S]*a recorded run[\s\S]*open_run opens"):
        explaind.open_result(run().path)
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "two", zarr_format=2, consolidated=False)
    xr.Dataset({"a": ("x", [1.0])}).to_zarr(tmp_path / "three", zarr_format=3, consolidated=False)
    with pytest.raises(
        StoreError, match=r"no result of explaind[\s\S]*zarr folder of format 2[\s\S]*open_zarr reads it"
    ):
        explaind.open_result(tmp_path / "two")
    with pytest.raises(StoreError, match=r"no result of explaind[\s\S]*zarr folder of something else"):
        explaind.open_result(tmp_path / "three")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="no result"):
        explaind.open_result(tmp_path / "file")


def test_another_version_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("explaind_core.results.result_record.VERSION", 2)
    ask(tmp_path / "result.zarr")
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"another version[\s\S]*expected: version 1[\s\S]*got: +version 2"):
        explaind.open_result(tmp_path / "result.zarr")


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A result of which the first two of five steps are written."""
    append, path = appending.ResultWriter.append, tmp_path / "result.zarr"

    def once(self, block, labels):
        if self.done:
            raise KeyboardInterrupt
        append(self, block, labels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(appending.ResultWriter, "append", once)
        ask(path)
    return path


def test_an_interrupted_result_says_so_and_its_finished_part_opens(interrupted):
    with pytest.raises(
        StoreError, match=r"unfinished[\s\S]*expected: 5 step entries[\s\S]*got: +2[\s\S]*same question"
    ):
        explaind.open_result(interrupted)
    part = explaind.open_result(interrupted, unfinished=True).load()
    whole = explaind.open_result(finished("steps")).load()
    xr.testing.assert_identical(part, whole.isel(step=slice(0, 2)))
    xr.testing.assert_identical(explaind.open_result(finished("steps"), unfinished=True).load(), whole)
    with pytest.raises(QuestionError, match="another question"):
        ask(interrupted, nodes=3)


def test_damage_of_what_is_finished_is_found_before_it_is_continued(interrupted):
    chunk = interrupted / "residual/c/0/0"
    chunk.write_bytes(DAMAGE["first bit"](chunk.read_bytes()))
    with pytest.raises(StoreError, match=r"residual/c/0/0"):
        ask(interrupted)
