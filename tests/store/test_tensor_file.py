"""One file of tensors: everything comes back bit by bit, and nothing that was changed passes."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explaind_core.store.compression import pack, unpack
from explaind_core.store.tensor_file import DTYPES, Damage, encode, read_contents, read_entry


def written(header, tensors, **options):
    parts = encode(header, tensors, **{"run": "r", "file": "f", "compress": True} | options)
    return b"".join(bytes(part) for part in parts)


def read(data):
    file = io.BytesIO(data)
    contents = read_contents(file, len(data))
    return contents, {name: read_entry(file, name, entry) for name, entry in contents.entries.items()}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@st.composite
def any_tensor(draw):
    """Any dtype and shape, filled with any bits: all NaNs, -0.0, denormals; constant ones shrink."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 12), max_size=3) | st.just([40, 30]))
    size = math.prod(shape) * dtype.itemsize
    seed, kind = draw(st.integers(0, 99)), draw(st.sampled_from(["random", "constant", "few"]))
    rng = np.random.default_rng(seed)
    high = {"random": 256, "constant": 1, "few": 3}[kind] if dtype != torch.bool else 2
    data = torch.from_numpy(rng.integers(0, high, size, dtype=np.uint8) + (seed if kind == "constant" else 0))
    return (data.bool() if dtype == torch.bool else data.view(dtype) if size else torch.empty(0, dtype=dtype)).reshape(
        shape
    )


@given(
    tensors=st.dictionaries(st.text(max_size=5), any_tensor(), max_size=4),
    header=st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
    compress=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_every_bit_comes_back(tensors, header, compress):
    data = written(header, tensors, compress=compress)
    contents, found = read(data)
    assert contents.header == header
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in tensors.items()}
    assert len({t.untyped_storage().data_ptr() for t in found.values() if t.numel()}) == sum(
        1 for t in found.values() if t.numel()
    )


def test_views_with_strides_and_conjugates_come_back():
    base = torch.randn(6, 8, dtype=torch.complex128)
    tensors = {"t": base.T, "step": base[::2, 1:], "conj": base.conj(), "imag": base.conj().imag}
    _, found = read(written({}, tensors))
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_any_reader_of_safetensors_opens_it():
    tensors = {
        "random": torch.rand(64, dtype=torch.float64),
        "zeros": torch.zeros(500),
        "half": torch.ones(3).bfloat16(),
    }
    data = written({"a": 1}, tensors)
    found = safetensors.torch.load(data)
    assert torch.equal(found["half"], tensors["half"])
    assert found["zeros"].dtype == torch.uint8  # packed
    assert len(found["zeros"]) < 100
    uncompressed = safetensors.torch.load(written({"a": 1}, tensors, compress=False))
    assert all(torch.equal(uncompressed[n], t) for n, t in tensors.items())


def test_raw_tensors_lie_aligned():
    tensors = {"b": torch.ones(3, dtype=torch.bool), "x": torch.rand(5, dtype=torch.float64), "z": torch.zeros(500)}
    data = written({}, tensors)
    contents, _ = read(data)
    for entry in contents.entries.values():
        assert entry.codec == "blosc" or entry.begin % entry.dtype.itemsize == 0


SMALL = {"x": torch.arange(40.0), "z": torch.zeros(300)}
SMALL_FILE = written({"lr": 0.1}, SMALL)


@pytest.mark.parametrize("at", range(0, len(SMALL_FILE)))
def test_no_byte_can_be_changed(at):
    data = bytearray(SMALL_FILE)
    data[at] ^= 1 << at % 8
    with pytest.raises(Damage):
        read(bytes(data))


@given(cut=st.integers(0, len(SMALL_FILE) - 1))
@settings(deadline=None)
def test_no_part_passes_for_the_whole(cut):
    with pytest.raises(Damage, match="truncated"):
        read(SMALL_FILE[:cut])


@pytest.mark.parametrize("more", [1, 8, 4096])
def test_bytes_behind_the_last_tensor_are_noticed(more):
    with pytest.raises(Damage, match="truncated") as found:
        read(SMALL_FILE + bytes(more))
    assert (found.value.expected, found.value.got) == (f"{len(SMALL_FILE)} bytes", f"{len(SMALL_FILE) + more} bytes")


def test_one_damaged_tensor_leaves_the_others_readable():
    contents, _ = read(SMALL_FILE)
    data = bytearray(SMALL_FILE)
    data[contents.entries["z"].begin + 20] ^= 1
    file = io.BytesIO(data)
    again = read_contents(file, len(data))
    assert torch.equal(read_entry(file, "x", again.entries["x"]), SMALL["x"])
    with pytest.raises(Damage, match="'z' does not have the checksum"):
        read_entry(file, "z", again.entries["z"])


@pytest.mark.parametrize("size", [0, 255, 256, 4096])
def test_lengths_are_compared_before_memory_is_asked_for(size):
    packed = pack(np.zeros(4096, dtype=np.uint8), 4)
    if size == 4096:
        assert not unpack(memoryview(packed), size).any()
    else:
        with pytest.raises(ValueError, match="4096 bytes where"):
            unpack(memoryview(packed), size)


def test_large_tensors_are_packed_in_chunks(monkeypatch):
    from explaind_core.store import compression

    monkeypatch.setattr(compression, "_CHUNK", 1 << 12)
    data = np.arange(5000, dtype=np.int64).view(np.uint8)
    packed = compression.pack(data, 8)
    assert np.array_equal(compression.unpack(memoryview(packed), data.nbytes), data)
    with pytest.raises(ValueError, match="no sequence of chunks"):
        compression.unpack(memoryview(packed[:-1]), data.nbytes)


def test_what_is_no_plain_tensor_is_refused_by_name():
    with pytest.raises(Damage, match="cannot hold the tensor 's'"):
        written({}, {"s": torch.eye(3).to_sparse()})
