"""Any one field of any stored JSON replaced and sealed again: the same answer, or an error of this library."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from explaind_core.errors import ExplaindError, printable
from support import any_field, old_versions

STORED = (*old_versions.RUNS, "forward.zarr", "adjoint.zarr")
#: What is a run's own to say: another value is another run, or another result, and no contradiction.
FREE = {"inputs", "targets", "weight", "gradient_factor", "dtype", "shape"}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(any_field.VALUES[:-1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@cache
def answer(name):
    return any_field.used(old_versions.DATA / "version2" / name)


def look(name, path, place, value):
    """What comes of a stored run or result with another value in one place of one file."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / name
        shutil.copytree(old_versions.DATA / "version2" / name, copied)
        file = copied / path
        any_field.say(file, any_field.replaced(any_field.said(file), place, value))
        begin, held = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found, words = any_field.used(copied), ""
        except ExplaindError as error:
            found, words = {}, str(error)
        assert printable(words) == words
        assert time.perf_counter() - begin < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 1 << 20  # kB
        if found and not FREE & set(map(str, place)):
            assert found == answer(name)


def chosen(data):
    """A stored run or result, one of its files, and a field of that."""
    name = data.draw(st.sampled_from(STORED))
    folder = old_versions.DATA / "version2" / name
    file = data.draw(st.sampled_from(any_field.files(folder)))
    place = data.draw(st.sampled_from(list(any_field.places(any_field.said(file)))))
    return name, file.relative_to(folder), place


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_field_of_anything(data):
    look(*chosen(data), data.draw(JSON | st.sampled_from(any_field.VALUES)))


@pytest.mark.slow
@given(st.data())
@settings(deadline=None, max_examples=2000, suppress_health_check=list(HealthCheck))
def test_any_field_of_anything_in_the_long_run(data):
    look(*chosen(data), data.draw(JSON | st.sampled_from(any_field.VALUES)))


@pytest.mark.parametrize("name", STORED)
def test_a_file_that_says_the_same_answers_the_same(name):
    """Sealing alone changes nothing: whatever is refused above is refused for what it says."""
    folder = old_versions.DATA / "version2" / name
    for file in any_field.files(folder):
        said = any_field.said(file)
        place = next(any_field.places(said))
        look(name, file.relative_to(folder), place, any_field.at(said, place))
    assert answer(name)


def test_every_kind_of_file_is_among_them():
    kinds = {
        file.parent.name + file.suffix
        for name in STORED
        for file in any_field.files(old_versions.DATA / "version2" / name)
    }
    assert {"batches.safetensors", "snapshots.safetensors", "000.safetensors", "steps.jsonl", "steps.json"} <= kinds


def test_a_parameter_that_left_its_group_and_kept_its_gradient():
    place = ("header", "groups", 1, "params", 1)
    look("joint", Path("steps/000/000002.safetensors"), place, any_field.MISSING)
