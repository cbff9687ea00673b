"""Detection quality of findings and masks against the ground truth of an attack manifest."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from pipeline.audit.blocks import blocks
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Finding

POINTS = 50  # of a curve, along an axis
FRACTIONS = (0.001, 0.01)


def judge(score_N: np.ndarray, poison: np.ndarray, clean: np.ndarray) -> dict:
    """For rows `poison` against rows `clean`: auroc, average_precision, roc and pr as lists of [x, y]. NaN counts
    as the middle.

    A low score says poison. roc: false against true positive rate; pr: recall against precision.
    """
    poison_P, clean_C = score_N[poison], score_N[clean]
    both = np.concatenate([poison_P, clean_C])
    middle = float(np.nanmedian(both)) if not np.isnan(both).all() else 0.5
    del both
    place, weight, truth = condensed(np.nan_to_num(poison_P, nan=middle), np.nan_to_num(clean_C, nan=middle))
    fpr, tpr, _ = roc_curve(truth, -place, sample_weight=weight)
    precision, recall, _ = precision_recall_curve(truth, -place, sample_weight=weight)
    return {
        "auroc": float(roc_auc_score(truth, -place, sample_weight=weight)),
        "average_precision": float(average_precision_score(truth, -place, sample_weight=weight)),
        "roc": thinned(fpr, tpr, (fpr, tpr)),
        "pr": thinned(recall[::-1], precision[::-1], (recall[::-1],)),
    }


def condensed(poison_P: np.ndarray, clean_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places, weights, truth): the scores by their order alone, each once with the number of pairs that have it; clean
    pairs between two scores of poison are one. No curve changes its corners by that, and few points are left of N."""
    step_U, poison_U = np.unique(poison_P, return_counts=True)
    clean_S = np.zeros(2 * len(step_U) + 1, np.int64)  # between the steps, and at odd places on them
    for part in blocks(len(clean_C)):
        below_B = np.searchsorted(step_U, clean_C[part])
        equal_B = step_U[np.minimum(below_B, len(step_U) - 1)] == clean_C[part]
        clean_S += np.bincount(2 * below_B + equal_B, minlength=len(clean_S))
    some = np.flatnonzero(clean_S)
    place = np.concatenate([2 * np.arange(len(step_U)) + 1, some])
    weight = np.concatenate([poison_U, clean_S[some]])
    return place, weight, np.r_[np.ones(len(step_U)), np.zeros(len(some))]


def thinned(x: np.ndarray, y: np.ndarray, along: Sequence[np.ndarray]) -> list[list[float]]:
    """[[x, y]]: the ends, and the points where each of `along`, which rise from 0 to 1, passes POINTS even steps."""
    steps = [np.searchsorted(rising, np.linspace(0, 1, POINTS)) for rising in along]
    keep = np.unique(np.concatenate([[0, len(x) - 1], *steps]).clip(max=len(x) - 1))
    return [[round(float(a), 5), round(float(b), 5)] for a, b in zip(x[keep], y[keep])]


def precision_at(score_N: np.ndarray, poison_N: np.ndarray, fraction: float) -> float:
    """Fraction of poison among the `fraction` of the pairs with the lowest scores; the expected one
    when the last ones are tied."""
    score_N = np.nan_to_num(score_N, nan=1.0)
    count = max(1, round(fraction * len(score_N)))
    last = np.partition(score_N, count - 1)[count - 1]
    below, equal = score_N < last, score_N == last
    hits = poison_N[below].sum() + (count - below.sum()) * poison_N[equal].mean()
    return float(hits / count)


def against_truth(data: AuditData, found: dict[str, Finding], suspect: Finding) -> dict:
    """For audit.json: per detector and kind of attack `judge`, per detector precision at FRACTIONS, per round that
    of the mask.

    Of a kind, the poison of the other kinds is left out; precision counts all poison. {} without a manifest, and where
    it leaves no pair clean, for then nothing can be told from poison.
    """
    kinds = data.truth()
    poison_N = np.zeros(data.N, bool)
    for rows in kinds.values():
        poison_N[rows] = True
    clean = np.flatnonzero(~poison_N)
    if not kinds or not len(clean):
        return {}
    detectors = {}
    for name, finding in {"combined": suspect, **found}.items():
        detectors[name] = {
            "attacks": {kind: judge(finding.score_N, rows, clean) for kind, rows in kinds.items()},
            "precision": {f"{fraction:g}": precision_at(finding.score_N, poison_N, fraction) for fraction in FRACTIONS},
        }
    masks = []
    for saved in data.rounds or [data.saved]:
        risky_N = ~saved.mask.flags()
        masks.append(
            {
                "epoch": saved.meta["epoch"],
                "safe_fraction": saved.mask.fraction,
                "precision": float(poison_N[risky_N].mean()) if risky_N.any() else None,
                "recall": float(risky_N[poison_N].mean()),
                "recall_by_attack": {kind: float(risky_N[rows].mean()) for kind, rows in kinds.items()},
            }
        )
    return {"poison": {kind: len(rows) for kind, rows in kinds.items()}, "detectors": detectors, "masks": masks}
