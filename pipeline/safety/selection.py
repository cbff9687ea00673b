"""Exact selection of the highest scores, by counting: no sort of floats, ties broken by (shard, position)."""

import numpy as np


def ordered_keys(scores_N):
    """uint32 (N,): keys in the order of the float32 scores; NaN gets 0, below every number; -0.0 and 0.0 the same key."""
    scores = np.asarray(scores_N, np.float32) + np.float32(0)  # -0.0 + 0.0 = 0.0
    bits = scores.view(np.uint32)
    keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return np.where(np.isnan(scores), np.uint32(0), keys)


def kth_largest(keys_N, k):
    """(key, rest): the k-th largest key, and how many of its equals belong to the k largest. Two counting passes.

    Each pass is a histogram of 65,536 integers, which could be summed over ranks that hold parts of the keys.
    """
    prefix, rest = 0, k
    for shift in (16, 0):
        here = keys_N if shift else keys_N[keys_N >> 16 == prefix]
        above_K = np.cumsum(np.bincount((here >> shift) & 0xFFFF, minlength=65_536)[::-1])
        steps_down = int(np.searchsorted(above_K, rest))
        rest -= int(above_K[steps_down - 1]) if steps_down else 0
        prefix = (prefix << 16) | (65_535 - steps_down)
    return prefix, rest


def select_top(scores_N, k):
    """bool (N,): the k highest scores; among equals the first rows. NaN is never selected, so fewer where numbers run out."""
    keys = ordered_keys(scores_N)
    k = min(k, int((keys > 0).sum()))
    if k <= 0:
        return np.zeros(len(keys), bool)
    key, rest = kth_largest(keys, k)
    chosen = keys > key
    chosen[np.flatnonzero(keys == key)[:rest]] = True
    return chosen


def count_at_least(scores_N, cut):
    """int: scores at or above `cut`."""
    return int((np.asarray(scores_N) >= cut).sum())


def growth(first_share, split, step, cap):
    """Safe share at the `split`-th split (from 0): the first share, and `step` more at each later one, up to `cap`."""
    return min(cap, first_share + split * step)
