"""Common patches: the same pixels at the same place in unlike pictures, as a backdoor's trigger leaves them."""

import numpy as np

from pipeline.audit.detectors import Detector, Finding, Group, detector, lowest
from pipeline.audit.detectors.repeated import near_groups
from pipeline.audit.pixels import GRID

LEAST = 5  # unlike pictures that must have a cell in common
EXCESS = 4.0  # how many times more often here than at other places, for a flag
SHOWN = 50  # groups
SAME = 0.5  # Jaccard index of two cells' pictures from which they are parts of one patch


@detector
class CommonPatch(Detector):
    name = "common_patch"
    title = "the same patch at the same place"
    text = "A part of the picture is the same, at the same place, as in other, unlike pictures, and far more often there than elsewhere."
    source = "ours; the trigger of BadNets (Gu et al. 2017), Blended (Chen et al. 2017) on plain backgrounds, watermarks too"
    needs = ("cells", "hash_N")

    def find(self, data, worst):
        """The score is 1 / excess of the picture's most suspect cell: its unlike pictures (near-duplicates count once), over 1 + those
        expected there. Expected at a place is the mean count of the same cell at all other places: edges and textures are everywhere,
        a patch is not. Flags the lowest scores, `worst` of all at most, and only from EXCESS on.
        """
        near_N = near_groups(data.hash_N)
        found = repeated_cells(data.cells, np.where(near_N >= 0, near_N, data.N + np.arange(data.N)))
        score_N, groups = np.ones(data.N, np.float32), []
        for excess, cell, rows in found:
            np.minimum.at(score_N, rows, np.float32(min(1.0, 1 / excess)))
        score_N[np.isnan(data.score_N)] = np.nan
        for excess, cells, rows in merged(found):
            row, column = np.divmod(np.array(cells), GRID)
            box = (column.min() / GRID, row.min() / GRID, (column.max() + 1) / GRID, (row.max() + 1) / GRID)
            text = f"{len(rows)} pictures share {len(cells)} of {GRID * GRID} cells, {excess:.0f} x as often as elsewhere"
            groups.append(Group("the same patch", text, rows, excess, tuple(float(side) for side in box)))
        return Finding(score_N, lowest(score_N, worst) & (score_N <= 1 / EXCESS), groups)


def repeated_cells(cells, picture_N):
    """[(excess, cell, rows)]: cells' hashes that LEAST unlike pictures or more have at one place, the highest excess first.

    cells: embeddings.Rows; picture_N: int64 (N,), the same number for pictures that are alike.
    """
    kept = []
    for cell in range(GRID * GRID):
        value_N = cells.column(cell)
        there = np.flatnonzero(value_N)
        order = there[np.lexsort((picture_N[there], value_N[there]))]
        value, whole = value_N[order], picture_N[order]
        new = np.r_[True, (value[1:] != value[:-1]) | (whole[1:] != whole[:-1])] if len(order) else np.zeros(0, bool)
        starts = np.flatnonzero(np.diff(value.astype(np.int64), prepend=-1))
        if len(starts):
            unlike = np.add.reduceat(new.astype(np.int64), starts)
            kept.append((cell, order, starts, value[starts], unlike))
    if not kept:
        return []
    value_V, inverse = np.unique(np.concatenate([k[3] for k in kept]), return_inverse=True)
    total_V = np.bincount(inverse, np.concatenate([k[4] for k in kept]))
    found = []
    for cell, order, starts, value, unlike in kept:
        expected = (total_V[np.searchsorted(value_V, value)] - unlike) / (GRID * GRID - 1)
        excess = unlike / (1 + expected)
        ends = np.r_[starts[1:], len(order)]
        for i in np.flatnonzero((unlike >= LEAST) & (excess > 1)):
            found.append((float(excess[i]), cell, order[starts[i] : ends[i]]))
    return sorted(found, key=lambda one: -one[0])


def merged(found):
    """[(excess, cells, rows)]: the SHOWN worst patches above EXCESS, each of the cells whose pictures are much the same."""
    patches = []
    for excess, cell, rows in found:
        if excess < EXCESS:
            break
        for patch in patches:
            both = len(np.intersect1d(patch[2], rows, assume_unique=True))
            if both >= SAME * (len(patch[2]) + len(rows) - both):
                patch[1].append(cell)
                break
        else:
            if len(patches) < SHOWN:
                patches.append((excess, [cell], np.sort(rows)))
    return patches
