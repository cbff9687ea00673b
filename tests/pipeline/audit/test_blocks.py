"""Work in blocks gives what work on whole arrays gives, whatever the size of the blocks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from pipeline.audit import blocks as blocks_module
from pipeline.audit.blocks import blocks, counts_up_to, lowest_flags, order_fractions, places, worst_rows
from pipeline.audit.findings import lowest_sum, mean_log_rank
from pipeline.audit.hash_groups import repeated
from pipeline.audit.notes import Notes
from pipeline.audit.report import BINS, cosine_histogram
from pipeline.audit.truth import judge

# Few different values, so that there are ties.
SCORES = st.lists(
    st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")]), st.floats(0, 1, width=32)), max_size=60
)
SIZES = st.integers(1, 70)


@pytest.fixture(autouse=True)
def whole_blocks():
    before = blocks_module.BLOCK
    yield
    blocks_module.BLOCK = before


@given(st.integers(0, 100), SIZES)
def test_blocks_cover_all_rows_once_and_in_order(count, size):
    assert [row for part in blocks(count, size) for row in range(count)[part]] == list(range(count))
    assert all(part.stop - part.start <= size for part in blocks(count, size))


@given(SCORES, st.integers(0, 70), SIZES, st.randoms(use_true_random=False))
def test_the_worst_of_a_stream_are_the_first_of_a_stable_sort(scores, count, size, random):
    score_N = np.array(scores, np.float32)
    among_N = np.array([random.random() < 0.7 for _ in scores], bool)
    blocks_module.BLOCK = size
    for some_N in (None, among_N):
        there = np.flatnonzero(~np.isnan(score_N) & (True if some_N is None else some_N))
        expected = there[np.argsort(score_N[there], kind="stable")][:count]
        assert worst_rows(score_N, count, some_N).tolist() == expected.tolist()


@given(SCORES, st.integers(-1, 70))
def test_the_lowest_are_flagged_and_of_equal_ones_the_first(scores, count):
    value_M = np.array([score for score in scores if score == score], np.float32)
    expected = np.sort(np.argsort(value_M, kind="stable")[: max(0, count)])
    assert np.flatnonzero(lowest_flags(value_M, count)).tolist() == expected.tolist()


@given(SCORES, SIZES)
def test_ranks_are_those_of_whole_arrays(scores, size):
    score_N = np.array(scores, np.float32)
    there = np.flatnonzero(~np.isnan(score_N))
    blocks_module.BLOCK = size
    expected_N = np.full(len(score_N), np.nan, np.float32)
    expected_N[there[np.argsort(score_N[there], kind="stable")]] = np.arange(len(there)) / max(1, len(score_N))
    np.testing.assert_array_equal(order_fractions(score_N), expected_N)
    known_N = score_N[there]
    assert counts_up_to(score_N, known_N).tolist() == [int((known_N <= value).sum()) for value in known_N]
    ordered = np.sort(known_N)
    for side in ("left", "right"):
        assert places(ordered, score_N[there], side).tolist() == np.searchsorted(ordered, known_N, side).tolist()


@given(st.integers(1, 40), st.integers(1, 4), SIZES, st.integers(0, 2**32 - 1))
def test_combined_ranks_are_those_of_whole_arrays(count, families, size, seed):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 9, (1 + family % 3, count)).astype(np.float32) / 8 for family in range(families)]
    scores[0][0, rng.random(count) < 0.2] = np.nan
    blocks_module.BLOCK = size

    def log_ranks(family):
        return [np.log(rankdata(np.nan_to_num(one, nan=1.0), "max") / count).astype(np.float32) for one in family]

    expected_FN = np.sort(np.stack([np.mean(log_ranks(family), 0) for family in scores]), 0)
    np.testing.assert_array_equal(lowest_sum(mean_log_rank(list(one)) for one in scores), expected_FN[:2].sum(0))


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(2, 4), SIZES)
def test_rows_with_one_hash_are_grouped_in_the_order_of_their_first(hashes, least, size):
    blocks_module.BLOCK = size
    hash_N, there_N = np.array(hashes, np.uint64), np.arange(len(hashes)) % 5 != 2
    rows_of = {}
    for row in np.flatnonzero(there_N).tolist():
        rows_of.setdefault(hashes[row], []).append(row)
    expected_N = np.full(len(hashes), -1)
    for number, rows in enumerate(rows for rows in rows_of.values() if len(rows) >= least):
        expected_N[rows] = number
    assert repeated(hash_N, there_N, least).tolist() == expected_N.tolist()


@given(SCORES, SIZES)
def test_the_histogram_is_that_of_the_whole(scores, size):
    blocks_module.BLOCK = size
    score_N = np.array(scores, np.float32)
    counts, low, high = cosine_histogram(score_N)
    there = score_N[~np.isnan(score_N)]
    assert counts == np.histogram(there, BINS, (low, high))[0].tolist() and sum(counts) == len(there)


@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("abc"))), st.integers(0, 20))
def test_notes_are_a_dict_of_rows(added, row):
    notes = Notes()
    for one in added:
        notes.add(*one)
    expected = dict(added)
    assert notes.row_M.tolist() == sorted(expected) and len(notes) == len(expected)
    assert notes.get(row) == expected.get(row, "")
    assert {text: rows.tolist() for text, rows in notes.rows_of().items()} == {
        text: sorted(one for one in expected if expected[one] == text) for text in set(expected.values())
    }


@given(st.integers(0, 2**32 - 1), SIZES)
def test_judging_counts_of_scores_is_judging_all_scores(seed, size):
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(seed)
    score_N = (rng.integers(0, rng.integers(2, 200), 80) / 200).astype(np.float32)
    poison, clean = np.split(rng.permutation(80), [int(rng.integers(1, 40))])
    blocks_module.BLOCK = size
    found, truth = judge(score_N, poison, clean), np.isin(np.arange(80), poison)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, -score_N))
    assert found["average_precision"] == pytest.approx(average_precision_score(truth, -score_N))
    assert found["roc"][0] == [0, 0] and found["roc"][-1] == [1, 1] and found["pr"][-1][0] == 1
