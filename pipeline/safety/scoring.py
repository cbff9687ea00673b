"""Scoring: a number for every pair, its cosine or its agreement with other pairs, un-augmented, by all ranks together (METHOD step 3)."""

import numpy as np
import torch

from pipeline import comm
from pipeline.safety.agreement import Voters, choose_voters
from shards.ahead import fetched_ahead
from shards.errors import UserError
from shards.loader import PlainBatches, batches


def assign_shards(counts_S, world, done=()):
    """List of `world` ranges of shard numbers, one after the other, of about equal work. Shards that are `done` are only read."""
    work_S = np.array(counts_S, np.int64)
    work_S[list(done)] = 0
    # A shard goes to the rank in whose part of the work its middle lies.
    rank_S = (2 * np.cumsum(work_S) - work_S) * world // (2 * max(1, work_S.sum()))
    bounds = np.searchsorted(np.minimum(rank_S, world - 1), np.arange(world + 1)).tolist()
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


def shard_batches(offsets_S, shards, batch_size):
    """[(shard, rows)]: batches that never cross a shard, so a pair's batch does not depend on the world size. rows: a range over all shards."""
    return [
        (s, range(start, min(start + batch_size, int(offsets_S[s + 1]))))
        for s in shards
        for start in range(int(offsets_S[s]), int(offsets_S[s + 1]), batch_size)
    ]


@torch.no_grad()
def embed(engine, samples, views, pairs, device, workers=0):
    """Yield (batch, image_BD, text_BD, scale, cos_B) of loader.PlainBatches, with the batch on `device` and the model in eval mode.

    image_BD is the mean over views.scored, of length 1 where there is one view: times text_BD it gives the mean of their cosines.
    cos_B is the cosine of the first of them, NaN where the pair could not be read.
    """
    was_training = getattr(engine, "module", engine).training  # DeepSpeed's engine does not know its own mode
    engine.eval()
    dataset = PlainBatches(samples, pairs, views)
    for batch in fetched_ahead(batches(dataset, workers=workers), dataset):
        here = batch.to(device)
        plain, *others = views.scored(here.images)
        image_BD, text_BD, scale = engine(plain, here.tokens)
        cos_B = (image_BD * text_BD).sum(1).float().masked_fill(~here.valid, float("nan"))
        if others:
            image_BD = torch.stack([image_BD, *(engine(view, None)[0] for view in others)]).mean(0)
        yield here, image_BD, text_BD, scale, cos_B
    engine.train(was_training)


def scores(batch, image_BD, text_BD, row_B, voters=None):
    """float32 (B,), NaN where the pair could not be read: the agreement with `voters`, or the (mean) cosine without. row_B: int64, on the device."""
    score_B = voters.score(row_B, image_BD, text_BD) if voters else (image_BD * text_BD).sum(1).float()
    return score_B.masked_fill(~batch.valid, float("nan"))


def parts_of(row_S, batch_size):
    """(pairs, counts): this rank's part of some pairs in batches for `embed`, the same batches at any world size and as many on every
    rank (ZeRO-3 gathers weights in each), the last ones to be thrown away; and how many of the pairs each rank has."""
    parts = [row_S[at : at + batch_size] for at in range(0, len(row_S), batch_size)]
    by_rank = [[parts[i] for i in numbers] for numbers in np.array_split(np.arange(len(parts)), comm.world())]
    mine, rounds = by_rank[comm.rank()], max(map(len, by_rank))
    pairs = [(part, part) for part in mine + [parts[0]] * (rounds - len(mine))]
    return pairs, [sum(map(len, parts)) for parts in by_rank]


def score_some_pairs(engine, samples, views, batch_size, device, row_S, voters=None):
    """float32 (S,): the scores of the pairs row_S (int64), NaN where there is none, by all ranks together and on every rank."""
    if not len(row_S):
        return np.zeros(0, np.float32)
    pairs, counts = parts_of(row_S, batch_size)
    found = [
        scores(batch, image_BD, text_BD, batch.rows.to(device), voters)
        for batch, image_BD, text_BD, _, _ in embed(engine, samples.scattered(), views, pairs, device)
    ]
    return comm.all_gather_rows(torch.cat(found)[: counts[comm.rank()], None], counts)[:, 0].cpu().numpy()


def gather_voters(engine, samples, views, batch_size, device, count, seed):
    """agreement.Voters embedded by all ranks together; every rank gets the same. Raises UserError where none can be read."""
    row_V = choose_voters(samples.index.samples, count, seed)
    pairs, counts = parts_of(row_V, batch_size)
    rows, scale = [], 1.0
    for batch, image_BD, text_BD, scale, _ in embed(engine, samples.scattered(), views, pairs, device):
        rows.append(torch.cat([image_BD.float(), text_BD.float(), batch.valid[:, None].float()], 1))
    found_VE = comm.all_gather_rows(torch.cat(rows)[: counts[comm.rank()]], counts)
    valid_V, dim = found_VE[:, -1] > 0, found_VE.shape[1] // 2
    if not valid_V.any():
        raise UserError(
            f"selection.voters: none of the {len(row_V)} pairs can be read; bad_samples.jsonl says why, or take more voters"
        )
    row_V = torch.from_numpy(row_V).to(device)
    found_VE, row_V = found_VE[valid_V], row_V[valid_V]
    voters = Voters(row_V, found_VE[:, :dim].contiguous(), found_VE[:, dim:-1].contiguous(), float(scale))
    voters.standardise(*comm.on_main(voters.standardise))  # one rank's numbers: others may round otherwise
    return voters


def score_all_pairs(
    engine,
    samples,
    views,
    batch_size,
    device,
    workers=0,
    files=None,
    each_round=None,
    voters=None,
    singles=None,
    suspicion=None,
    unmarked=None,
    lowered_N=None,
):
    """(score_N, bad): float32 scores of all pairs in (shard, position) order, the same vector on every rank.

    The score is the cosine, or with `voters` (agreement.Voters) the agreement. With `singles` (copies.Singles) a pair that
    is not among them has a cosine but no score, and is never safe; with `suspicion` (suspicion.Suspicion) scores are lowered, by textures
    only those of pairs that are risky in the SafeMask `unmarked`, if it is given; by how much is put into `lowered_N`, float32 zeros of
    comm.host_array. The vector is one copy a host, shared by its ranks (4 bytes a pair). Pairs without a score are NaN; `bad` lists those of this rank that cannot be read as (shard, position, key, reason). Every rank makes the same
    number of forward passes (ZeRO-3 gathers weights in each), repeating a batch where it has fewer. With `files` (scores.ScoreFiles) a
    shard is written as soon as it is scored, what is there is not scored again, and the scores are those that the files hold.
    `each_round(done, rounds)` is called by all ranks after every pass.
    """
    index, world = samples.index, comm.world()
    score_N, bad = comm.host_array(index.samples, np.float32), []
    done = set(comm.broadcast_object(files.done() if files and comm.is_main() else []))
    owned = assign_shards(index.counts, world, done)
    for shard in done.intersection(owned[comm.rank()]):
        here = slice(index.offsets[shard], index.offsets[shard + 1])
        score_N[here], found = files.read(shard)
        bad += found
        if lowered_N is not None:
            lowered_N[here] = files.lowered(shard)
    todo = [shard_batches(index.offsets, [s for s in shards if s not in done], batch_size) for shards in owned]
    mine, rounds = todo[comm.rank()], max(len(batches) for batches in todo)
    filler = next((batch for batches in todo for batch in batches), None)
    parts, found = [], []  # of the shard that is being scored
    pairs = [(rows, rows) for _, rows in mine + [filler] * (rounds - len(mine))]
    for number, (batch, image_BD, text_BD, _, cos_B) in enumerate(
        embed(engine, samples, views, pairs, device, workers)
    ):
        row_B = batch.rows.to(device)
        score_B = scores(batch, image_BD, text_BD, row_B, voters)
        lowered_B = torch.zeros_like(score_B)
        if suspicion:
            # Known on the host: the GPU is not waited for.
            waits = unmarked and torch.from_numpy(np.flatnonzero(~unmarked.at(*index.place(batch.rows.numpy()))))
            lowered_B = suspicion.lowered_by(row_B, batch.images, waits if waits is None else waits.to(device))
        if number < len(mine):
            shard, rows = mine[number]
            parts.append(torch.stack([cos_B, score_B, lowered_B]))
            found += batch.bad
            if rows.stop == index.offsets[shard + 1]:  # only now are they copied: the GPU is not waited for in between
                cos_S, score_S, lowered_S = torch.cat(parts, 1).cpu().numpy()
                copies = singles.copies(shard, index) if singles else []
                score_S[[position for _, position, _, _ in copies]] = np.nan
                if files:
                    score_S = files.write(shard, cos_S, score_S, found + copies, lowered_S)
                else:
                    score_S = score_S - lowered_S
                score_N[index.offsets[shard] : rows.stop] = score_S
                if lowered_N is not None:
                    lowered_N[index.offsets[shard] : rows.stop] = lowered_S
                bad += found
                parts, found = [], []
        if each_round:
            each_round(number + 1, rounds)
    for shared_N in (score_N,) if lowered_N is None else (score_N, lowered_N):
        comm.share_between_hosts(shared_N, [(index.offsets[s.start], index.offsets[s.stop]) for s in owned])
    return score_N, bad
