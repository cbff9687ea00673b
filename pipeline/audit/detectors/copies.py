"""Copies of a picture as the optional package cleanvision finds them, beside those of near_duplicate."""

import numpy as np

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Finding, Group, detector
from pipeline.audit.detectors.quality import Quality
from pipeline.audit.detectors.repeated import GROUPS
from pipeline.audit.hash_groups import near_groups, renumbered
from pipeline.audit.quality import measures


class Copies(Quality):
    """Sets of pictures with one hash (quality.COPIES)."""

    def find(self, data: AuditData, worst: float) -> Finding:
        """The score is 1 over the size of the set, as in cleanvision. The captions play no part."""
        measured = measures(data)
        group_N, read_N = np.full(data.N, -1, np.int64), np.zeros(data.N, bool)
        group_N[measured.frame.index] = self.sets(measured.hash_M2)
        read_N[measured.frame.index] = True
        size_N = np.where(group_N >= 0, np.bincount(group_N + 1)[group_N + 1], 1)
        score_N = np.where(read_N, 1 / size_N, np.nan).astype(np.float32)
        ours_N = None if data.hash_N is None else near_groups(data.hash_N)
        inside = np.flatnonzero(group_N >= 0)
        inside = inside[np.lexsort((inside, group_N[inside], -size_N[inside]))]
        starts = np.flatnonzero(np.diff(group_N[inside], prepend=-1))[: GROUPS + 1]
        sets = [rows for rows in np.split(inside, starts[1:])[:GROUPS] if len(rows)]
        groups = [Group(self.title, self.said(rows, ours_N), rows, len(rows)) for rows in sets]
        return Finding(score_N, group_N >= 0, groups)

    def sets(self, hash_M2: np.ndarray) -> np.ndarray:
        """int64 (M,): number of the set of each picture, -1 = it has none."""
        return equal(hash_M2[:, 0])

    def said(self, rows: np.ndarray, ours_N: np.ndarray | None) -> str:
        """The size of a set, and how many of it near_duplicate puts together."""
        text = f"{len(rows)} pictures"
        if ours_N is None:
            return text
        ours = ours_N[rows][ours_N[rows] >= 0]
        return f"{text}; near_duplicate finds {np.unique(ours, return_counts=True)[1].max(initial=0)} of them alike"


@detector
class CleanvisionExact(Copies):
    name = "cleanvision_exact"
    title = "equal pixels (cleanvision)"
    text = "Pictures with the same pixels, whatever their captions."


@detector
class CleanvisionNear(Copies):
    name = "cleanvision_near"
    title = "equal perceptual hash (cleanvision)"
    text = (
        "Pictures with one perceptual hash, whatever their captions; near_duplicate allows a few bits of another hash "
        "and looks for unlike captions. All plain pictures have one hash."
    )

    def sets(self, hash_M2: np.ndarray) -> np.ndarray:
        """Without the sets that cleanvision_exact has."""
        exact_M, near_M = (equal(hash_M) for hash_M in hash_M2.T)
        count = int(near_M.max(initial=-1)) + 1
        size_G = np.bincount(near_M[near_M >= 0], minlength=count)
        both_2M = np.stack([near_M, exact_M])[:, (near_M >= 0) & (exact_M >= 0)]
        (near_S, _), size_S = np.unique(both_2M, axis=1, return_counts=True)
        keep_G = np.ones(count, bool)
        keep_G[near_S[size_S == size_G[near_S]]] = False  # all of the set are one exact set
        return renumbered(near_M, keep_G)


def equal(hash_M: np.ndarray) -> np.ndarray:
    """int64 (M,): number of the set of pictures with this hash, -1 = no other has it."""
    _, inverse_M, count_U = np.unique(hash_M, return_inverse=True, return_counts=True)
    return renumbered(inverse_M, count_U >= 2)
