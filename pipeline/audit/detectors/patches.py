"""Common patches: the same pixels at the same place in unlike pictures, as a backdoor's trigger leaves them."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Detector, Finding, Group, detector, lowest
from pipeline.audit.detectors.repeated import near_groups
from pipeline.audit.embeddings import Rows
from pipeline.audit.pixels import GRID

LEAST = 5  # unlike pictures that must have a cell in common
EXCESS = 4.0  # how many times more often here than at other places, for a flag
SHOWN = 50  # groups
MERGED = 1000  # cells' groups, the worst, that are put together to patches
SAME = 0.5  # Jaccard index of two cells' pictures from which they are parts of one patch


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
        """
        near_N = near_groups(data.hash_N)
        excess_N, found = repeated_cells(data.cells, np.where(near_N >= 0, near_N, data.N + np.arange(data.N)))
        score_N, groups = (1 / np.maximum(excess_N, 1)).astype(np.float32), []
        score_N[np.isnan(data.score_N)] = np.nan
        for excess, cells, rows in merged(found):
            row, column = np.divmod(np.array(cells), GRID)
            left, top = float(column.min() / GRID), float(row.min() / GRID)
            right, bottom = float((column.max() + 1) / GRID), float((row.max() + 1) / GRID)
            text = (
                f"{len(rows)} pictures share {len(cells)} of {GRID * GRID} cells, {excess:.0f} x as often as elsewhere"
            )
            groups.append(Group("the same patch", text, rows, excess, (left, top, right, bottom)))
        return Finding(score_N, lowest(score_N, worst) & (score_N <= 1 / EXCESS), groups)


def repeated_cells(cells: Rows, picture_N: np.ndarray) -> tuple[np.ndarray, list[tuple[float, int, np.ndarray]]]:
    """(excess_N, found): the highest excess of each picture's cells that LEAST unlike pictures have at one place, 0
    without one, and [(excess, cell, rows)] of those from EXCESS on, the highest first.

    cells: embeddings.Rows; picture_N: int (N,) from 0 below 2^32, the same number for pictures that are alike.
    """
    kept = []
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # sorting is most of the work, and numpy lets go of the lock for it
        for first, value_CN in cells.columns():
            sorted_C = pool.map(lambda value_N: repeated_values(value_N, picture_N), value_CN)
            kept += [(cell, *one) for cell, one in enumerate(sorted_C, first) if len(one[0])]
    excess_N = np.zeros(len(picture_N), np.float32)
    found: list[tuple[float, int, np.ndarray]] = []
    if not kept:
        return excess_N, found
    value_V, inverse = np.unique(np.concatenate([k[3] for k in kept]), return_inverse=True)
    total_V = np.bincount(inverse, np.concatenate([k[4] for k in kept]))
    for cell, rows, sizes, value, unlike in kept:
        elsewhere = (total_V[np.searchsorted(value_V, value)] - unlike) / (GRID * GRID - 1)
        excess = np.where(unlike >= LEAST, unlike / (1 + elsewhere), 0)
        np.maximum.at(excess_N, rows, np.repeat(excess, sizes).astype(np.float32))
        ends = np.cumsum(sizes)
        for i in np.flatnonzero(excess >= EXCESS):
            found.append((float(excess[i]), cell, rows[ends[i] - sizes[i] : ends[i]]))
    return excess_N, sorted(found, key=lambda one: -one[0])


def repeated_values(
    value_N: np.ndarray, picture_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rows, sizes, values, unlike) of one cell: the rows with a value that two unlike pictures have, value by value;
    of each value the number of its rows and of its unlike pictures."""
    there = np.flatnonzero(value_N)
    key = value_N[there].astype(np.uint64) << np.uint64(32) | picture_N[there].astype(np.uint64)
    by_key = np.argsort(key)
    key = key[by_key]
    value, new = key >> np.uint64(32), np.r_[True, key[1:] != key[:-1]][: len(key)]
    starts = np.flatnonzero(np.r_[True, value[1:] != value[:-1]][: len(key)])
    unlike = np.add.reduceat(new.astype(np.int32), starts) if len(starts) else np.zeros(0, np.int32)
    sizes = np.diff(np.r_[starts, len(key)])
    often = unlike >= 2
    rows = there[by_key][np.repeat(often, sizes)].astype(np.int64)
    return rows, sizes[often], value[starts[often]], unlike[often]


def merged(found: list[tuple[float, int, np.ndarray]]) -> list[tuple[float, list[int], np.ndarray]]:
    """[(excess, cells, rows)]: the SHOWN worst patches, each of the cells whose pictures are much the same."""
    patches: list[tuple[float, list[int], np.ndarray]] = []
    for excess, cell, rows in found[:MERGED]:
        for patch in patches:
            both = len(np.intersect1d(patch[2], rows, assume_unique=True))
            if both >= SAME * (len(patch[2]) + len(rows) - both):
                patch[1].append(cell)
                break
        else:
            if len(patches) < SHOWN:
                patches.append((excess, [cell], np.sort(rows)))
    return patches
