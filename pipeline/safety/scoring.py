"""Scoring: the cosine of every picture with its own caption, un-augmented, by all ranks together (METHOD step 3)."""

import numpy as np
import torch

from pipeline import comm
from shards.loader import PlainBatches, batches


def assign_shards(counts_S, world):
    """List of `world` lists of shard numbers: whole shards, the largest first, each to the rank with the least so far."""
    load, mine = [0] * world, [[] for _ in range(world)]
    for shard in sorted(range(len(counts_S)), key=lambda s: (-counts_S[s], s)):
        rank = load.index(min(load))
        mine[rank].append(shard)
        load[rank] += int(counts_S[shard])
    return [sorted(shards) for shards in mine]


def shard_batches(counts_S, shards, batch_size):
    """[(shard, start, stop)]: batches that never cross a shard, so a pair's batch does not depend on the world size."""
    return [
        (s, start, min(start + batch_size, int(counts_S[s])))
        for s in shards
        for start in range(0, int(counts_S[s]), batch_size)
    ]


@torch.no_grad()
def score_all_pairs(engine, samples, views, batch_size, device, workers=0, progress=None):
    """(cos_N, bad): float32 cosines in [-1, 1] of all pairs in (shard, position) order, the same vector on every rank.

    Pairs that cannot be read are NaN; `bad` lists those of this rank as (shard, position, key, reason). Every rank makes the
    same number of forward passes (ZeRO-3 gathers weights in each), repeating a batch where it has fewer.
    """
    index, world = samples.index, comm.world()
    owned = assign_shards(index.counts, world)
    todo = [shard_batches(index.counts, shards, batch_size) for shards in owned]
    mine, rounds = todo[comm.rank()], max(len(batches) for batches in todo)
    filler = next(batch for batches in todo for batch in batches)
    cos, bad = [], []
    was_training = engine.training
    engine.eval()
    reading = batches(PlainBatches(samples, mine + [filler] * (rounds - len(mine)), views), workers=workers)
    for number, batch in enumerate(reading):
        here = batch.to(device)
        image_BD, text_BD, _ = engine(here.images, here.tokens)
        cos_B = (image_BD * text_BD).sum(1).float().masked_fill(~here.valid, float("nan"))
        if number < len(mine):
            cos.append(cos_B)
            bad += batch.bad
        if progress:
            progress(number + 1, rounds)
    engine.train(was_training)
    local = torch.cat(cos) if cos else torch.zeros(0, device=device)
    counts = [int(index.counts[shards].sum()) for shards in owned]
    gathered = comm.all_gather_rows(local, counts).cpu().numpy()
    cos_N, start = np.empty(index.samples, np.float32), 0
    for shard in (shard for shards in owned for shard in shards):
        stop = start + int(index.counts[shard])
        cos_N[index.offsets[shard] : index.offsets[shard + 1]] = gathered[start:stop]
        start = stop
    return cos_N, bad
