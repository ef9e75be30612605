"""Results that were written to do harm, with checksums that are right: refused from their JSON, and nothing is run."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import tracemalloc

import google_crc32c
import numpy as np
import pytest
import xarray as xr
import zarr
from numcodecs.zstd import Zstd

import explaind_core as explaind
from explaind_core.errors import StoreError
from explaind_core.results.array_metadata import LARGEST_CHUNK
from explaind_core.results.chunk_file import frame_fault, text_fault
from support.asked_results import ask, finished
from support.hostile_files import write_result, write_root


@pytest.fixture
def result(tmp_path):
    shutil.copytree(finished("steps"), tmp_path / "result.zarr")
    return tmp_path / "result.zarr"


def document(path):
    return json.loads((path / "zarr.json").read_text())


def refused(path, match, **options):
    with pytest.raises(StoreError, match=match):
        explaind.open_result(path, **options)
    with pytest.raises(StoreError, match=match):
        ask(path)


def test_the_helper_writes_results_that_open(result):
    write_result(result, document(result))
    xr.testing.assert_identical(explaind.open_result(result).load(), ask(None))


# ------------------------------------------------------------------ code
class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("check", [True, False])
def test_an_array_of_format_2_is_never_unpickled(result, tmp_path, check):
    trace = tmp_path / "trace"
    changed = document(result)
    changed["consolidated_metadata"]["metadata"]["kernel"] = {
        "zarr_format": 2, "node_type": "array", "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None,
        "order": "C", "compressor": None, "filters": [{"id": "pickle", "protocol": 5}], "dimension_separator": ".",
        "attributes": {},
    }  # fmt: skip
    write_result(result, changed)
    for name in ("0", "c/0", "c/0/0/0"):
        chunk = result / "kernel" / name
        if not chunk.is_dir():
            chunk.parent.mkdir(parents=True, exist_ok=True)
            chunk.write_bytes(pickle.dumps(Bomb(trace)))
    refused(result, "kernel.data_type is None where one of", check=check)
    assert not trace.exists()


@pytest.mark.parametrize("name", [".zarray", "kernel/.zarray", ".zgroup", "layer/.zattrs", "kernel/c/.zmetadata"])
def test_metadata_of_format_2_are_refused_anywhere(result, name):
    (result / name).write_text("{}")
    refused(result, r"metadata of zarr's format 2[\s\S]*got: +\.z")


PICKLE = {"name": "numcodecs.pickle", "configuration": {"id": "pickle"}}
CRC = {"name": "crc32c"}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("codecs",), []),
        (("codecs",), [PICKLE]),
        (("codecs", 0), PICKLE),
        (("codecs", 0), {"name": "vlen-bytes"}),
        (("codecs", 0), {"name": "sharding_indexed", "configuration": {"chunk_shape": [1]}}),
        (("codecs", 1), CRC),
        (("codecs", 1, "configuration", "level"), "x"),
        (("codecs", 2), {"name": "crc32c", "configuration": {"more": 1}}),
        (("codecs", 2, "more"), 1),
        (("data_type",), "variable_length_bytes"),
        (("data_type",), "|O"),
        (("data_type",), {"name": "fixed_length_utf32", "configuration": {"length_bytes": 4}}),
        (("data_type",), "complex128"),
        (("zarr_format",), 2),
        (("zarr_format",), True),
        (("node_type",), "group"),
        (("storage_transformers",), [{"name": "anything"}]),
        (("attributes",), {"scale_factor": 2.0}),
        (("chunk_key_encoding",), {"name": "v2", "configuration": {"separator": "."}}),
        (("fill_value",), "Infinity"),
        (("extension",), {"must_understand": False}),
        (("dimension_names",), ["step", "step", "layer"]),
        (("dimension_names",), ["step", None, "layer"]),
        (("dimension_names", 0), 1),
        (("shape",), [-1, 2, 3]),
        (("shape",), [5, 2]),
        (("shape", 0), 6),
        (("shape", 1), 1 << 62),
        (("chunk_grid", "configuration", "chunk_shape", 0), 0),
        (("chunk_grid", "configuration", "chunk_shape", 0), LARGEST_CHUNK),
        (("chunk_grid", "name"), "rectangular"),
    ],
)
def test_an_array_that_is_never_written(result, place, value):
    changed = document(result)
    target = changed["consolidated_metadata"]["metadata"]["kernel"]
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    write_result(result, changed)
    refused(result, "metadata are not as they must be: kernel")


@pytest.mark.parametrize("name", ["../outside", "a/b", "", ".hidden", "kernel\n"])
def test_an_array_that_lies_elsewhere(result, name):
    changed = document(result)
    arrays, files = changed["consolidated_metadata"]["metadata"], changed["attributes"]["explaind"]["files"]
    arrays[name], files[f"{name}/zarr.json"] = arrays["kernel"], files["kernel/zarr.json"]
    write_root(result, changed)
    refused(result, "an array is called")


def test_the_metadata_of_an_array_and_of_the_whole_must_agree(result):
    changed = document(result)
    changed["consolidated_metadata"]["metadata"]["kernel"]["fill_value"] = 0.0
    write_root(result, changed)
    refused(result, "says something else than zarr.json says of that array")
    changed = document(result)
    del changed["attributes"]["explaind"]["files"]["kernel/zarr.json"]
    write_root(result, changed)
    refused(result, "files does not name the metadata of each array")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("attributes", "explaind", "done"), 6),
        (("attributes", "explaind", "done"), -1),
        (("attributes", "explaind", "total"), 1 << 61),
        (("attributes", "explaind", "total"), True),
        (("attributes", "explaind", "axis"), "nothing"),
        (("attributes", "explaind", "axis"), []),
        (("attributes", "explaind", "files"), []),
        (("attributes", "explaind", "more"), 1),
        (("attributes", "coordinates"), 7),
        (("attributes", "coordinates"), "nowhere"),
        (("attributes", "first_step"), "1"),
        (("attributes", "gradient_factor"), None),
        (("attributes", "tolerance"), [0.1]),
        (("attributes", "strategy"), None),
        (("attributes", "note"), 10**400),
        (("consolidated_metadata", "kind"), "elsewhere"),
        (("consolidated_metadata", "metadata", "kernel"), None),
        (("consolidated_metadata",), None),
        (("zarr_format",), 2),
        (("node_type",), "array"),
    ],
)
def test_a_record_of_something_else(result, place, value):
    changed = document(result)
    target = changed
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    write_root(result, changed)
    with pytest.raises(StoreError, match=r"metadata are not as they must be|is missing"):
        explaind.open_result(result)


@pytest.mark.parametrize("content", ["[" * 50_000, "{}", "[]", "null", '{"attributes": {"explaind": []}}', "\x00"])
def test_json_of_something_else(result, content):
    (result / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="result"):
        explaind.open_result(result)


# ------------------------------------------------------------------ sizes
def small_and_quick(work):
    """What is raised, within two seconds and some MB."""
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(StoreError) as error:
            work()
        assert time.perf_counter() - begin < 2
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    return str(error.value)


def test_chunks_are_counted_by_the_files_that_are_there(result):
    changed = document(result)
    arrays = changed["consolidated_metadata"]["metadata"]
    arrays["huge"] = {**arrays["initial"], "shape": [1 << 40], "dimension_names": ["huge"]}
    arrays["huge"]["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [1]}}
    (result / "huge/c").mkdir(parents=True)
    write_result(result, changed)
    assert "huge/c/0" in small_and_quick(lambda: explaind.open_result(result))


def compressed(content):
    frame = Zstd().encode(content)
    return frame + google_crc32c.value(frame).to_bytes(4, "little")


def test_a_chunk_that_blows_up_is_not_unpacked(result):
    chunk = next(p for p in sorted((result / "kernel/c").rglob("*")) if p.is_file())
    before, bomb = chunk.read_bytes(), Zstd().encode(bytes(1 << 27))
    for content in (bomb * 100 + bytes(4), compressed(bytes(1 << 28))):
        chunk.write_bytes(content)
        assert chunk.relative_to(result).as_posix() in small_and_quick(lambda: explaind.open_result(result))
    chunk.write_bytes(before)
    label = result / "layer/c/0"
    label.write_bytes(compressed(b"\xff\xff\xff\x7f"))
    for check in (True, False):  # labels are read in any case
        found = small_and_quick(lambda check=check: explaind.open_result(result, check=check))
        assert "layer/c/0" in found
        assert "2147483647 texts where" in found


def test_a_chunk_is_as_large_as_its_array_says():
    chunk = Zstd().encode(b"abc" * 100) + bytes(4)
    assert frame_fault(chunk, expected=300, most=0) is None
    assert frame_fault(chunk, expected=None, most=300) is None
    assert "300 bytes where 301 were" in frame_fault(chunk, expected=301, most=0)
    assert "300 bytes where at most 299 were" in frame_fault(chunk, expected=None, most=299)
    for size in (0, 1, 255, 256, 257, 65791, 65792, 1 << 20):
        for content in (bytes(size), np.random.default_rng(0).bytes(size)):
            for codec in (Zstd(), Zstd(checksum=True), Zstd(level=9)):
                assert frame_fault(codec.encode(content) + bytes(4), expected=size, most=0) is None


def test_a_chunk_is_one_whole_frame():
    chunk = Zstd().encode(b"abc" * 100)
    for bad in (b"", chunk, chunk + bytes(3), chunk + bytes(5), chunk + chunk + bytes(4), chunk[:-1] + bytes(4)):
        assert "no single frame" in frame_fault(bad, expected=300, most=0)


def test_texts_are_as_many_as_the_chunk_says():
    chunk = Zstd().encode((2).to_bytes(4, "little") + bytes(8)) + bytes(4)
    assert text_fault(chunk, 2) is None
    assert text_fault(chunk, 3) == "it holds 2 texts where 3 were expected"
    assert "0 texts" in text_fault(Zstd().encode(b"\x00") + bytes(4), 0)
    assert text_fault(b"nothing" + bytes(4), 1)


def test_the_largest_chunk_is_read_and_one_more_is_not(result):
    changed = document(result)
    array = changed["consolidated_metadata"]["metadata"]["kernel"]
    for size, words in ((LARGEST_CHUNK // 8, "unpacks to"), (LARGEST_CHUNK // 8 + 1, "ever written")):
        array["chunk_grid"]["configuration"]["chunk_shape"] = [size, 1, 1]
        write_result(result, changed)
        with pytest.raises(StoreError, match=words):
            explaind.open_result(result)


def test_zarr_writes_what_is_accepted():
    """Every data type, by every reader's default: what is compared is what this zarr makes of it."""
    from explaind_core.results.array_metadata import check_arrays
    from explaind_core.results.result_writer import _COMPRESSORS, _nothing

    group = zarr.group(zarr.storage.MemoryStore(), zarr_format=3)
    for dtype in ("bool", "int8", "uint64", "int64", "float16", "float32", "float64", str):
        fill = _nothing(np.dtype(dtype)) if dtype != "uint64" else 0
        group.create_array("a", shape=(0, 3), chunks=(1, 3), dtype=dtype, compressors=_COMPRESSORS, overwrite=True,
                           fill_value=fill, dimension_names=["x", "y"])  # fmt: skip
        metadata = json.loads(json.dumps(group["a"].metadata.to_dict()))
        assert check_arrays({"a": metadata}, {}, "x", 0) is None
