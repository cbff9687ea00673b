"""Negative controls: mismatched pairs that are scored and never trained on, for people who cannot know their poison.

The fraction of them that would pass tells how sharp the threshold is. It is no estimate of the poison that passes: poison that
has passed once is trained on and scores higher next time, a control never is.
"""

import numpy as np
from scipy.stats import binomtest

from pipeline.safety.scoring import embed


def choose(samples, count, seed):
    """(picture_C, caption_C): rows of `count` negative controls (fewer where there are fewer than 2 * count pairs), all
    different.

    Seeded and the same on every rank. With few kinds of captions some of them match by chance.
    """
    count = min(count, samples // 2)
    rows = np.random.default_rng([seed, count]).choice(samples, 2 * count, replace=False)
    return rows[:count], rows[count:]


def score_controls(engine, samples, views, batch_size, device, count, seed):
    """float32 (C,): the scores as of scoring.score_all_pairs, NaN where a sample cannot be read. Every rank scores all
    of them; there are few."""
    picture_C, caption_C = choose(samples.index.samples, count, seed)
    parts = [slice(at, at + batch_size) for at in range(0, len(picture_C), batch_size)]
    pairs = [(picture_C[part], caption_C[part]) for part in parts]
    found = [cos_B.cpu().numpy() for _, cos_B in embed(engine, samples.scattered(), views, pairs, device)]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def passing(score_C, threshold):
    """{"count", "passed", "fraction", "low", "high"}: negative controls at or above the threshold, and Wilson's interval of their fraction
    at 95 %."""
    count, passed = int((~np.isnan(score_C)).sum()), int((score_C >= threshold).sum())
    interval = binomtest(passed, count).proportion_ci(method="wilson")
    return {
        "count": count,
        "passed": passed,
        "fraction": passed / count,
        "low": float(interval.low),
        "high": float(interval.high),
    }
