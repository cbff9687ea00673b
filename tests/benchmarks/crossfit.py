"""The command line with cross-fitting, as `python -m tests.benchmarks.crossfit train CONFIG ...`: no pair is judged by a model fresh from it.

Each SafeCLIP epoch leaves the pairs of one of two random folds out of the CLIP loss, by turns, and only they get new scores at the next
split: standardised within their fold, for two models' cosines are not on one scale. The variant `cross-fit` of
`tests.benchmarks.selection`; in one piece only, what is kept of the other fold is not on disk.
"""

import numpy as np

from pipeline import cli
from pipeline.training import run as running
from shards.masks import SafeMask

honest_scores, honest_mask = running.scores_for, running.mask_for
kept = {}


def fold_of(run):
    return np.random.default_rng(run.config.run.seed).random(run.index.samples) < 0.5


def scores_for(run, epoch, *rest):
    cos_N, canary_C, mean_of = honest_scores(run, epoch, *rest)
    fold_N, first = fold_of(run), not kept
    for fold in (False, True):
        if not first and fold != bool(epoch.number % 2):
            continue  # trained on in the last epoch: what stood before stays
        here = cos_N[fold_N == fold]
        kept[fold] = (here - np.nanmean(here)) / np.nanstd(here)
    score_N = np.empty_like(cos_N)
    for fold, score in kept.items():
        score_N[fold_N == fold] = score
    canary_C = (canary_C - np.nanmean(cos_N)) / np.nanstd(cos_N)
    return np.clip(score_N / 8, -1, 1), np.clip(canary_C / 8, -1, 1), mean_of  # the cosine's range


def mask_for(run, epoch, stop):
    mask = honest_mask(run, epoch, stop)
    return SafeMask.from_flags(run.index.counts, mask.flags() & (fold_of(run) == bool(epoch.number % 2)))


if __name__ == "__main__":
    running.scores_for, running.mask_for = scores_for, mask_for
    cli.main()
