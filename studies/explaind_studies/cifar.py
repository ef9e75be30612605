"""CIFAR-10's python files, read without running what is in them, and the paper's two classes of it: cats and dogs.

The files are pickles, and unpickling runs whatever a file names. Here a file can name five things only, and gets
stand-ins for them that note what they are given. The array is then made from the noted shape, type and bytes once
these fit each other.
"""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from explaind_core.errors import StoreError

__all__ = ["CAT", "DOG", "TEST_FILE", "TRAIN_FILES", "Cifar2", "cifar2", "read_batch"]

TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILE = "test_batch"
#: The folder that the archive unpacks to.
_UNPACKED = "cifar-10-batches-py"
#: The classes of the paper, by their label.
CAT, DOG = 3, 5
_CLASSES, _PIXELS = 10, 3 * 32 * 32
_REMEDY = "unpack cifar-10-python.tar.gz again"


class _Noted:
    """What a file wanted to be called: the arguments, and the state that it wanted to be set."""

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Any:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Noted):
    """For ``numpy.core.multiarray._reconstruct``."""

    __slots__ = ()


class _ArrayType(_Noted):
    """For ``numpy.ndarray``."""

    __slots__ = ()


class _Type(_Noted):
    """For ``numpy.dtype``."""

    __slots__ = ()


class _Encoded(_Noted):
    """For ``_codecs.encode``, by which Python 3 writes bytes in protocol 2: only of Latin-1, and nothing else."""

    __slots__ = ()

    def __new__(cls, *arguments: Any) -> Any:
        if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] != "latin1":
            raise ValueError("bytes that are not written as Latin-1")
        return arguments[0].encode("latin-1")


class _Empty(_Noted):
    """For ``bytes()``, by which Python 3 writes empty ones in protocol 2."""

    __slots__ = ()

    def __new__(cls, *arguments: Any) -> Any:
        if arguments:
            raise ValueError("bytes made of something")
        return b""


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Encoded,
    ("__builtin__", "bytes"): _Empty,
}


class _Reader(pickle.Unpickler):
    """Knows the stand-ins and nothing else."""

    def __init__(self, content: io.BytesIO, path: Path) -> None:
        super().__init__(content, encoding="bytes")
        self.path = path

    def find_class(self, module: str, name: str, /) -> type:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise StoreError(
                f"a data file names {module}.{name}, which no file of CIFAR-10 does",
                where=self.path,
                expected="an array of bytes, lists and words",
                got=f"{module}.{name}",
                remedy="do not trust this file; " + _REMEDY,
            ) from None


def _broken(path: Path, what: str, **details: Any) -> StoreError:
    return StoreError(f"a data file is not one of CIFAR-10: {what}", where=path, remedy=_REMEDY, **details)


def _content(path: Path) -> dict[Any, Any]:
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise StoreError(
            "a data file cannot be read",
            where=path,
            got=str(error),
            remedy="name the folder of CIFAR-10's python files",
        ) from error
    try:
        found = _Reader(content, path).load()
    except StoreError:
        raise
    except Exception as error:  # what a damaged pickle raises is anything: IndexError, AttributeError, MemoryError ...
        raise _broken(path, "it cannot be read", got=f"{type(error).__name__}: {error}") from error
    if type(found) is not dict or content.read(1):
        raise _broken(path, "it does not hold one dictionary", got=type(found).__name__)
    return found


def _array(value: Any, path: Path) -> npt.NDArray[np.uint8]:
    """The array of bytes that was noted, if what was noted fits together."""
    if type(value) is not _Array or type(value.state) is not tuple or len(value.state) != 5:
        raise _broken(path, "the images are no array", got=type(value).__name__)
    _, shape, kind, fortran, content = value.state
    if type(kind) is not _Type or not kind.arguments or kind.arguments[0] not in (b"u1", b"|u1", "u1", "|u1"):
        named = kind.arguments[:1] if type(kind) is _Type else type(kind).__name__
        raise _broken(path, "the images are of another type", expected="u1", got=named)
    if type(shape) is not tuple or len(shape) != 2 or any(type(n) is not int for n in shape) or shape[1] != _PIXELS:
        raise _broken(path, "the images have another shape", expected=f"(n, {_PIXELS})", got=shape)
    if type(content) is not bytes or shape[0] < 0 or len(content) != shape[0] * shape[1]:
        size = len(content) if type(content) is bytes else type(content).__name__
        raise _broken(path, "the images' bytes do not fit their shape", expected=shape[0] * shape[1], got=size)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


def read_batch(path: str | os.PathLike[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """One of the six files: images uint8 ``[n, 3, 32, 32]``, labels int64 ``[n]`` in 0..9.

    Whatever stands in the file, none of it is run.

    Raises:
        StoreError: the file is missing, damaged, or holds something else; it names the file.
    """
    path = Path(path)
    found = _content(path)
    if missing := [key for key in (b"data", b"labels") if key not in found]:
        raise _broken(path, "something is missing", expected="b'data' and b'labels'", got=f"no {missing[0]!r}")
    images, labels = _array(found[b"data"], path), found[b"labels"]
    for key in (b"labels", b"filenames"):
        listed = found.get(key, labels)
        if type(listed) is not list or len(listed) != len(images):
            got = len(listed) if type(listed) is list else type(listed).__name__
            raise _broken(path, f"not one of {key!r} for every image", expected=len(images), got=got)
    if wrong := [label for label in labels if type(label) is not int or not 0 <= label < _CLASSES]:
        raise _broken(path, "a label is no class", expected=f"0..{_CLASSES - 1}", got=wrong[0])
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


@dataclass(frozen=True)
class Cifar2:
    """The cats (0) and dogs (1) of CIFAR-10, in the files' order.

    Shapes: ``*_images`` float32 ``[n, 3, 32, 32]``, ``*_targets`` int64 ``[n]``. ``mean`` and ``std`` are float64
    ``[3]``: of the training images, 0..1, by channel.
    """

    train_images: Tensor
    train_targets: Tensor
    test_images: Tensor
    test_targets: Tensor
    mean: Tensor
    std: Tensor


def cifar2(folder: str | os.PathLike[str]) -> Cifar2:
    """Cats and dogs: 10,000 training and 2,000 test images, less their mean over the training images, over their std.

    Args:
        folder: with the six python files, or with their folder ``cifar-10-batches-py``.

    Raises:
        StoreError: a file is missing, damaged, or holds something else; there are no cats and dogs, or they are
            all of one colour.

    Example:
        >>> cifar2("/nowhere")
        Traceback (most recent call last):
        explaind_core.errors.StoreError: there are no python files of CIFAR-10
          where:    /nowhere
        ...
    """
    folder = Path(folder)
    names = (*TRAIN_FILES, TEST_FILE)
    places = (folder, folder / _UNPACKED)
    place = max(places, key=lambda p: sum((p / name).is_file() for name in names))
    if missing := [name for name in names if not (place / name).is_file()]:
        raise StoreError(
            "there are no python files of CIFAR-10" if len(missing) == len(names) else "files of CIFAR-10 are missing",
            where=folder,
            expected=", ".join(names),
            got="no " + ", ".join(missing),
            remedy="unpack cifar-10-python.tar.gz there",
        )
    train = [_cats_and_dogs(*read_batch(place / name)) for name in TRAIN_FILES]
    test_images, test_targets = _cats_and_dogs(*read_batch(place / TEST_FILE))
    images, targets = np.concatenate([i for i, _ in train]), np.concatenate([t for _, t in train])
    for part, found in (("training", targets), ("test", test_targets)):
        if set(found.tolist()) != {0, 1}:
            raise StoreError(f"the {part} files do not hold both cats and dogs", where=place, remedy=_REMEDY)
    # Sums of whole numbers, exact in int64 and free of a float64 copy of all images.
    pixels = images.shape[0] * 32 * 32
    channels = images.transpose(1, 0, 2, 3).reshape(3, -1)
    mean = channels.sum(1, dtype=np.int64) / pixels
    square = np.array([np.square(c.astype(np.int64)).sum() for c in channels]) / pixels
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if not (std > 0).all():
        raise StoreError("the training images are all of one colour", where=place, remedy=_REMEDY)

    def normalised(values: npt.NDArray[np.uint8]) -> Tensor:
        scaled = (values - mean[:, None, None].astype(np.float32)) / std[:, None, None].astype(np.float32)
        return torch.from_numpy(scaled.astype(np.float32))

    return Cifar2(
        normalised(images),
        torch.from_numpy(targets),
        normalised(test_images),
        torch.from_numpy(test_targets),
        torch.from_numpy(mean / 255),
        torch.from_numpy(std / 255),
    )


def _cats_and_dogs(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    wanted = (labels == CAT) | (labels == DOG)
    return images[wanted], (labels[wanted] == DOG).astype(np.int64)
