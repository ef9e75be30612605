"""Amounts of memory, as users say them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from explaind_core.errors import QuestionError
from explaind_core.questions.memory import parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 2**32), ("1.5 KiB", 1536), (" 2MB ", 2_000_000), ("7", 7), (12, 12), ("3B", 3), ("0.5MiB", 2**19),
        ("1GB", 10**9), ("2KB", 2000), (".5KiB", 512),
    ],
)  # fmt: skip
def test_an_amount_of_memory_is_bytes_or_has_a_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "4 gib", "-1GiB", "1.2.3GiB", ".", "4TiBs", "GiB", None, "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(QuestionError, match="memory is no amount of memory") as error:
        parse_memory(text)
    assert "4GiB" in error.value.expected


@settings(deadline=None, max_examples=25)
@given(st.text(max_size=6))
def test_any_text_is_an_amount_of_memory_or_refused(text):
    with contextlib.suppress(QuestionError):
        assert parse_memory(text) >= 0
