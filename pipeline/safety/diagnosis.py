"""Diagnosis of a selection round: separation of the two components, and change since the previous round."""

import numpy as np

from pipeline.safety.mixture import Mixture
from shards.order.safe_mask import SafeMask

# Recorded first rounds of preset default exclude every attack they aim at on 18,000 pairs and more; on 13,000 they miss
# the colour filter, on 6,000 nearly all (tests/benchmarks/attacks.json).
LEAST_PAIRS = 15_000


def out_of_range(pairs: int) -> str:
    """A warning if there are fewer pairs than in any recorded run that was protected, else ""."""
    if pairs >= LEAST_PAIRS:
        return ""
    return f"{pairs:,} pairs are too few to be protected: recorded runs with less than {LEAST_PAIRS:,} did not hold"


def separation(counts_K: np.ndarray, low: float, high: float, mixture: Mixture) -> dict[str, float]:
    """How well two Gaussians describe the scores of a `mixture.histogram`, and how far apart they are.

    bic_one, bic_two: Bayesian information criterion of one and of two Gaussians, lower is better (Schwarz 1978);
    ashman_d: distance of the means in units of the mean deviation, above 2 for a clear separation (Ashman, Bird and
    Zepf 1994); overlap: fraction of the scores assigned to the wrong component, from 0 to min(weights).
    """
    counts_K = np.asarray(counts_K)
    total, width = int(counts_K.sum()), (high - low) / len(counts_K)
    x = low + (np.arange(len(counts_K)) + 0.5) * width
    mean = (counts_K * x).sum() / total
    # Of one bin it would be 0, whose logarithm JSON does not have.
    variance = max((counts_K * (x - mean) ** 2).sum() / total, width**2 / 12)
    (m0, m1), (s0, s1) = mixture.mean, mixture.std
    parts = [
        w * np.exp(-0.5 * ((x - m) / s) ** 2) / (s * np.sqrt(2 * np.pi))
        for m, s, w in zip(mixture.mean, mixture.std, mixture.weight)
    ]
    return {
        "bic_one": float(total * (np.log(2 * np.pi * variance) + 1) + 2 * np.log(total)),
        "bic_two": float(-2 * total * mixture.log_likelihood + 5 * np.log(total)),
        "ashman_d": float((m1 - m0) / np.sqrt((s0**2 + s1**2) / 2)),
        "overlap": float(np.minimum(*parts).sum() * width),
    }


def change(
    counts_K: np.ndarray, low: float, high: float, mask: SafeMask, before_K: np.ndarray, before: SafeMask
) -> dict[str, float]:
    """Change since the previous round, of which before_K is the histogram and `before` the SafeMask.

    shift: Wasserstein-1 distance of the two histograms, in units of the score; flips_in, flips_out: number of pairs
    that became safe, and that became risky.
    """
    ahead = np.cumsum(counts_K) / max(1, counts_K.sum()) - np.cumsum(before_K) / max(1, before_K.sum())
    flips_in, flips_out = mask.moved(before)
    return {
        "shift": float(np.abs(ahead).sum() * (high - low) / len(counts_K)),
        "flips_in": flips_in,
        "flips_out": flips_out,
    }
