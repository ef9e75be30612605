"""The table of what is counted: every place that keeps a count has it, and parts come together in any order."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.questions import Contribution
from explaind_core.results.counts import COUNTS, totals
from explaind_core.testing import record_example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NUMBERS = {int: st.integers(0, 100), bool: st.booleans(), float: st.floats(0, 1)}


def test_a_contribution_has_every_count_and_no_other_plain_number():
    plain = {field.name for field in fields(Contribution) if field.type in ("int", "float", "bool")}
    assert set(COUNTS) == plain - {"window"}
    assert [name for name, count in COUNTS.items() if name != count.name] == []


@pytest.mark.parametrize("name", COUNTS)
@given(data=st.data())
def test_parts_come_together_in_any_grouping_and_a_block_counts_once(name, data):
    count = COUNTS[name]
    numbers = data.draw(st.lists(NUMBERS[count.dtype], min_size=2, max_size=8))
    cut = data.draw(st.integers(1, len(numbers) - 1))
    for join in (count.over_all_windows, count.over_all_blocks):
        assert join(numbers) == join([join(numbers[:cut]), join(numbers[cut:])])
        assert type(join(numbers)) is count.dtype
    assert count.over_all_blocks([*numbers, *numbers]) == count.over_all_blocks(numbers)


@pytest.mark.parametrize("strategy", ["forward", "adjoint"])
def test_what_is_kept_along_steps_adds_up_to_what_is_kept_without(strategy):
    run, options = record_example(5), {"nodes": 2, "strategy": strategy, "progress": False}
    along = explaind.attribute(run, INPUTS, keep=("step", "layer", "test"), **options)
    without = explaind.attribute(run, INPUTS, keep=("layer", "test"), **options)
    kept = {name: along[name].values for name in COUNTS if name in along}
    assert set(kept) == {name for name, count in COUNTS.items() if count.along_step} - {"correction"}
    assert {name: values.dtype for name, values in kept.items()} == {n: np.dtype(COUNTS[n].dtype) for n in kept}
    expected = totals({**kept, "missed": ~along.converged.values})
    assert {name: without.attrs[name] for name in expected} == pytest.approx(expected)
    assert "correction" not in without.attrs
