"""Selection by counting equals selection by sorting; a lower score is never safe while a higher one is not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.config.schema import Selection
from pipeline.safety.selection import (
    count_at_least,
    kth_largest,
    scheduled_fraction,
    score_of,
    select_top,
    top_by_shard,
)

scores = arrays(
    np.float32,
    st.integers(0, 200),
    elements=st.one_of(
        st.floats(-1, 1, width=32), st.sampled_from([np.float32(x) for x in (0.0, -0.0, 0.5, 0.25, np.nan)])
    ),
)


@given(scores, st.integers(0, 250))
def test_the_highest_with_ties_to_the_first_rows(scores_N, k):
    chosen = select_top(scores_N, k)
    usable = np.flatnonzero(~np.isnan(scores_N))
    wanted = usable[np.argsort(-scores_N[usable].astype(np.float64), kind="stable")][:k]
    assert set(np.flatnonzero(chosen)) == set(wanted)


@given(scores, st.integers(0, 250))
def test_it_is_one_threshold(scores_N, k):
    chosen = select_top(scores_N, k)
    left = scores_N[~chosen & ~np.isnan(scores_N)]
    if chosen.any() and len(left):
        assert scores_N[chosen].min() >= left.max()


@given(scores, st.floats(-1, 1))
def test_the_count_above_a_threshold_selects_just_those(scores_N, threshold):
    assert np.array_equal(select_top(scores_N, count_at_least(scores_N, threshold)), scores_N >= threshold)


def test_the_safe_fraction_grows_to_its_maximum():
    chosen = Selection(growth=0.2, max_fraction=0.7)
    assert [round(scheduled_fraction(0.4, number, chosen), 3) for number in range(4)] == [0.4, 0.6, 0.7, 0.7]
    assert scheduled_fraction(0.95, 0, chosen) == 0.95 and scheduled_fraction(0.95, 1, chosen) == 0.7


@given(scores, st.integers(0, 250), st.lists(st.integers(0, 60), max_size=6))
def test_shard_by_shard_it_is_the_same_selection(scores_N, k, counts):
    counts_S = [*np.minimum(np.diff(np.minimum(np.cumsum([0, *counts]), len(scores_N))), 200)]
    counts_S.append(len(scores_N) - sum(counts_S))
    key, rest = kth_largest(scores_N, k)
    parts = list(top_by_shard(scores_N, counts_S, key, rest))
    assert [len(part) for part in parts] == counts_S
    assert np.array_equal(np.concatenate(parts), select_top(scores_N, k))


@given(scores, st.integers(0, 250))
def test_the_threshold_is_the_lowest_score_that_is_selected(scores_N, k):
    key, rest = kth_largest(scores_N, k)
    chosen = select_top(scores_N, k)
    assert bool(rest) == chosen.any()
    if rest:
        assert score_of(key) == scores_N[chosen].min()
