"""Repetitions: equal captions of different pictures, near-duplicate pictures with different captions."""

import hashlib
import unicodedata
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Detector, Finding, Group, detector, lowest
from pipeline.audit.detectors.neighbourhood import unit
from pipeline.audit.embeddings import Rows
from pipeline.audit.hash_groups import near_groups, repeated

GROUPS = 200  # reported by a detector
SUMS = 1 << 26  # numbers in the sums of groups that are in memory at once
ROUNDING = 1e-5  # of a mean cosine: rows this near to the others of their group are taken for equal to them


def agreement(rows: Rows, group_N: np.ndarray, count: int) -> np.ndarray:
    """float32 (N,): mean cosine of each row with the others of its group, in -1..1. Rows alone in a group: 1.

    rows: embeddings.Rows; group_N: number of the group of each row, -1 = none; count: groups. The sums of SUMS numbers'
    worth of groups are in memory at once; with more groups the rows are read in several passes.
    """
    agree_N, step = np.ones(len(group_N), np.float32), max(1, SUMS // max(1, rows.width))
    for first in range(0, count, step):
        inside = np.flatnonzero((group_N >= first) & (group_N < first + step))
        group_M, groups = group_N[inside] - first, min(step, count - first)
        size_G, total_GD = np.bincount(group_M, minlength=groups), np.zeros((groups, rows.width), np.float32)
        pieces = np.array_split(np.arange(len(inside)), max(1, len(inside) >> 16))
        for piece in pieces:
            ones = np.ones(len(piece), np.float32)
            member = csr_matrix((ones, (group_M[piece], range(len(piece)))), (groups, len(piece)))
            total_GD += member @ unit(rows.take(inside[piece]))
        for piece in pieces:
            row_BD, group_B = unit(rows.take(inside[piece])), group_M[piece]
            others_B = (row_BD * (total_GD[group_B] - row_BD)).sum(1)
            mean_B = others_B / np.maximum(size_G[group_B] - 1, 1)
            agree_N[inside[piece]] = np.where(mean_B > 1 - ROUNDING, 1, mean_B)
    return agree_N


def groups_of(score_N: np.ndarray, group_N: np.ndarray, titles: Callable[[int], str], text: str) -> list[Group]:
    """Of the lowest mean score and the most members first. titles: of a group's first row."""
    inside = np.flatnonzero(group_N >= 0)
    if not len(inside):
        return []
    order = inside[np.lexsort((score_N[inside], group_N[inside]))]
    starts = np.flatnonzero(np.diff(group_N[order], prepend=-1))
    size_G = np.diff(starts, append=len(order))
    mean_G = np.add.reduceat(score_N[order], starts, dtype=np.float64) / size_G
    badness_G = (1 - mean_G) * np.log2(size_G)
    found = []
    for group in np.argsort(-badness_G, kind="stable")[:GROUPS].tolist():
        rows = order[starts[group] : starts[group] + size_G[group]]
        found.append(Group(titles(int(rows[0])), text.format(n=len(rows)), rows, float(badness_G[group])))
    return found


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
        group_N = repeated(*caption_hashes(data), 3)
        count = int(group_N.max(initial=-1)) + 1
        score_N = ((1 + agreement(data.images, group_N, count)) / 2).astype(np.float32)
        text = "one caption under {n} pictures"
        groups = groups_of(score_N, group_N, lambda row: data.caption(*data.place(row)), text)
        return Finding(score_N, lowest(score_N, worst), groups)


def caption_hashes(data: AuditData) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 (N,): a hash of each caption, whatever its letters' case, forms and spaces; bool (N,): whether the pair
    has a score and a caption). Two of 100 million captions have one hash with a probability of 0.03 %."""
    hash_N, there_N, first = np.zeros(data.N, np.uint64), ~np.isnan(data.score_N), 0
    for texts in data.captions:
        for row, text in enumerate(texts, first):
            if text is None:
                there_N[row] = False
            elif there_N[row]:
                plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
                hash_N[row] = int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")
        first += len(texts)
    return hash_N, there_N


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
        count = int(group_N.max(initial=-1)) + 1
        score_N = ((1 + agreement(data.texts, group_N, count)) / 2).astype(np.float32)
        groups = groups_of(
            score_N, group_N, lambda row: data.caption(*data.place(row)) or "", "{n} near-duplicates of one picture"
        )
        return Finding(score_N, lowest(score_N, worst), groups)
