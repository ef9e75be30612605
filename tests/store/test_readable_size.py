"""Amounts of bytes, as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explaind_core.store.readable_size import parse_size, readable_size


@pytest.mark.parametrize(("size", "memory", "disk"), [
    (0, "0 B", "0 B"), (999, "999 B", "999 B"), (1000, "1000 B", "1 kB"), (1024, "1.0 KiB", "1.02 kB"),
    (999_499, "976.1 KiB", "999 kB"), (999_600, "976.2 KiB", "1 MB"), (12_300_000, "11.7 MiB", "12.3 MB"),
    (2**30, "1.0 GiB", "1.07 GB"), (3 * 10**12, "2794.0 GiB", "3 TB"), (2 * 10**15, "1862645.1 GiB", "2e+03 TB"),
])  # fmt: skip
def test_what_is_said_of_a_size(size, memory, disk):
    assert readable_size(size) == memory
    assert readable_size(size, disk=True) == disk


@given(st.integers(0, 10**14), st.booleans())
def test_what_is_written_is_read(size, disk):
    found = parse_size(readable_size(size, disk=disk))
    assert found == pytest.approx(size, rel=0.06, abs=1)


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "4 gib", "1e9", None, "4 PB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="no amount of bytes"):
        parse_size(text)
