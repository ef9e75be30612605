"""CIFAR-10's files: read as they were written, refused when anything is wrong, and never run."""

from __future__ import annotations

import os
import pickle
import pickletools

import numpy as np
import pytest
import torch

from explaind_core.errors import StoreError
from explaind_studies import cifar
from explaind_studies.cifar import cifar2, read_batch
from support.cifar_files import array, dictionary, integer, listed, long, named, python_2, python_3, short, write_cifar

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
LABELS = [3, 5, 0, 9]


def test_the_files_made_here_are_what_python_and_numpy_read():
    """The standard reader agrees on what was written by hand, so these are files of that format."""
    written = python_2(IMAGES, LABELS)
    assert {op.name for op, _, _ in pickletools.genops(written)} >= {"BINSTRING", "SHORT_BINSTRING", "GLOBAL", "BUILD"}
    standard = pickle.loads(written, encoding="bytes")
    np.testing.assert_array_equal(standard[b"data"], IMAGES)
    assert standard[b"labels"] == LABELS
    assert list(standard) == [b"data", b"labels", b"batch_label", b"filenames"]


@pytest.mark.parametrize("write", [python_2, python_3])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_file_is_read_as_it_was_written(tmp_path, write, rows):
    (tmp_path / "file").write_bytes(write(IMAGES[:rows], LABELS[:rows]))
    images, labels = read_batch(tmp_path / "file")
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (rows, 3, 32, 32), np.int64)
    np.testing.assert_array_equal(images.reshape(rows, 3072), IMAGES[:rows])
    assert labels.tolist() == LABELS[:rows]


def test_an_array_that_was_written_column_by_column(tmp_path):
    fortran = np.asfortranarray(IMAGES)
    for written in (
        python_3(fortran, LABELS),
        python_2(IMAGES, LABELS, data=array(IMAGES.shape, IMAGES.T.tobytes(), fortran=True)),
    ):
        np.testing.assert_array_equal(pickle.loads(written, encoding="bytes")[b"data"], IMAGES)
        (tmp_path / "file").write_bytes(written)
        np.testing.assert_array_equal(read_batch(tmp_path / "file")[0].reshape(4, 3072), IMAGES)


def test_an_array_whose_type_says_its_byte_order_and_the_newest_name_in_numpy(tmp_path):
    data = array(IMAGES.shape, IMAGES.tobytes(), kind=b"|u1").replace(b"numpy.core", b"numpy._core")
    (tmp_path / "file").write_bytes(python_2(IMAGES, LABELS, data=data))
    np.testing.assert_array_equal(read_batch(tmp_path / "file")[0].reshape(4, 3072), IMAGES)


def call(module: str, name: str, *words: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(words) + b"tR"


HOSTILE = {
    "os.system": call("os", "system", short(b"touch RAN")),
    "posix.system": call("posix", "system", short(b"touch RAN")),
    "subprocess.check_output": call("subprocess", "check_output", listed([short(b"touch"), short(b"RAN")])),
    "__builtin__.eval": call("__builtin__", "eval", short(b"open('RAN', 'w')")),
    "__builtin__.getattr": call("__builtin__", "getattr", short(b"x"), short(b"join")),
    "numpy.core.multiarray.fromfile": call("numpy.core.multiarray", "fromfile", short(b"RAN")),
    "numpy.load": call("numpy", "load", short(b"RAN")),
    "copy_reg._reconstructor": call("copy_reg", "_reconstructor"),
    "_codecs.decode": call("_codecs", "decode", short(b"x")),
    "torch.load": call("torch", "load", short(b"RAN")),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("where", ["data", "labels", "extra", "instead"])
def test_a_file_that_names_code_is_refused_and_nothing_runs(tmp_path, monkeypatch, name, where):
    monkeypatch.chdir(tmp_path)
    content = python_2(IMAGES, LABELS, **{where: HOSTILE[name]})
    if where == "instead":
        content = b"\x80\x02" + HOSTILE[name] + b"."
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StoreError) as error:
        read_batch(tmp_path / "file")
    assert error.value.got == name
    assert error.value.where == tmp_path / "file"
    assert os.listdir(tmp_path) == ["file"]


def test_the_hostile_files_would_run_in_the_standard_reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(python_2(IMAGES, LABELS, extra=HOSTILE["os.system"]), encoding="bytes")
    assert os.listdir(tmp_path) == ["RAN"]


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(ios\nsystem\n",  # INST
        b"(" + named("os", "system") + b"o",  # OBJ
        b"\x8c\x02os\x8c\x06system\x93" + short(b"touch RAN") + b"\x85R",  # STACK_GLOBAL
        named("os", "system") + short(b"touch RAN") + b"\x85\x81",  # NEWOBJ
        short(b"x") + b"Q",  # BINPERSID
        b"\x82\x01",  # EXT1
    ],
)
def test_no_other_way_to_a_name_is_open(tmp_path, monkeypatch, opcodes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(python_2(IMAGES, LABELS, data=opcodes))
    with pytest.raises(StoreError):
        read_batch(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_an_array_of_objects_is_refused_before_anything_is_made_of_it(tmp_path):
    class Thing:
        def __reduce__(self):
            return (print, ("RAN",))

    things = np.empty((1, 3072), dtype=object)
    things[:] = [[Thing()] * 3072]
    (tmp_path / "file").write_bytes(pickle.dumps({b"data": things, b"labels": [3]}, protocol=2))
    with pytest.raises(StoreError, match=r"__builtin__\.print"):
        read_batch(tmp_path / "file")
    things[:] = 1
    (tmp_path / "file").write_bytes(pickle.dumps({b"data": things, b"labels": [3]}, protocol=2))
    with pytest.raises(StoreError, match="another type"):
        read_batch(tmp_path / "file")


def test_stand_ins_make_nothing_and_keep_nothing(tmp_path):
    """State set on a stand-in itself, not on what it made, would stay for the next file."""
    before = {kind: dict(vars(kind)) for kind in cifar._STAND_INS.values()}
    for target in (named("numpy", "dtype"), named("_codecs", "encode"), named("numpy", "ndarray")):
        (tmp_path / "file").write_bytes(python_2(IMAGES, LABELS, data=target + b"}" + short(b"k") + b"Nsb"))
        with pytest.raises(StoreError):
            read_batch(tmp_path / "file")
    assert before == {kind: dict(vars(kind)) for kind in cifar._STAND_INS.values()}


BYTES = IMAGES.tobytes()
WRONG = {
    "another type": {"data": array((1, 3072), BYTES, kind=b"f4")},
    "objects": {"data": array((4, 3072), BYTES, kind=b"O8")},
    "no dtype": {"data": array((4, 3072), BYTES).replace(named("numpy", "dtype"), named("numpy", "ndarray"))},
    "three axes": {"data": array((4, 3, 1024), BYTES)},
    "other pixels": {"data": array((3, 4096), BYTES)},
    "negative": {"data": array((-4, 3072), BYTES)},
    "too few bytes": {"data": array((4, 3072), BYTES[:-1])},
    "too many bytes": {"data": array((4, 3072), BYTES + b"x")},
    "a list": {"data": listed([integer(1)])},
    "a bare array": {"data": named("numpy.core.multiarray", "_reconstruct") + b")R"},
    "too few labels": {"labels": listed([integer(3)])},
    "labels in words": {"labels": listed([short(b"cat")] * 4)},
    "no list of labels": {"labels": integer(4)},
    "a label of 10": {"labels": listed([integer(i) for i in (3, 5, 10, 0)])},
    "a negative label": {"labels": listed([integer(i) for i in (3, 5, -1, 0)])},
    "a true label": {"labels": listed([integer(3), integer(5), b"\x88", integer(0)])},
    "too few names": {"filenames": listed([short(b"a")])},
    "bytes as UTF-8": {"extra": named("_codecs", "encode") + b"X\x01\0\0\0aX\x04\0\0\0utf8\x86R"},
    "many zero bytes": {"extra": named("__builtin__", "bytes") + integer(10) + b"\x85R"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_together_is_refused(tmp_path, changes):
    (tmp_path / "file").write_bytes(python_2(IMAGES, LABELS, **changes))
    with pytest.raises(StoreError) as error:
        read_batch(tmp_path / "file")
    assert error.value.where == tmp_path / "file"
    assert error.value.remedy


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02.", python_2(IMAGES, LABELS) + b"x", b"\x80\x02]."])
def test_files_that_hold_no_dictionary(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StoreError, match="not one of CIFAR-10"):
        read_batch(tmp_path / "file")


@pytest.mark.parametrize("key", [b"data", b"labels"])
def test_files_without_images_or_labels(tmp_path, key):
    entries = {b"data": array((4, 3072), BYTES), b"labels": listed([integer(i) for i in LABELS])}
    del entries[key]
    (tmp_path / "file").write_bytes(dictionary(entries))
    with pytest.raises(StoreError, match="something is missing"):
        read_batch(tmp_path / "file")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = python_2(IMAGES[:1], LABELS[:1])
    for end in [*range(0, 120), *range(120, len(whole), 97), *range(len(whole) - 120, len(whole))]:
        (tmp_path / "file").write_bytes(whole[:end])
        with pytest.raises(StoreError):
            read_batch(tmp_path / "file")


def test_absurd_lengths_are_refused(tmp_path):
    for opcodes in (b"T\xff\xff\xff\x7f", b"T\xff\xff\xff\xff", b"X\xff\xff\xff\x7f"):
        (tmp_path / "file").write_bytes(dictionary({b"data": opcodes, b"labels": long(b"x")}))
        with pytest.raises(StoreError):
            read_batch(tmp_path / "file")


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
@pytest.mark.parametrize("write", [python_2, python_3])
def test_cats_and_dogs_in_the_files_order(tmp_path, inner, write):
    written = write_cifar(tmp_path / inner, 20, write=write)
    task = cifar2(tmp_path)
    kept = [(i, t) for name in cifar.TRAIN_FILES for i, t in zip(*written[name], strict=True) if t in (3, 5)]
    assert task.train_targets.tolist() == [int(t == 5) for _, t in kept]
    assert (len(task.train_images), len(task.test_images), task.train_images.dtype) == (30, 6, torch.float32)
    raw = np.stack([i for i, _ in kept]).reshape(-1, 3, 32, 32) / 255
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3))
    np.testing.assert_allclose(task.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(task.std, std, rtol=1e-12)
    # float32: values up to 2 in units of 1e-7.
    expected = (raw - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(task.train_images, expected, rtol=0, atol=1e-6)
    tested = [(i, t) for i, t in zip(*written["test_batch"], strict=True) if t in (3, 5)]
    assert task.test_targets.tolist() == [int(t == 5) for _, t in tested]
    unseen = np.stack([i for i, _ in tested]).reshape(-1, 3, 32, 32) / 255
    expected = (unseen - mean[:, None, None]) / std[:, None, None]  # of the training images, not of its own
    np.testing.assert_allclose(task.test_images, expected, rtol=0, atol=1e-6)


def test_missing_files_are_named(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(StoreError, match="no data_batch_3"):
        cifar2(tmp_path)
    with pytest.raises(StoreError, match="no python files"):
        cifar2(tmp_path / "nowhere")


def test_a_broken_file_among_the_six_is_named(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4").write_bytes(b"")
    with pytest.raises(StoreError) as error:
        cifar2(tmp_path)
    assert error.value.where == tmp_path / "data_batch_4"


@pytest.mark.parametrize("label", [0, 3, 5])
def test_files_without_one_of_the_two(tmp_path, label):
    write_cifar(tmp_path)
    (tmp_path / "test_batch").write_bytes(python_2(IMAGES, [label] * 4))
    with pytest.raises(StoreError, match="cats and dogs"):
        cifar2(tmp_path)


def test_images_of_one_colour(tmp_path):
    write_cifar(tmp_path, write=lambda images, labels: python_2(np.full_like(images, 7), labels))
    with pytest.raises(StoreError, match="one colour"):
        cifar2(tmp_path)
