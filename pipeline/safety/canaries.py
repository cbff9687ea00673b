"""Canaries: pairs that are wrong on purpose, and the share of them that passes, for people who cannot know their poison.

Static ones are mismatched pairs that are scored and never trained on: they tell how sharp the cut is. They are no estimate of the poison
that passes: poison that has passed once is trained on and scores higher next time, a static canary never is (METHOD). Live ones are: a
few pairs of the data carry a trigger of the run's own, and those that pass are trained on as any others. Nobody but who knows run.seed
can use the trigger, but should they pass, the model has learnt it: they are none unless they are asked for.
"""

from itertools import islice

import numpy as np
import torch
from scipy.stats import binomtest

from pipeline.attacks.badnets import Patch
from pipeline.attacks.blended import Blend
from pipeline.safety.scoring import embed, scores
from shards.errors import BadSample, UserError
from shards.overlay import Poison

SIZE = 0.25  # of the patch, as a share of the picture's shorter side
LIVE = {  # kind: its trigger of a seed and a place
    "patch": lambda seed, left, top: Patch(seed, size=SIZE, left=left, top=top, cells=8),
    "blended": lambda seed, left, top: Blend(seed, alpha=0.3),
}


def choose(samples, count, seed):
    """(picture_C, caption_C): rows of `count` canaries (fewer where there are fewer than 2 * count pairs), all different.

    Seeded and the same on every rank. With few kinds of captions some of them match by chance.
    """
    count = min(count, samples // 2)
    rows = np.random.default_rng([seed, count]).choice(samples, 2 * count, replace=False)
    return rows[:count], rows[count:]


def score_canaries(engine, samples, views, batch_size, device, count, seed, voters=None):
    """float32 (C,): the scores as of scoring.score_all_pairs, NaN where a sample cannot be read. Every rank scores all of them; there are few."""
    picture_C, caption_C = choose(samples.index.samples, count, seed)
    parts = [slice(at, at + batch_size) for at in range(0, len(picture_C), batch_size)]
    pairs, found = [(picture_C[part], caption_C[part]) for part in parts], []
    for batch, image_BD, text_BD, _, _ in embed(engine, samples.scattered(), views, pairs, device):
        nobody_B = torch.full((len(batch.rows),), -1, device=device)  # a canary is no voter
        found.append(scores(batch, image_BD, text_BD, nobody_B, voters).cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0, np.float32)


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


class LiveCanaries:
    """An overlay (shards.samples) of `count` canaries of each kind. rows: dict kind -> int64 (count,), sorted rows over all shards.

    Each kind has one trigger, at a random place, and one caption, that of some pair. Seeded, the same on every rank.
    """

    def __init__(self, samples, count, seed):
        """No canary is made of a pair that samples.overlay poisons, so that what is known of attacks stays true. Raises UserError."""
        index, rng = samples.index, np.random.default_rng([seed, 2, count])
        drawn = rng.choice(index.samples, min(index.samples, 100 + 4 * count * len(LIVE)), replace=False)
        shard_D, position_D = index.place(drawn)
        places = zip(zip(shard_D.tolist(), position_D.tolist()), drawn.tolist())
        free = iter([(place, row) for place, row in places if not (samples.overlay and samples.overlay.get(*place))])
        self.rows, self.triggers, self.poison = {}, {}, {}
        for kind, trigger in LIVE.items():
            left, top = rng.uniform(0, 1 - SIZE, 2).tolist()
            self.triggers[kind] = trigger(int(rng.integers(2**31)), left, top)
            poison = Poison(kind, readable_caption(samples, free), None)
            chosen = list(islice(free, count))
            if len(chosen) < count:
                raise UserError(
                    f"selection.live_canaries: got {count} of each of {len(LIVE)} kinds, but {index.samples} pairs cannot give them; "
                    "take fewer"
                )
            self.poison |= {place: poison for place, _ in chosen}
            self.rows[kind] = np.sort([row for _, row in chosen])

    def get(self, shard, position):
        return self.poison.get((shard, position))

    def trigger(self, kind):
        return self.triggers[kind]


def readable_caption(samples, free):
    """str: the caption of the next of the ((shard, position), row) that can be read. Raises UserError."""
    for place, _ in free:
        try:
            return samples.caption(*place)
        except BadSample:
            pass
    raise UserError("selection.live_canaries: no caption can be read")
