"""Scoring: the cosine of every picture with its own caption, un-augmented, by all ranks together (METHOD step 3)."""

import numpy as np
import torch

from pipeline import comm
from shards.loader import PlainBatches, batches


def assign_shards(counts_S, world, done=()):
    """List of `world` lists of shard numbers: whole shards, the largest first, each to the rank with the least work so far.

    Shards that are `done` are only read, which is no work.
    """
    load, mine = [0] * world, [[] for _ in range(world)]
    for shard in sorted(range(len(counts_S)), key=lambda s: (-counts_S[s], s)):
        rank = shard % world if shard in done else load.index(min(load))
        mine[rank].append(shard)
        load[rank] += 0 if shard in done else int(counts_S[shard])
    return [sorted(shards) for shards in mine]


def shard_batches(counts_S, shards, batch_size):
    """[(shard, start, stop)]: batches that never cross a shard, so a pair's batch does not depend on the world size."""
    return [
        (s, start, min(start + batch_size, int(counts_S[s])))
        for s in shards
        for start in range(0, int(counts_S[s]), batch_size)
    ]


@torch.no_grad()
def score_all_pairs(engine, samples, views, batch_size, device, workers=0, files=None, each_round=None):
    """(cos_N, bad): float32 cosines in [-1, 1] of all pairs in (shard, position) order, the same vector on every rank.

    Pairs that cannot be read are NaN; `bad` lists those of this rank as (shard, position, key, reason). Every rank makes the
    same number of forward passes (ZeRO-3 gathers weights in each), repeating a batch where it has fewer. With `files`
    (scores.ScoreFiles) a shard is written as soon as it is scored, and what is there is not scored again.
    `each_round(done, rounds)` is called by all ranks after every pass.
    """
    index, world = samples.index, comm.world()
    done = set(comm.broadcast_object(files.done() if files and comm.is_main() else []))
    owned = assign_shards(index.counts, world, done)
    todo = [shard_batches(index.counts, [s for s in shards if s not in done], batch_size) for shards in owned]
    mine, rounds = todo[comm.rank()], max(len(batches) for batches in todo)
    filler = next((batch for batches in todo for batch in batches), None)
    scored = {s: files.read(s) if s in done else (np.empty(0, np.float32), []) for s in owned[comm.rank()]}
    parts, bad = [], []  # of the shard that is being scored
    was_training = engine.training
    engine.eval()
    reading = batches(PlainBatches(samples, mine + [filler] * (rounds - len(mine)), views), workers=workers)
    for number, batch in enumerate(reading):
        here = batch.to(device)
        image_BD, text_BD, _ = engine(here.images, here.tokens)
        cos_B = (image_BD * text_BD).sum(1).float().masked_fill(~here.valid, float("nan"))
        if number < len(mine):
            shard, _, stop = mine[number]
            parts.append(cos_B)
            bad += batch.bad
            if stop == index.counts[shard]:
                scored[shard] = torch.cat(parts).cpu().numpy(), bad
                parts, bad = [], []
                if files:
                    files.write(shard, *scored[shard])
        if each_round:
            each_round(number + 1, rounds)
    engine.train(was_training)
    local = np.concatenate([np.empty(0, np.float32)] + [cos for cos, _ in scored.values()])
    counts = [int(index.counts[shards].sum()) for shards in owned]
    gathered = comm.all_gather_rows(torch.from_numpy(local).to(device), counts).cpu().numpy()
    cos_N, start = np.empty(index.samples, np.float32), 0
    for shard in (shard for shards in owned for shard in shards):
        stop = start + int(index.counts[shard])
        cos_N[index.offsets[shard] : index.offsets[shard + 1]] = gathered[start:stop]
        start = stop
    return cos_N, [sample for _, found in scored.values() for sample in found]
