"""Canaries: mismatched pairs that are scored and never trained on.

The share of them that the cut would let in tells people who cannot know their poison how sharp the cut is. It is no estimate of the poison
that passes: poison that has passed once is trained on and scores higher next time, a canary never is (METHOD).
"""

import numpy as np
import torch
from scipy.stats import binomtest
from torch.utils.data import Dataset

from shards.augment import least_side, plain_view
from shards.loader import batches, collate


def choose(samples, count, seed):
    """(picture_C, caption_C): rows of `count` canaries (fewer where there are fewer than 2 * count pairs), all different.

    Seeded and the same on every rank. With few kinds of captions some of them match by chance.
    """
    count = min(count, samples // 2)
    rows = np.random.default_rng([seed, count]).choice(samples, 2 * count, replace=False)
    return rows[:count], rows[count:]


class CanaryBatches(Dataset):
    """Item i: the un-augmented rows of canaries i * size to (i + 1) * size."""

    def __init__(self, samples, views, picture_C, caption_C, size):
        self.samples, self.views, self.size = samples, views, size
        self.picture_C, self.caption_C = picture_C, caption_C

    def __len__(self):
        return -(-len(self.picture_C) // self.size)

    def __getitem__(self, i):
        part = slice(i * self.size, (i + 1) * self.size)
        places = list(zip(*self.place(self.picture_C[part])))
        partner = dict(zip(places, zip(*self.place(self.caption_C[part]))))

        def read(shard, position):
            caption = self.samples.caption(*map(int, partner[shard, position]))
            image = self.samples.image(shard, position, least_side(self.views.size))
            return [(plain_view(image, self.views.size), caption)]

        shard_B, position_B = np.array(places, np.int64).T
        return collate(self.samples, self.views, shard_B, position_B, read, 1)

    def place(self, row_B):
        """(shard, position) of rows."""
        offsets = self.samples.index.offsets
        shard_B = np.searchsorted(offsets, row_B, "right") - 1
        return shard_B, row_B - offsets[shard_B]


@torch.no_grad()
def score_canaries(engine, samples, views, batch_size, device, count, seed):
    """float32 (C,): the cosines, NaN where a sample cannot be read. Every rank scores all of them; there are few."""
    picture_C, caption_C = choose(samples.index.samples, count, seed)
    was_training = getattr(engine, "module", engine).training
    engine.eval()
    parts = []
    for batch in batches(CanaryBatches(samples, views, picture_C, caption_C, batch_size)):
        here = batch.to(device)
        image_BD, text_BD, _ = engine(here.images, here.tokens)
        cos_B = (image_BD * text_BD).sum(1).float().masked_fill(~here.valid, float("nan"))
        parts.append(cos_B.cpu().numpy())
    engine.train(was_training)
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def passing(score_C, cut):
    """{"count", "passed", "share", "low", "high"}: canaries at or above the cut, and Wilson's interval of their share at 95 %."""
    count, passed = int((~np.isnan(score_C)).sum()), int((score_C >= cut).sum())
    interval = binomtest(passed, count).proportion_ci(method="wilson")
    return {
        "count": count,
        "passed": passed,
        "share": passed / count,
        "low": float(interval.low),
        "high": float(interval.high),
    }
