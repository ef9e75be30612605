"""Storage elsewhere of which any call fails, once, twice or for good: nothing is lost, and nothing is begun anew."""

from __future__ import annotations

from uuid import uuid4

import fsspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.errors import StoreError
from explaind_core.store import remote_files
from explaind_core.store.folder_contents import exists, is_folder, names_in, size_of, total_bytes
from explaind_core.store.locations import locate, read_bytes, remove, replace
from support.interrupted_training import STEPS, Training, held
from support.unreliable_storage import Unreliable

FOR_GOOD = 10**9


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(remote_files, "PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    Training().record(path)
    return held(path)


def go_on(address):
    Training().go_on(address)


def go_back(address):
    training = Training()
    explaind.open_run(address).restore(training.model, training.optimizer, 1)
    training.record(address, resume=1)


def begin(address):
    Training().record(address)


def overwrite(address):
    Training().record(address, overwrite=True)


@settings(deadline=None, max_examples=30, derandomize=True, report_multiple_bugs=False, phases=[Phase.generate])
@given(
    doing=st.sampled_from([begin, go_on, go_back, overwrite, held]),
    share=st.floats(0, 1, exclude_max=True),
    times=st.sampled_from([1, 2, 3, FOR_GOOD]),
    late=st.booleans(),
    there=st.sampled_from([0, 2]),
)
def test_whatever_call_fails_the_run_is_there(whole, doing, share, times, late, there):
    fresh = f"unreliable://runs/{uuid4().hex}"
    counted = f"unreliable://runs/{uuid4().hex}"
    for address in (fresh, counted):
        if there or doing is not begin:
            Training().record(address, until=2)
    with Unreliable.failing(None, 0) as calls:
        try:
            doing(counted)
        except StoreError as error:
            assert "something at this path already" in error.what  # noqa: PT017
        made = calls.made
    refused = doing is begin and there
    with Unreliable.failing(int(share * made), times, late=late):
        try:
            result = doing(fresh)
        except StoreError as error:
            assert refused or times == FOR_GOOD, error  # noqa: PT017
        else:
            assert not refused
            assert doing is not held or result[3] == [1, 2]
    if doing is begin and not there:
        try:
            begin(fresh)
        except StoreError:
            Training().go_on(fresh)
        found = held(fresh)
        assert found[:3] == whole[:3]
        told = len(whole[3]) - len(found[3])  # a number that could not be logged was told of, and the training ended
        assert set(found[3]) <= set(whole[3])
        assert told in ((0, 1) if times == FOR_GOOD else (0,))
    elif doing is overwrite:
        overwrite(fresh)
        assert held(fresh) == whole
    else:  # what was recorded before is never begun anew
        steps = len(explaind.open_run(fresh).steps)
        assert steps >= (1 if doing is go_back else 2)
        assert held(fresh)[0] == whole[0][: steps + 1]
        if doing is not held and not refused:
            Training().go_on(fresh)
            assert held(fresh)[:3] == whole[:3]


def in_folder(look):
    return lambda path: look(path.parent)


@pytest.mark.parametrize(("times", "found"), [(3, True), (4, False)])
def test_three_failures_in_a_row_are_borne_and_four_are_told(times, found):
    address = locate(f"unreliable://{uuid4().hex}/a")
    replace(address, [b"12"])
    for look in (
        exists,
        size_of,
        read_bytes,
        lambda path: names_in(path.parent),
        lambda path: total_bytes(path.parent),
    ):
        with Unreliable.failing(0, times):
            if found:
                assert look(address)
            else:
                with pytest.raises(StoreError, match=r"cannot be re[\s\S]*down \(ClientError, 4 attempts"):
                    look(address)


def test_what_is_not_there_is_known_at_once():
    address = locate(f"unreliable://{uuid4().hex}/a")
    with Unreliable.failing(None, 0) as calls:
        assert (exists(address), is_folder(address), size_of(address), names_in(address)) == (False, False, None, [])
        assert calls.made == 4
    with pytest.raises(FileNotFoundError):
        read_bytes(address)
    with pytest.raises(FileNotFoundError):
        remove(address)


def test_a_refusal_is_told_at_once(monkeypatch):
    address = locate(f"unreliable://{uuid4().hex}/a")
    asked = []

    def info(self, path, **_):
        asked.append(path)
        raise PermissionError("403")

    monkeypatch.setattr(Unreliable, "info", info)
    with pytest.raises(StoreError, match=r"cannot be read: 403 \(PermissionError\)[\s\S]*check the address"):
        explaind.open_run(str(address))
    assert len(asked) == 1


def test_a_folder_is_deleted_whole_or_said_not_to_be(monkeypatch):
    folder = locate(f"unreliable://{uuid4().hex}/[a]")  # a pattern to whoever expands names
    for name in ("b", "c/d", "c/e/f"):
        replace(folder / name, [b"1"])
    with Unreliable.failing(3, 1, late=True):
        remove(folder)
    assert not exists(folder)
    replace(folder / "b", [b"1"])
    monkeypatch.setattr(Unreliable, "rm_file", lambda *_: None)
    with pytest.raises(StoreError, match=r"cannot be reached to delete[\s\S]*still there"):
        remove(folder)


def test_a_piece_that_comes_short_is_asked_for_again(monkeypatch):
    address = locate(f"unreliable://{uuid4().hex}/a")
    replace(address, [bytes(range(100))])
    original, short = Unreliable.cat_file, [1]

    def cat_file(self, *args, **kwargs):
        return original(self, *args, **kwargs)[: 50 if short and short.pop() else None]

    monkeypatch.setattr(Unreliable, "cat_file", cat_file)
    assert read_bytes(address) == bytes(range(100))


def test_a_folder_here_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    def listdir(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.listdir", listdir)
    with pytest.raises(StoreError, match=r"nobody can tell what is there[\s\S]*Input/output error"):
        names_in(tmp_path)


def test_the_storage_is_the_one_that_is_meant():
    assert isinstance(fsspec.filesystem("unreliable"), Unreliable)
    assert STEPS > 2
