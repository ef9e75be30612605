"""Options in pairs: chords, buffers, a penalty, clipping, a remainder, restrictions, against explicit sums."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.loop_features import BATCHES, KEPT, check, train

STRATEGIES = ["features", "adjoint"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("chords", [2, 3])
def test_the_penalty_of_a_chord_is_that_of_all_its_steps(strategy, chords):
    features = frozenset({"penalty"})
    check(train(features, BATCHES), features, KEPT, strategy, chords=chords)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_carried_is_what_no_sample_explains_whichever_samples_are_asked_for(strategy):
    features = frozenset({"noise"})
    check(train(features, BATCHES), features, KEPT, strategy, train=[4, 0, 7])


@settings(max_examples=15, deadline=None)
@given(
    st.sets(st.sampled_from(["norm", "dropout", "clip", "penalty", "noise"]), max_size=3),
    st.integers(1, 3),
    st.lists(st.sampled_from(range(8)), min_size=1, max_size=4, unique=True),
    st.booleans(),
    st.sets(st.sampled_from(KEPT)),
    st.sampled_from(STRATEGIES),
    st.sampled_from(["recorded", "final"]),
)
def test_any_options_together(features, chords, samples, restricted, keep, strategy, buffers):
    chosen = frozenset(features)
    keep = tuple(axis for axis in KEPT if axis in keep or axis == "train")
    asked = {"train": samples} if restricted else {}
    check(train(chosen, BATCHES), chosen, keep, strategy, chords=chords, buffers=buffers, **asked)
