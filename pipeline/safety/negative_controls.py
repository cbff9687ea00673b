"""Negative controls: mismatched pairs that are scored and never trained on.

The fraction of them above the threshold is the false positive rate of the selection on mismatched captions. It does not
estimate the poison that passes, because poison in the safe set is trained on, which raises its score.
"""

import numpy as np
import torch

from pipeline.distributed import comm
from pipeline.safety.scoring import batches_of, embed
from shards.samples.samples import Samples
from shards.views.batch import Views


def choose(samples: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(picture_C, caption_C): rows of `count` negative controls, all different; fewer if there are fewer than 2 * count
    pairs.

    Seeded, and the same on every rank. With few different captions some controls match by chance.
    """
    count = min(count, samples // 2)
    rows = np.random.default_rng([seed, count]).choice(samples, 2 * count, replace=False)
    return rows[:count], rows[count:]


def score_controls(
    engine: torch.nn.Module,
    samples: Samples,
    views: Views,
    batch_size: int,
    device: torch.device,
    count: int,
    seed: int,
) -> np.ndarray:
    """float32 (C,): scores as by scoring.score_all_pairs, NaN if a sample cannot be read. Each rank scores a part; all
    ranks call, and have all scores."""
    picture_C, caption_C = choose(samples.index.samples, count, seed)
    part_R = np.array_split(np.arange(len(picture_C)), comm.world())
    pairs = [(picture_C[row_B], caption_C[row_B]) for row_B in batches_of(part_R[comm.rank()], batch_size)]
    passes = -(-len(part_R[0]) // batch_size)  # the first part is the longest
    found = [cos_B.cpu().numpy() for _, cos_B in embed(engine, samples.scattered(), views, pairs, device, 0, passes)]
    return np.concatenate(comm.gather_objects(np.concatenate([np.zeros(0, np.float32), *found])))


def passing(score_C: np.ndarray, threshold: float) -> dict[str, float]:
    """{"count", "passed", "fraction", "low", "high"}: controls at or above the threshold, their fraction, and its 95 %
    Wilson interval."""
    from scipy.stats import binomtest  # here: every start would wait for it

    count, passed = int((~np.isnan(score_C)).sum()), int((score_C >= threshold).sum())
    interval = binomtest(passed, count).proportion_ci(method="wilson")
    return {
        "count": count,
        "passed": passed,
        "fraction": passed / count,
        "low": float(interval.low),
        "high": float(interval.high),
    }
