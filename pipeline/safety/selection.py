"""Exact selection of the highest scores, by counting: no sort of floats, ties broken by (shard, position)."""

import numpy as np

from pipeline.safety.mixture import PIECE

# Of the score, by its kind; rank: of a filter (pipeline/audit/filter.py), the fraction of pairs that stand out more.
RANGES = {"cosine": (-1.0, 1.0), "rank": (0.0, 1.0)}
NOTHING = 0xFFFFFFFF  # a key above those of all scores


def ordered_keys(scores_N):
    """uint32 (N,): keys in the order of the float32 scores; NaN gets 0, below every number; -0.0 and 0.0 the same
    key."""
    scores = np.asarray(scores_N, np.float32) + np.float32(0)  # -0.0 + 0.0 = 0.0
    bits = scores.view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return np.where(np.isnan(scores), np.uint32(0), keys)


def score_of(key):
    """float: the score that has this key."""
    return float(np.uint32(key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF).view(np.float32))


def identity(scores):
    return scores


def kth_largest(scores_N, k, total=lambda counts_K: counts_K, rank=identity):
    """(key, rest): key of the k-th largest score, and how many of its equals belong to the k largest; NaN is no score.

    Two counting passes of 65,536 integers. Where the scores are one rank's part, `total` sums the counts over the
    ranks. With fewer than k scores it is the smallest one; (NOTHING, 0) where there is none to take. `rank` maps scores
    to the numbers that are compared.
    """
    prefix, rest = 0, k
    for shift in (16, 0):
        counts_K = np.zeros(65_536, np.int64)
        for start in range(0, len(scores_N), PIECE):
            keys = ordered_keys(rank(scores_N[start : start + PIECE]))
            keys = keys[(keys > 0) if shift else (keys >> 16 == prefix)]
            counts_K += np.bincount((keys >> shift) & 0xFFFF, minlength=65_536)
        above_K = np.cumsum(total(counts_K)[::-1])
        if shift:
            rest = min(rest, int(above_K[-1]))
            if rest <= 0:
                return NOTHING, 0
        steps_down = int(np.searchsorted(above_K, rest))
        rest -= int(above_K[steps_down - 1]) if steps_down else 0
        prefix = (prefix << 16) | (65_535 - steps_down)
    return prefix, rest


def top_by_shard(scores_N, counts_S, key, rest, rank=identity):
    """Yield for each shard bool (n,): its scores above `key`, and the first `rest` (over all shards) of those equal to
    it. `rank` as for kth_largest."""
    start = 0
    for count in counts_S:
        keys = ordered_keys(rank(scores_N[start : start + count]))
        chosen, equals = keys > key, np.flatnonzero(keys == key)[:rest]
        chosen[equals] = True
        rest -= len(equals)
        start += count
        yield chosen


def select_top(scores_N, k, rank=identity):
    """bool (N,): the k highest scores; among equals the first rows. NaN is never selected, so fewer where numbers run
    out."""
    return next(top_by_shard(scores_N, [len(scores_N)], *kth_largest(scores_N, k, rank=rank), rank))


def count_at_least(scores_N, threshold, rank=identity):
    """int: scores at or above `threshold`."""
    pieces = (scores_N[start : start + PIECE] for start in range(0, len(scores_N), PIECE))
    return sum(int(np.count_nonzero(rank(scores) >= threshold)) for scores in pieces)


def scheduled_fraction(first_fraction, number, selection):
    """Safe fraction before the SafeCLIP epoch `number` (from 0): the first fraction, and selection.growth more at each later
    one, up to selection.max_fraction."""
    return min(selection.max_fraction, first_fraction + number * selection.growth) if number else first_fraction
