"""Repetitions: equal captions of different pictures, near-duplicate pictures with different captions."""

import unicodedata
from collections.abc import Callable

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Detector, Finding, Group, detector, lowest
from pipeline.audit.detectors.neighbourhood import unit
from pipeline.audit.embeddings import Rows
from pipeline.audit.pixels import hamming

NEAR = 3  # bits of a picture's hash that near-duplicates may differ in; bands of 64 / (NEAR + 1) bits find them all
GROUPS = 200  # reported by a detector


def agreement(rows: Rows, group_N: np.ndarray, count: int) -> np.ndarray:
    """float32 (N,): mean cosine of each row with the others of its group, in -1..1. Rows alone in a group: 1.

    rows: embeddings.Rows; group_N: number of the group of each row, -1 = none; count: groups.
    """
    size_G = np.bincount(group_N[group_N >= 0], minlength=count)
    total_GD, agree_N = np.zeros((count, rows.width), np.float32), np.ones(len(group_N), np.float32)
    inside = np.flatnonzero(group_N >= 0)
    for piece in np.array_split(inside, max(1, len(inside) >> 16)):
        member = csr_matrix((np.ones(len(piece), np.float32), (group_N[piece], range(len(piece)))), (count, len(piece)))
        total_GD += member @ unit(rows.take(piece))
    for piece in np.array_split(inside, max(1, len(inside) >> 16)):
        row_BD, group_B = unit(rows.take(piece)), group_N[piece]
        others_B = (row_BD * (total_GD[group_B] - row_BD)).sum(1)
        agree_N[piece] = others_B / np.maximum(size_G[group_B] - 1, 1)
    return agree_N


def groups_of(score_N: np.ndarray, group_N: np.ndarray, titles: Callable[[np.ndarray], str], text: str) -> list[Group]:
    """Of the lowest mean score and the most members first."""
    order = np.lexsort((score_N, group_N))
    order = order[group_N[order] >= 0]
    starts = np.flatnonzero(np.diff(group_N[order], prepend=-1))
    found = []
    for rows in np.split(order, starts[1:]) if len(order) else []:
        badness = float((1 - score_N[rows].mean()) * np.log2(len(rows)))
        found.append((badness, rows))
    found.sort(key=lambda one: -one[0])
    return [Group(titles(rows), text.format(n=len(rows)), rows, badness) for badness, rows in found[:GROUPS]]


@detector
class RepeatedCaption(Detector):
    """One caption under unlike pictures."""

    name = "repeated_caption"
    title = "one caption, unlike pictures"
    text = (
        "A caption that stands under at least three pictures, which are unlike each other; "
        "a backdoor's captions repeat."
    )
    source = "ours; a backdoor's captions name one class (Carlini and Terzis, ICLR 2022)"
    needs = ("captions", "images")

    def find(self, data: AuditData, worst: float) -> Finding:
        """The score is (1 + mean cosine of the picture with the others of its caption) / 2."""
        numbers: dict[str, int] = {}
        group_N = np.full(data.N, -1, np.int64)
        for row, caption in enumerate(data.captions):
            if caption is not None and not np.isnan(data.score_N[row]):
                plain = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
                group_N[row] = numbers.setdefault(plain, len(numbers))
        size_G = np.bincount(group_N[group_N >= 0], minlength=len(numbers))
        group_N = renumbered(group_N, size_G >= 3)
        count = int(group_N.max()) + 1
        score_N = (1 + agreement(data.images, group_N, count)) / 2
        text = "one caption under {n} pictures"
        groups = groups_of(score_N, group_N, lambda rows: data.captions[rows[0]], text)
        return Finding(score_N.astype(np.float32), lowest(score_N, worst), groups)


@detector
class NearDuplicate(Detector):
    """One picture under unlike captions."""

    name = "near_duplicate"
    title = "one picture, unlike captions"
    text = "Pictures that are the same but for a few bits of their hash, under captions that are unlike each other."
    source = "Zauner 2010 (picture hashes); Carlini and Terzis, ICLR 2022 (targeted poison repeats its picture)"
    needs = ("hash_N", "texts", "captions")

    def find(self, data: AuditData, worst: float) -> Finding:
        """The score is (1 + mean cosine of the caption with those of the picture's other copies) / 2."""
        group_N = near_groups(np.where(np.isnan(data.score_N), 0, data.hash_N))
        count = int(group_N.max()) + 1
        score_N = ((1 + agreement(data.texts, group_N, count)) / 2).astype(np.float32)
        groups = groups_of(
            score_N, group_N, lambda rows: data.captions[rows[0]] or "", "{n} near-duplicates of one picture"
        )
        return Finding(score_N, lowest(score_N, worst), groups)


def renumbered(group_N: np.ndarray, keep_G: np.ndarray) -> np.ndarray:
    """Group numbers 0, 1, ... of the groups to keep, -1 for all others."""
    number_G = np.where(keep_G, np.cumsum(keep_G) - 1, -1)
    return np.where(group_N >= 0, number_G[group_N], -1) if len(keep_G) else group_N


def near_groups(hash_N: np.ndarray) -> np.ndarray:
    """int64 (N,): number of the group of near-duplicates of each picture, -1 = it has none. Hash 0 (plain, unread) has
    none.

    Two hashes that differ in at most NEAR bits are equal in one of NEAR + 1 bands (pigeonhole); in a band's bucket each
    is compared with the next ones in order, 32 at most.
    """
    unique_U, inverse_N, count_U = np.unique(hash_N, return_inverse=True, return_counts=True)
    links, bits = [], 64 // (NEAR + 1)
    for band in range(NEAR + 1):
        part_U = (unique_U >> np.uint64(band * bits)) & np.uint64((1 << bits) - 1)
        order = np.lexsort((unique_U, part_U))
        for step in range(1, 33):
            a, b = order[:-step], order[step:]
            near = (part_U[a] == part_U[b]) & (hamming(unique_U[a], unique_U[b]) <= NEAR)
            near &= (unique_U[a] != 0) & (unique_U[b] != 0)
            links.append(np.stack([a[near], b[near]]))
            if not (part_U[a] == part_U[b]).any():
                break
    a, b = np.concatenate(links, 1)
    graph = coo_matrix((np.ones(2 * len(a), np.int8), (np.r_[a, b], np.r_[b, a])), (len(unique_U),) * 2).tocsr()
    linked = np.flatnonzero(np.diff(graph.indptr))
    group_U = np.arange(len(unique_U))
    taken_U = np.zeros(len(unique_U), bool)
    # No chains: all of a group are near to its first, the most frequent hash that is in no group yet.
    for leader in linked[np.argsort(-count_U[linked], kind="stable")].tolist():
        if not taken_U[leader]:
            others = graph.indices[graph.indptr[leader] : graph.indptr[leader + 1]]
            others = others[~taken_U[others]]
            group_U[others] = leader
            taken_U[others] = taken_U[leader] = True
    size_G = np.bincount(group_U, count_U, len(unique_U))
    size_G[unique_U == 0] = 0
    return renumbered(group_U[inverse_N], size_G >= 2)
