"""Arrays of N numbers, one a pair, worked on in blocks: ranks and the lowest of them, without other arrays of N where
that can be avoided."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

BLOCK = 1 << 20  # rows


def blocks(count: int, size: int = 0) -> Iterator[slice]:
    """Slices of `size` rows (BLOCK) that cover 0 to `count` in order."""
    size = size or BLOCK
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def worst_rows(score_N: np.ndarray, count: int, among_N: np.ndarray | None = None) -> np.ndarray:
    """int64 (K,), K <= count: rows of the lowest scores, the lowest first, ties by the row; NaN is left out.

    among_N: bool, the rows that count. A block at a time, only the best `count` rows so far are kept.
    """
    best = np.zeros(0, np.int64)
    for part in blocks(len(score_N)):
        there_B = ~np.isnan(score_N[part])
        if among_N is not None:
            there_B &= among_N[part]
        best = np.concatenate([best, part.start + np.flatnonzero(there_B)])
        best = best[lowest_flags(score_N[best], count)]  # in the order of the rows
    return best[np.argsort(score_N[best], kind="stable")]


def lowest_flags(value_M: np.ndarray, count: int) -> np.ndarray:
    """bool (M,): the `count` lowest values, none of which is NaN; of equal ones the first."""
    if count >= len(value_M):
        return np.ones(len(value_M), bool)
    if count <= 0:
        return np.zeros(len(value_M), bool)
    last = np.partition(value_M, count - 1)[count - 1]
    flags_M = value_M < last
    flags_M[np.flatnonzero(value_M == last)[: count - int(flags_M.sum())]] = True
    return flags_M


def order_fractions(key_N: np.ndarray) -> np.ndarray:
    """float32 (N,): of each key the number of those before it in ascending order, as a fraction of N; ties by the row,
    NaN stays NaN."""
    order_N = np.argsort(key_N, kind="stable")  # NaN last
    count = len(key_N) - int(np.isnan(key_N).sum())
    fraction_N = np.full(len(key_N), np.nan, np.float32)
    for part in blocks(count):
        fraction_N[order_N[part]] = np.arange(part.start, part.stop) / len(key_N)
    return fraction_N


def places(ordered_U: np.ndarray, value_B: np.ndarray, side: Literal["left", "right"] = "left") -> np.ndarray:
    """np.searchsorted; values are looked up in their order, which is several times faster in a large array."""
    order_B = np.argsort(value_B)
    place_B = np.empty(len(value_B), np.int64)
    place_B[order_B] = np.searchsorted(ordered_U, value_B[order_B], side)
    return place_B


def counts_up_to(score_N: np.ndarray, value_M: np.ndarray) -> np.ndarray:
    """int64 (M,): how many scores are at most each value; NaN is none of them."""
    ordered_M = np.sort(value_M)
    count_M = np.zeros(len(value_M) + 1, np.int64)
    for part in blocks(len(score_N)):
        there_B = score_N[part][~np.isnan(score_N[part])]
        count_M += np.bincount(np.searchsorted(ordered_M, there_B), minlength=len(count_M))
    return np.cumsum(count_M)[np.searchsorted(ordered_M, value_M)]
