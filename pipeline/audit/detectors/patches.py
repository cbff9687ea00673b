"""Common patches: the same pixels at the same place in unlike pictures, as a backdoor's trigger leaves them."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import MEMBERS, Detector, Finding, Group, detector, lowest
from pipeline.audit.embeddings import Rows
from pipeline.audit.hash_groups import near_groups
from pipeline.audit.pixels import GRID

SAMPLE = 1 << 20  # pictures in which patches are looked for: all, or so many random ones of more
LEAST = 5  # unlike pictures that must have a cell in common
EXCESS = 4.0  # how many times more often here than at other places, for a flag
SHOWN = 50  # groups
MERGED = 1000  # cells' groups, the worst, that are put together to patches
SAME = 0.5  # Jaccard index of two cells' pictures from which they are parts of one patch
THREADS = 8  # at most; each sorts one cell of all pictures of the sample


@detector
class CommonPatch(Detector):
    """The same pixels at the same place in unlike pictures."""

    name = "common_patch"
    title = "the same patch at the same place"
    text = (
        "A part of the picture is the same, at the same place, as in other, unlike pictures, "
        "and far more often there than elsewhere."
    )
    source = (
        "ours; the trigger of BadNets (Gu et al. 2017), Blended (Chen et al. 2017) on plain backgrounds, watermarks too"
    )
    needs = ("cells", "hash_N")

    def find(self, data: AuditData, worst: float) -> Finding:
        """The score is 1 / excess of the picture's most suspect cell: its unlike pictures (near-duplicates count once),
        over 1 + those expected there. Expected at a place is the mean count of the same cell at all other places: edges
        and textures are everywhere, a patch is not. Flags the lowest scores, `worst` of all at most, and only from
        EXCESS on.

        Excesses are those in SAMPLE pictures; then every picture is looked at for the cells that were found in these.
        """
        sample_M = np.arange(data.N)
        if data.N > SAMPLE:
            sample_M = np.sort(np.random.default_rng(0).choice(data.N, SAMPLE, replace=False))
        near_M = near_groups(data.hash_N[sample_M])
        picture_M = np.where(near_M >= 0, near_M, len(near_M) + np.arange(len(near_M)))
        repeated = repeated_cells(data.cells, sample_M, picture_M)
        excess_N, worst_cells = look_up(data.cells, repeated)
        score_N = (1 / np.maximum(excess_N, 1)).astype(np.float32)
        score_N[np.isnan(data.score_N)] = np.nan
        groups = [patch_group(*patch) for patch in merged(worst_cells)]
        return Finding(score_N, lowest(score_N, worst) & (score_N <= 1 / EXCESS), groups)


class Repeated(NamedTuple):
    """V contents of cells that LEAST unlike pictures have at one place, more often than is expected there, sorted by
    cell and value."""

    cell_V: np.ndarray  # int64
    value_V: np.ndarray  # uint32
    excess_V: np.ndarray  # float64, more than 1


class WorstCells(NamedTuple):
    """The T worst of Repeated, MERGED at most, the highest excess first, in all pictures."""

    excess_T: np.ndarray
    cell_T: np.ndarray
    both_TT: np.ndarray  # int64: pictures that have both; on the diagonal those that have the one
    rows: list[np.ndarray]  # the first MEMBERS pictures of each


def repeated_cells(cells: Rows, sample_M: np.ndarray, picture_M: np.ndarray) -> Repeated:
    """What repeats in the pictures of the rows `sample_M`. cells: embeddings.Rows; picture_M: int (M,) from 0 below
    2^32, the same number for pictures that are alike."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    # Sorting is most of the work, and numpy lets go of the lock for it.
    with ThreadPoolExecutor(min(THREADS, os.cpu_count())) as pool:
        for _, value_CM in cells.columns(sample_M):
            kept += pool.map(lambda value_M: counted(value_M, picture_M), value_CM)
    often = [value[unlike >= LEAST] for value, unlike in kept]
    known_K = np.unique(np.concatenate(often))
    total_K = np.zeros(len(known_K), np.int64)  # of each value at all places
    for value, unlike in kept:
        place = np.searchsorted(known_K, value)
        there = place < len(known_K)
        there[there] = known_K[place[there]] == value[there]
        total_K[place[there]] += unlike[there]
    found = []
    for cell, (value, unlike) in enumerate(kept):
        value, unlike = value[unlike >= LEAST], unlike[unlike >= LEAST]
        elsewhere = (total_K[np.searchsorted(known_K, value)] - unlike) / (GRID * GRID - 1)
        excess = unlike / (1 + elsewhere)
        more = excess > 1
        found.append((np.full(int(more.sum()), cell), value[more], excess[more]))
    return Repeated(*(np.concatenate(part) for part in zip(*found)))


def counted(value_M: np.ndarray, picture_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 values, int32 unlike) of one cell: the values that two unlike pictures have, ascending, and how many have
    each. 0 is no value."""
    there = value_M != 0
    key = value_M[there].astype(np.uint64) << np.uint64(32) | picture_M[there].astype(np.uint64)
    key.sort()
    value = (key[np.diff(key, prepend=~key[:1]) != 0] >> np.uint64(32)).astype(np.uint32)  # once a picture
    starts = np.flatnonzero(np.diff(value, prepend=~value[:1]))
    unlike = np.diff(starts, append=len(value)).astype(np.int32)
    return value[starts][unlike >= 2], unlike[unlike >= 2]


def look_up(cells: Rows, repeated: Repeated) -> tuple[np.ndarray, WorstCells]:
    """(float32 (N,): the highest excess of each picture's cells, 0 without one; the worst cells from EXCESS on)."""
    worst = np.argsort(-repeated.excess_V, kind="stable")
    worst = worst[repeated.excess_V[worst] >= EXCESS][:MERGED]
    slot_V = np.full(len(repeated.excess_V), -1)
    slot_V[worst] = np.arange(len(worst))
    first_G = np.searchsorted(repeated.cell_V, np.arange(GRID * GRID + 1))
    excess_N, both_TT = np.zeros(len(cells), np.float32), np.zeros((len(worst), len(worst)), np.int64)
    rows: list[np.ndarray] = [np.zeros(0, np.int64)] * len(worst)
    for at, block_BG in cells.blocks() if len(repeated.cell_V) else ():
        excess_B, marks = excess_N[at : at + len(block_BG)], [np.zeros((2, 0), np.int64)]
        for cell in np.flatnonzero(np.diff(first_G)).tolist():
            row, number = found_in(block_BG[:, cell], repeated.value_V[first_G[cell] : first_G[cell + 1]])
            number += first_G[cell]
            excess_B[row] = np.maximum(excess_B[row], repeated.excess_V[number])
            shown = slot_V[number] >= 0
            marks.append(np.stack([row[shown], slot_V[number[shown]]]))
        row, slot = np.concatenate(marks, 1)
        if len(row):
            mark_BT = csr_matrix((np.ones(len(row), np.int64), (row, slot)), (len(block_BG), len(worst)))
            both_TT += (mark_BT.T @ mark_BT).toarray()
            order = np.lexsort((row, slot))
            for some in np.split(order, np.flatnonzero(np.diff(slot[order])) + 1):
                rows[slot[some[0]]] = np.r_[rows[slot[some[0]]], at + row[some]][:MEMBERS]
    return excess_N, WorstCells(repeated.excess_V[worst], repeated.cell_V[worst], both_TT, rows)


def found_in(value_B: np.ndarray, known_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, numbers) of the values that are among the ascending `known_K`."""
    value_B = np.ascontiguousarray(value_B)
    place_B = np.minimum(np.searchsorted(known_K, value_B), len(known_K) - 1)
    rows = np.flatnonzero(known_K[place_B] == value_B)
    return rows, place_B[rows]


def merged(found: WorstCells) -> list[tuple[float, list[int], int, np.ndarray]]:
    """[(excess, cells, pictures, the first of their rows)]: the SHOWN worst patches, each of the cells whose pictures
    are much the same."""
    size_T = found.both_TT.diagonal()
    patches: dict[int, list[int]] = {}  # {number of the worst cell of a patch: its cells}
    for number, cell in enumerate(found.cell_T.tolist()):
        for first, patch in patches.items():
            both = found.both_TT[number, first]
            if both >= SAME * (size_T[first] + size_T[number] - both):
                patch.append(cell)
                break
        else:
            if len(patches) < SHOWN:
                patches[number] = [cell]
    return [
        (float(found.excess_T[first]), patch, int(size_T[first]), found.rows[first]) for first, patch in patches.items()
    ]


def patch_group(excess: float, cells: list[int], size: int, rows: np.ndarray) -> Group:
    """For the report, with the box that the cells lie in."""
    row, column = np.divmod(np.array(cells), GRID)
    left, top = float(column.min() / GRID), float(row.min() / GRID)
    right, bottom = float((column.max() + 1) / GRID), float((row.max() + 1) / GRID)
    text = f"{size} pictures share {len(cells)} of {GRID * GRID} cells, {excess:.0f} x as often as elsewhere"
    return Group("the same patch", text, rows, excess, (left, top, right, bottom), size)
