"""A map of the pictures' embeddings for the report: flagged pairs among a sample of all others."""

import numpy as np
from sklearn.manifold import TSNE

from pipeline.audit.blocks import worst_rows
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Finding
from pipeline.audit.detectors.neighbourhood import unit
from pipeline.audit.report_items import Items

SUSPECTS, OTHERS = 500, 1000  # points at most: flagged pairs, the worst first, and others, drawn at random
DIMENSIONS, STEPS = 50, 500  # principal components that t-SNE starts from, and its iterations
PERPLEXITY = 30
SIDE = 1000  # places on the map are whole numbers up to this


def embedding_map(data: AuditData, items: Items, suspect: Finding) -> dict | None:
    """{suspects: [[x, y, number of the item]], others: [[x, y, key, caption]], flagged, pairs}; None with
    fewer than two embeddings. Adds the suspects to `items`."""
    if data.images is None or not len(data.images):
        return None
    scored_N = ~np.isnan(data.score_N)
    shown, flagged_N = flagged_rows(items.found, suspect, scored_N)
    left = np.flatnonzero(scored_N & ~flagged_N)
    others = np.sort(np.random.default_rng(0).choice(left, min(OTHERS, len(left)), replace=False))
    if len(shown) + len(others) < 2:
        return None
    place_M2 = places(unit(data.images.take(np.r_[shown, others].astype(np.int64))))
    return {
        "suspects": [[*place, items.add(row)] for place, row in zip(place_M2.tolist(), shown)],
        "others": [
            [*place, item["k"], item["c"]]
            for place, item in zip(place_M2[len(shown) :].tolist(), items.plain(others.tolist()))
        ],
        "flagged": int(flagged_N.sum()),
        "pairs": data.N,
    }


def flagged_rows(found: dict[str, Finding], suspect: Finding, scored_N: np.ndarray) -> tuple[list[int], np.ndarray]:
    """(SUSPECTS rows at most, bool (N,)): of the rows with a score that are suspect, or flagged by a detector, those to
    show, and all. SUSPECTS // 2 suspects come first, then the others and those of each detector in turn, the worst
    first."""
    queues, flagged_N = [], np.zeros(len(scored_N), bool)
    for finding in (suspect, *found.values()):
        here_N = finding.issue_N & scored_N
        flagged_N |= here_N
        queues.append(worst_rows(finding.score_N, 2 * SUSPECTS, here_N))
    first, queues[0] = np.split(queues[0], [SUSPECTS // 2])
    turn = np.concatenate([np.arange(len(queue)) for queue in queues])
    in_turn = np.concatenate(queues)[np.argsort(turn, kind="stable")]
    return list(dict.fromkeys([*first.tolist(), *in_turn.tolist()]))[:SUSPECTS], flagged_N


def places(row_MD: np.ndarray) -> np.ndarray:
    """int64 (M, 2) in 0..SIDE, wider than high. The same rows have the same places.

    t-SNE (van der Maaten and Hinton, JMLR 2008) of the rows' principal components; these alone where there are too few
    rows or no differences.
    """
    left_MP, size_P, _ = np.linalg.svd(row_MD - row_MD.mean(0), full_matrices=False)
    part_MP = (left_MP * size_P)[:, :DIMENSIONS]
    place_M2 = np.pad(part_MP, ((0, 0), (0, 1)))[:, :2]  # the width may be 1
    if len(row_MD) >= 10 and np.ptp(place_M2[:, 0]) > 1e-6:
        perplexity = min(PERPLEXITY, (len(row_MD) - 1) // 3)
        tsne = TSNE(init=place_M2 / place_M2[:, 0].std() * 1e-4, perplexity=perplexity, max_iter=STEPS, random_state=0)
        place_M2 = tsne.fit_transform(part_MP)
    span_2 = np.ptp(place_M2, axis=0)
    place_M2 = (place_M2 - place_M2.min(0)) / max(span_2.max(), 1e-12)
    return np.rint(place_M2[:, np.argsort(-span_2, kind="stable")] * SIDE).astype(np.int64)
