"""Groups of pairs by hashes of 64 bits: captions or pictures that are the same, and pictures that are nearly so."""

import numpy as np
from scipy.sparse import coo_matrix

from pipeline.audit.blocks import blocks, places
from pipeline.audit.pixels import hamming

NEAR = 3  # bits of a picture's hash that near-duplicates may differ in; bands of BAND bits find them all
BAND = 64 // (NEAR + 1)
FOLLOWING = 32  # hashes that each is compared with in its bucket of a band


def repeated(hash_N: np.ndarray, there_N: np.ndarray, least: int) -> np.ndarray:
    """int64 (N,): number of the group of rows with one hash, groups in the order of their first rows; -1 of rows that
    are not `there`, or have fewer than `least` in their group."""
    ordered = np.sort(hash_N[there_N])
    often_G = np.unique(ordered[least - 1 :][ordered[least - 1 :] == ordered[: max(0, len(ordered) - least + 1)]])
    del ordered
    group_N, first_G = np.full(len(hash_N), -1, np.int64), np.full(len(often_G), len(hash_N), np.int64)
    if not len(often_G):
        return group_N
    for part in blocks(len(hash_N)):
        place_B = np.minimum(places(often_G, hash_N[part]), len(often_G) - 1)
        found = np.flatnonzero((often_G[place_B] == hash_N[part]) & there_N[part])
        group_N[part][found] = place_B[found]
        groups, earliest = np.unique(place_B[found], return_index=True)
        first_G[groups] = np.minimum(first_G[groups], part.start + found[earliest])
    number_G = np.empty(len(often_G) + 1, np.int64)
    number_G[np.argsort(first_G)], number_G[-1] = np.arange(len(often_G)), -1
    for part in blocks(len(hash_N)):
        group_N[part] = number_G[group_N[part]]
    return group_N


def renumbered(group_N: np.ndarray, keep_G: np.ndarray) -> np.ndarray:
    """Group numbers 0, 1, ... of the groups to keep, -1 for all others."""
    number_G = np.where(keep_G, np.cumsum(keep_G) - 1, -1)
    return np.where(group_N >= 0, number_G[group_N], -1) if len(keep_G) else group_N


def near_groups(hash_N: np.ndarray) -> np.ndarray:
    """int64 (N,): number of the group of near-duplicates of each picture, -1 = it has none. Hash 0 (plain, unread) has
    none.

    No chains: all of a group are near to its first, the most frequent hash that is in no group yet.
    """
    unique_U, size_U = np.unique(hash_N, return_counts=True)
    if len(unique_U) and unique_U[0] == 0:
        size_U[0] = 0
    a, b = (places(unique_U, end_L) for end_L in near_pairs(unique_U))
    linked, leader = led(a, b, size_U)
    number_U = renumber(size_U, linked, leader)
    group_N = np.empty(len(hash_N), np.int64)
    for part in blocks(len(hash_N)):
        group_N[part] = number_U[places(unique_U, hash_N[part])]
    return group_N


def near_pairs(unique_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two uint64 (L,): hashes that differ in at most NEAR bits, 0 excepted, and the other of each; some come twice.
    unique_U: ascending, each once.

    Two hashes that differ in at most NEAR bits are equal in one of NEAR + 1 bands (pigeonhole). In a band's bucket each
    is compared with the next FOLLOWING ones in order.
    """
    pairs = [np.zeros((2, 0), np.uint64)]
    for band in range(NEAR + 1):
        key_U = band_first(unique_U[unique_U != 0], band)
        key_U.sort()
        for step in range(1, FOLLOWING + 1):
            bucket_goes_on = False
            for part in blocks(len(key_U) - step):
                one_B, other_B = key_U[part], key_U[part.start + step : part.stop + step]
                same_B = (one_B ^ other_B) >> np.uint64(64 - BAND) == 0
                bucket_goes_on |= bool(same_B.any())
                near_B = same_B & (hamming(one_B, other_B) <= NEAR)
                pairs.append(np.stack([band_back(one_B[near_B], band), band_back(other_B[near_B], band)]))
            if not bucket_goes_on:
                break
    one_L, other_L = np.concatenate(pairs, 1)
    return one_L, other_L


def band_first(hash_U: np.ndarray, band: int) -> np.ndarray:
    """The hashes with the bits of a band moved to the top, so that they sort by the band, then by the others."""
    low, band_bits = np.uint64(band * BAND), np.uint64((1 << BAND) - 1)
    above_U = np.right_shift(hash_U, low) >> np.uint64(BAND)
    below_U = hash_U & np.uint64((1 << (band * BAND)) - 1)
    return (hash_U >> low & band_bits) << np.uint64(64 - BAND) | above_U << low | below_U


def band_back(key_U: np.ndarray, band: int) -> np.ndarray:
    """The hashes of which `band_first` made the keys."""
    low, rest_bits = np.uint64(band * BAND), np.uint64((1 << (64 - BAND)) - 1)
    rest_U = key_U & rest_bits
    above_U = rest_U >> low
    below_U = rest_U & np.uint64((1 << (band * BAND)) - 1)
    return above_U << low << np.uint64(BAND) | key_U >> np.uint64(64 - BAND) << low | below_U


def led(a: np.ndarray, b: np.ndarray, size_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two int64 (L,): the numbers that stand in links between a and b, ascending, and the leader of the group that each
    is in. The most frequent lead first."""
    linked, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    count = len(linked)
    if not count:
        return linked, linked
    a, b = np.split(ends, 2)
    graph = coo_matrix((np.ones(2 * len(a), np.int8), (np.r_[a, b], np.r_[b, a])), (count, count)).tocsr()
    leader, taken = np.arange(count), np.zeros(count, bool)
    for first in np.argsort(-size_U[linked], kind="stable"):
        if not taken[first]:
            others = graph.indices[graph.indptr[first] : graph.indptr[first + 1]]
            others = others[~taken[others]]
            leader[others] = first
            taken[others] = taken[first] = True
    return linked, linked[leader]


def renumber(size_U: np.ndarray, linked: np.ndarray, leader: np.ndarray) -> np.ndarray:
    """int64 (U,): number of the group of each hash, -1 where it is of fewer than two pictures. size_U: pictures with
    each hash; it is changed. linked, leader: as `led` gives them; every other hash leads itself."""
    total = size_U[linked]
    size_U[linked] = 0
    np.add.at(size_U, leader, total)
    keep_U = size_U >= 2
    number_U = np.cumsum(keep_U) - 1
    number_U[~keep_U] = -1
    number_U[linked] = number_U[leader]
    return number_U
