"""Exact top-k selection by counting passes over integer keys of the scores; ties are broken by (shard, position)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

from pipeline.safety.mixture import PIECE

# Range of each kind of score. rank: of a filter (pipeline/audit/filter.py), the fraction of pairs that are worse.
RANGES = {"cosine": (-1.0, 1.0), "rank": (0.0, 1.0)}
NO_KEY = 0xFFFFFFFF  # above the keys of all scores

Rank = Callable[[np.ndarray], np.ndarray]  # scores -> the numbers that are compared


class SelectionSettings(Protocol):
    """What selection rounds read of a config's `selection`."""

    posterior: float
    first_fraction: float | None
    least_fraction: float
    mixture: Literal["sklearn", "converged"]
    rank_by: Literal["posterior", "score"]
    growth: float
    max_fraction: float


def ordered_keys(scores_N: np.ndarray) -> np.ndarray:
    """uint32 (N,): keys in the order of the float32 scores. NaN has key 0, the lowest; -0.0 and 0.0 have one key."""
    scores = np.asarray(scores_N, np.float32) + np.float32(0)  # -0.0 + 0.0 = 0.0
    bits = scores.view(np.int32)
    keys = (bits >> 31).view(np.uint32)  # all ones where negative
    keys |= np.uint32(1 << 31)
    keys ^= bits.view(np.uint32)
    keys[np.isnan(scores)] = 0
    return keys


def score_of(key: int) -> float:
    """Score of a key."""
    return float(np.uint32(key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF).view(np.float32))


def identity(scores: np.ndarray) -> np.ndarray:
    return scores


def kth_largest(
    scores_N: np.ndarray,
    k: int,
    total: Callable[[np.ndarray], np.ndarray] = lambda counts_K: counts_K,
    rank: Rank = identity,
) -> tuple[int, int]:
    """(key, ties): key of the k-th largest score, and how many scores equal to it belong to the k largest.

    Two passes count 65,536 bins each. NaN is not a score. With fewer than k scores the key is that of the smallest one;
    with none, or k = 0, the result is (NO_KEY, 0). total: sums the counts over ranks when each has a part of the
    scores. rank: maps scores to the numbers that are compared.
    """
    prefix, ties = 0, k
    for shift in (16, 0):
        counts_K = np.zeros(65_536, np.int64)
        for start in range(0, len(scores_N), PIECE):
            keys = ordered_keys(rank(scores_N[start : start + PIECE]))
            half_N = keys >> 16 if shift else keys[keys >> 16 == prefix] & 0xFFFF
            counts_K += np.bincount(half_N, minlength=65_536)
        if shift:
            counts_K[0] = 0  # NaN alone: the key of minus infinity is above 65,535
        above_K = np.cumsum(total(counts_K)[::-1])
        if shift:
            ties = min(ties, int(above_K[-1]))
            if ties <= 0:
                return NO_KEY, 0
        steps_down = int(np.searchsorted(above_K, ties))
        ties -= int(above_K[steps_down - 1]) if steps_down else 0
        prefix = (prefix << 16) | (65_535 - steps_down)
    return prefix, ties


def top_by_shard(
    scores_N: np.ndarray, counts_S: np.ndarray | Sequence[int], key: int, ties: int, rank: Rank = identity
) -> Iterator[np.ndarray]:
    """Yield bool (n,) for each shard: scores above `key`, and the first `ties` (over all shards) of those equal to it.

    scores_N: float32, of all pairs, shard after shard. counts_S: number of pairs of each shard. key, ties, rank: as for
    kth_largest.
    """
    start = 0
    for count in counts_S:
        keys = ordered_keys(rank(scores_N[start : start + count]))
        chosen, equals = keys > key, np.flatnonzero(keys == key)[:ties]
        chosen[equals] = True
        ties -= len(equals)
        start += count
        yield chosen


def select_top(scores_N: np.ndarray, k: int, rank: Rank = identity) -> np.ndarray:
    """bool (N,): the k highest scores, the first rows among equals. NaN is never selected."""
    return next(top_by_shard(scores_N, [len(scores_N)], *kth_largest(scores_N, k, rank=rank), rank))


def count_at_least(scores_N: np.ndarray, threshold: float, rank: Rank = identity) -> int:
    """Number of scores at or above `threshold`."""
    pieces = (scores_N[start : start + PIECE] for start in range(0, len(scores_N), PIECE))
    return sum(int(np.count_nonzero(rank(scores) >= threshold)) for scores in pieces)


def scheduled_fraction(first_fraction: float, number: int, selection: SelectionSettings) -> float:
    """Safe fraction of the round before SafeCLIP epoch `number` (from 0): `first_fraction`, which grows by
    selection.growth with each epoch up to selection.max_fraction."""
    return min(selection.max_fraction, first_fraction + number * selection.growth) if number else first_fraction
