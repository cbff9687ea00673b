"""Scoring: cosine similarity of every picture with its own caption, on all ranks (Yang et al. 2024, section 4). Of
several captions the least similar counts, because training draws any of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from pipeline.distributed import comm, hosts
from pipeline.safety.score_files import ScoreFiles, Unread
from shards.samples.samples import Samples
from shards.storage.prefetch import fetched_ahead
from shards.views.loader import Batch, PlainBatches, Views, batches


def assign_shards(counts_S: np.ndarray | Sequence[int], world: int, done: Iterable[int] = ()) -> list[range]:
    """`world` consecutive ranges of shard numbers with about equal work. Shards that are `done`, and only read, count a
    hundredth."""
    work_S = 100 * np.array(counts_S, np.int64)
    work_S[list(done)] //= 100
    # A shard is assigned to the rank whose part of the work contains the middle of the shard.
    rank_S = (2 * np.cumsum(work_S) - work_S) * world // (2 * max(1, work_S.sum()))
    bounds = np.searchsorted(np.minimum(rank_S, world - 1), np.arange(world + 1)).tolist()
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


def shard_batches(offsets_S: np.ndarray, shards: Iterable[int], batch_size: int) -> list[tuple[int, range]]:
    """[(shard, rows)]: batches within one shard each, independent of the world size. rows: range over all shards."""
    return [
        (s, range(start, min(start + batch_size, int(offsets_S[s + 1]))))
        for s in shards
        for start in range(int(offsets_S[s]), int(offsets_S[s + 1]), batch_size)
    ]


@torch.no_grad()
def embed(
    engine: torch.nn.Module,
    samples: Samples,
    views: Views,
    pairs: Sequence[tuple[range | np.ndarray, range | np.ndarray]],
    device: torch.device,
    workers: int = 0,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield (batch, cos_B) of loader.PlainBatches, with the batch on `device` and the model in eval mode.

    cos_B: float32 (B,), the cosine of each picture with its least similar caption, NaN where the pair could not be
    read.
    """
    was_training = getattr(engine, "module", engine).training  # DeepSpeed's engine does not know its own mode
    engine.eval()
    dataset = PlainBatches(samples, pairs, views)
    for batch in fetched_ahead(batches(dataset, workers=workers), dataset):
        here = batch.to(device)
        image_BD, text_TD, _ = engine(here.images, here.tokens)
        text_BD = text_TD if here.caption_of is None else text_TD[least_similar(image_BD, text_TD, here.caption_of)]
        yield here, (image_BD * text_BD).sum(1).float().masked_fill(~here.valid, float("nan"))
    engine.train(was_training)


def least_similar(image_BD: torch.Tensor, text_TD: torch.Tensor, caption_of_T: torch.Tensor) -> torch.Tensor:
    """int64 (B,): for each picture the row of text_TD with the least cosine among its captions; the first of equal
    ones.

    caption_of_T: int64 (T,), ascending: the picture of each text; every picture has one.
    """
    cos_T = (image_BD[caption_of_T] * text_TD).sum(1)
    by_cosine_T = cos_T.argsort(stable=True)
    order_T = by_cosine_T[caption_of_T[by_cosine_T].argsort(stable=True)]  # of each picture the least comes first
    first_B = torch.searchsorted(caption_of_T, torch.arange(len(image_BD), device=caption_of_T.device))
    return order_T[first_B]


def score_all_pairs(
    engine: torch.nn.Module,
    samples: Samples,
    views: Views,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    files: ScoreFiles | None = None,
    each_round: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, list[Unread]]:
    """(score_N, bad): the float32 cosines of all pairs in (shard, position) order, the same vector on every rank.

    The vector is one copy per host, shared by its ranks (4 bytes per pair). Pairs without a score are NaN; `bad` lists
    those of this rank that cannot be read. Every rank runs the same number of forward passes, because ZeRO-3 gathers
    weights in each; a rank with fewer batches repeats one. With `files` a shard is written as soon as it is scored, and
    shards that have a file are read instead of scored. each_round(done, rounds): called by all ranks after every
    forward pass.
    """
    index, world = samples.index, comm.world()
    score_N, bad = hosts.host_array(index.samples, np.float32), []
    listed = comm.broadcast_object(files.claim() if files and comm.is_rank0() else None)
    done = set(listed.done() if listed else ())
    owned = assign_shards(index.counts, world, done)
    for shard in done.intersection(owned[comm.rank()]):
        score_N[index.offsets[shard] : index.offsets[shard + 1]], found = files.read(shard, listed)
        bad += found
    todo = [shard_batches(index.offsets, [s for s in shards if s not in done], batch_size) for shards in owned]
    mine, rounds = todo[comm.rank()], max(len(batches) for batches in todo)
    filler = next((batch for batches in todo for batch in batches), None)
    parts, found = [], []  # of the shard that is being scored
    pairs = [(rows, rows) for _, rows in mine + [filler] * (rounds - len(mine))]
    for number, (batch, cos_B) in enumerate(embed(engine, samples, views, pairs, device, workers)):
        if number < len(mine):
            shard, rows = mine[number]
            parts.append(cos_B)
            found += batch.bad
            if (
                rows.stop == index.offsets[shard + 1]
            ):  # one copy per shard, so that the GPU is not synchronized per batch
                cos_S = torch.cat(parts).cpu().numpy()
                if files:
                    files.write(shard, cos_S, {position: reason for _, position, _, reason in found})
                score_N[index.offsets[shard] : rows.stop] = cos_S
                bad += found
                parts, found = [], []
        if each_round:
            each_round(number + 1, rounds)
    hosts.share_between_hosts(score_N, [(index.offsets[s.start], index.offsets[s.stop]) for s in owned])
    return score_N, bad
