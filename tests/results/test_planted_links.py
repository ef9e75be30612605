"""Links, pipes and devices that somebody planted where a result is written or read: refused, or passed by."""

from __future__ import annotations

import filelock
import pytest
import xarray as xr

import explaind_core as explaind
from explaind_core import errors
from explaind_core.results import result_record
from explaind_core.results.zarr_folder import check_plain_folder
from support.asked_results import ask
from support.planted import ANY, SECRET, device, hard, pipe, symbolic

pytestmark = pytest.mark.timeout(60)


# ------------------------------------------------------------------ results, written
def place(folder, name):
    """A path in a result; ``a chunk`` is one of the kernel's."""
    if name != "a chunk":
        return folder / name
    return min(path for path in (folder / "kernel" / "c").rglob("*") if path.is_file())


def test_a_file_of_the_users_that_is_called_like_a_lock_is_kept(tmp_path):
    for ending in (".lock", ".explaind-writing"):
        (tmp_path / f"uv{ending}").write_text("version = 1\n")
    with pytest.raises(errors.StoreError, match="something else than a lock lies"):
        ask(tmp_path / "uv")
    (tmp_path / "uv.explaind-writing").unlink()
    with filelock.FileLock(tmp_path / "uv.lock"):  # somebody else's lock, of something else
        ask(tmp_path / "uv")
    ask(tmp_path / "uv")
    assert (tmp_path / "uv.lock").read_text() == "version = 1\n"


@ANY
@pytest.mark.parametrize("name", ["zarr.json.partial", "zarr.partial", "result.zarr.explaind-writing"])
def test_a_new_result_writes_through_nothing_that_was_planted(tmp_path, victim, plant, name):
    folder = tmp_path / "result.zarr"
    folder.mkdir()
    plant(tmp_path / name if name.startswith("result") else folder / name, victim)
    if name.startswith("result"):
        with pytest.raises(errors.StoreError, match="something else than a lock lies"):
            ask(folder)
    else:
        xr.testing.assert_identical(ask(folder).load(), ask(None))
    assert victim.read_bytes() == SECRET


@ANY
@pytest.mark.parametrize("name", ["zarr.json", "kernel", "kernel/zarr.json", "a chunk", "kernel/c/more"])
def test_a_resumed_result_writes_through_nothing_that_was_planted(tmp_path, victim, plant, name, monkeypatch):
    from explaind_core.results import result_writer

    folder = tmp_path / "result.zarr"
    monkeypatch.setattr(result_writer, "BLOCK", 2)
    append = result_writer.ResultWriter.append

    def once(self, block, labels):
        if self.done:
            raise KeyboardInterrupt
        append(self, block, labels)

    with monkeypatch.context() as patch:
        patch.setattr(result_writer.ResultWriter, "append", once)
        with pytest.raises(KeyboardInterrupt):
            ask(folder)
    path = place(folder, name)
    if path.is_dir():
        if plant is hard:
            pytest.skip("there are no hard links to folders")
        path.rename(tmp_path / "aside")
        victim = tmp_path / "aside" / "zarr.json"
    elif path.exists():
        victim.write_bytes(path.read_bytes())
        path.unlink()
    content = victim.read_bytes()
    plant(path, victim.parent if name == "kernel" else victim)
    if plant is hard:
        xr.testing.assert_identical(ask(folder).load(), ask(None))
    else:
        with pytest.raises((errors.StoreError, errors.QuestionError), match=r"symbolic link|no plain file"):
            ask(folder)
    assert victim.read_bytes() == content


# ------------------------------------------------------------------ results, read
def finished(tmp_path):
    ask(tmp_path / "result.zarr")
    return tmp_path / "result.zarr"


@pytest.mark.parametrize("plant", [symbolic, pipe, device])
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["zarr.json", "kernel/zarr.json", "a chunk", "step/c/0", "more"])
def test_a_result_is_read_from_its_own_files_alone(tmp_path, plant, name, check):
    folder, aside = finished(tmp_path), tmp_path / "aside"
    path = place(folder, name)
    if path.exists():
        path.rename(aside)
    plant(path, aside)
    with pytest.raises(errors.StoreError, match=r"symbolic link|no plain file"):
        explaind.open_result(folder, check=check)
    if plant is not symbolic:  # whoever wants links followed gets no pipe, and no device
        with pytest.raises(errors.StoreError, match=r"symbolic link|no plain file"):
            explaind.open_result(folder, check=check, follow_links=True)


def test_a_folder_of_a_result_is_no_link_even_where_links_are_followed(tmp_path):
    folder = finished(tmp_path)
    (folder / "kernel").rename(tmp_path / "aside")
    (folder / "kernel").symlink_to(tmp_path / "aside")
    for follow in (False, True):
        with pytest.raises(errors.StoreError, match="symbolic link"):
            explaind.open_result(folder, follow_links=follow)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../victim", "kernel/../../victim", "C:\\x", "a\x00b", "", "kernel//c"]
)
@pytest.mark.parametrize("where", ["files", "arrays"])
def test_a_result_names_nothing_outside_of_its_folder(tmp_path, victim, name, where):
    folder = finished(tmp_path)
    known = result_record.read_record(folder)
    changed = {**getattr(known, where), name: result_record.checksum(SECRET) if where == "files" else {}}
    record = result_record.Record(**{**vars(known), where: changed})
    (folder / "zarr.json").write_bytes(record.encoded("0"))
    with pytest.raises(
        errors.StoreError,
        match="does not name the metadata of each array" if where == "files" else "an array is called",
    ):
        explaind.open_result(folder)


def test_a_result_that_is_itself_reached_by_a_link_is_read(tmp_path):
    finished(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "result.zarr")
    assert explaind.open_result(tmp_path / "link").identical(explaind.open_result(tmp_path / "result.zarr"))
    check_plain_folder(tmp_path / "nowhere")
