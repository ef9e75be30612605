"""One digest over a stored folder."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest
from typer.testing import CliRunner

import explaind_core as explaind
from explaind_core.cli.app import app
from explaind_core.errors import StoreError
from explaind_core.store import UNFINISHED, locate
from explaind_core.store.run_layout import LOCK_NAME
from explaind_core.testing import record_example


@pytest.fixture
def run(tmp_path):
    example = record_example(steps=3)  # its files go with it
    return shutil.copytree(example.path, tmp_path / "run")


def expected(folder):
    """As ``find . -type f | sort | xargs sha256sum | sha256sum`` does it."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != LOCK_NAME)
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_it_is_that_of_sha256sum(run):
    assert explaind.digest(run) == expected(run)


def test_a_copy_has_the_same_wherever_it_lies(run, tmp_path):
    elsewhere = locate("memory://test_digest/run")
    for path in run.rglob("*"):
        if path.is_file():
            target = elsewhere / path.relative_to(run).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert (
        explaind.digest(shutil.copytree(run, tmp_path / "copy")) == explaind.digest(elsewhere) == explaind.digest(run)
    )


@pytest.mark.parametrize("change", ["a byte", "a name", "a file more", "a file less"])
def test_any_change_shows(run, change):
    before = explaind.digest(run)
    step = sorted(run.rglob("*"))[-1]
    if change == "a byte":
        content = bytearray(step.read_bytes())
        content[-1] ^= 1
        step.write_bytes(content)
    elif change == "a name":
        step.rename(step.with_name("other"))
    elif change == "a file more":
        (run / "steps" / "more").write_bytes(b"")
    else:
        step.unlink()
    assert explaind.digest(run) != before


def test_what_is_being_written_does_not_count(run):
    before = explaind.digest(run)
    (run / LOCK_NAME).write_text("1")
    (run / f"manifest.json{UNFINISHED}").write_text("1")
    assert explaind.digest(run) == before


def test_links_and_nothing_are_refused(run, tmp_path):
    os.symlink("/etc/hostname", run / "steps" / "planted")
    with pytest.raises(StoreError, match="symbolic link"):
        explaind.digest(run)
    for folder in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(StoreError, match="nothing to know again"):
            explaind.digest(folder)
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_the_command_compares(run):
    found = explaind.digest(run)
    printed = CliRunner().invoke(app, ["digest", str(run)])
    assert printed.exit_code == 0
    assert printed.output.split() == [found, str(run)]
    assert CliRunner().invoke(app, ["digest", str(run), "--expect", found.upper()]).exit_code == 0
    assert CliRunner().invoke(app, ["digest", str(run), "--expect", "0" * 64]).exit_code == 1
