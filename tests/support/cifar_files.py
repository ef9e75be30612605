"""Files in the format of CIFAR-10's python version: as Python 2 wrote them, opcode by opcode, and as Python 3 does."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np

NAMES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


def short(text: bytes) -> bytes:
    """SHORT_BINSTRING: what Python 2 writes a str of fewer than 256 bytes as."""
    return b"U" + bytes([len(text)]) + text


def long(text: bytes) -> bytes:
    """BINSTRING: the same of any length."""
    return b"T" + struct.pack("<i", len(text)) + text


def integer(value: int) -> bytes:
    """BININT."""
    return b"J" + struct.pack("<i", value)


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def listed(items: list[bytes]) -> bytes:
    """EMPTY_LIST, MARK, the items, APPENDS."""
    return b"](" + b"".join(items) + b"e"


def array(shape: tuple[int, ...], content: bytes, *, kind: bytes = b"u1", fortran: bool = False) -> bytes:
    """An array of numpy, as it reduces itself."""
    made = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray")
    made += integer(0) + b"\x85" + short(b"b") + b"\x87R"
    dtype = named("numpy", "dtype") + short(kind) + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + short(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    sizes = b"(" + b"".join(map(integer, shape)) + b"t"
    return made + b"(" + integer(1) + sizes + dtype + (b"\x88" if fortran else b"\x89") + long(content) + b"tb"


def dictionary(items: dict[bytes, bytes]) -> bytes:
    """PROTO 2, EMPTY_DICT, MARK, keys and values, SETITEMS, STOP."""
    return b"\x80\x02}(" + b"".join(short(key) + value for key, value in items.items()) + b"u."


def python_2(images: np.ndarray, labels: list[int], /, **changes: bytes) -> bytes:
    """A whole file as Python 2 wrote it; ``changes`` replace the opcodes of an entry."""
    entries = {
        b"data": array(images.shape, images.tobytes()),
        b"labels": listed([integer(label) for label in labels]),
        b"batch_label": short(b"training batch 1 of 5"),
        b"filenames": listed([short(b"image_%d.png" % i) for i in range(len(labels))]),
    }
    return dictionary(entries | {key.encode(): value for key, value in changes.items()})


def python_3(images: np.ndarray, labels: list[int]) -> bytes:
    """A whole file as Python 3 and the installed numpy write it."""
    names = [b"image_%d.png" % i for i in range(len(labels))]
    return pickle.dumps({b"data": images, b"labels": labels, b"filenames": names, b"batch_label": b""}, protocol=2)


def write_cifar(folder: Path, rows: int = 30, *, write=python_2, seed: int = 0) -> dict[str, tuple[np.ndarray, list]]:
    """Six files of ``rows`` images, three cats and dogs in ten; what was written, by name."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in NAMES:
        labels = [[3, 5, 0, 5, 9, 1, 2, 4, 6, 8][i % 10] for i in range(rows)]
        images = generator.integers(0, 256, (rows, 3072), dtype=np.uint8)
        (folder / name).write_bytes(write(images, labels))
        written[name] = images, labels
    return written
