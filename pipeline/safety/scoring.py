"""Scoring: cosine similarity of every picture with its own caption, on all ranks (Yang et al. 2024, section 4). Of
several captions the least similar counts, because training draws any of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pipeline.distributed import comm, hosts
from pipeline.safety.score_files import ScoreFiles, Unread
from shards.samples.samples import Samples
from shards.storage.prefetch import fetched_ahead
from shards.views.batch import Batch, Views
from shards.views.loader import PlainBatches, Rows
from shards.views.readers import Readers, batches

NO_ROWS = np.zeros(0, np.int64)
Take = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]  # pictures, uint8 (B, C, H, W) -> {name: (B, ...)}


@dataclass(frozen=True)
class Scored:
    """Scored pairs: rows over all shards, int64 (B,); their cosines, float32 (B,), NaN = unreadable; why these cannot
    be read; and what else was taken from each picture, {name: (B, ...)}."""

    row_B: np.ndarray
    cos_B: torch.Tensor
    bad: list[Unread]
    numbers: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Reading(NamedTuple):
    """The model, and the pairs that it scores. batch_size: pairs a rank forwards at a time."""

    engine: torch.nn.Module
    samples: Samples
    views: Views
    batch_size: int
    device: torch.device
    workers: int | Readers = 0


class PictureNumbers(Protocol):
    """What is taken from each picture in the pass that scores it, by name. row_K: int64, ascending, pairs that were
    scored before the pass."""

    names: tuple[str, ...]
    row_K: np.ndarray

    def begin(self, owned: Sequence[range]) -> None:
        """owned[r]: shards of rank r, in this pass."""

    def take(self, images_BCHW: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """{name: (B,)} of unaugmented pictures, uint8, on the device."""

    def known(self, shard: int) -> list[Scored]:
        """Pairs of a shard among row_K."""

    def keep(self, shard: int, cos_P: np.ndarray, numbers: Mapping[str, np.ndarray]) -> None:
        """Called for each shard of this rank, with the cosines and numbers of all its pairs."""


class ShardBatches(Sequence[tuple[np.ndarray, np.ndarray]]):
    """Batches of pairs for loader.PlainBatches, each within one of the `shards`, in order: what a batch holds does not
    depend on the number of ranks. row_K: rows that are left out, ascending. sizes: batches of each shard."""

    def __init__(
        self, offsets_S: np.ndarray, shards: Sequence[int], batch_size: int, row_K: np.ndarray = NO_ROWS
    ) -> None:
        self.offsets_S, self.shards, self.batch_size, self.row_K = offsets_S, list(shards), batch_size, row_K
        left_S = np.diff(offsets_S) - np.diff(np.searchsorted(row_K, offsets_S))
        self.sizes = -(-left_S[self.shards] // batch_size)
        self.ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[override]  # no slices
        nth = int(np.searchsorted(self.ends, number, "right"))
        start, stop = self.offsets_S[self.shards[nth] :][:2]
        first, last = np.searchsorted(self.row_K, [start, stop])
        row_P = np.setdiff1d(np.arange(start, stop), self.row_K[first:last], assume_unique=True)
        at = (number - (self.ends[nth] - self.sizes[nth])) * self.batch_size
        row_B = row_P[at : at + self.batch_size]
        return row_B, row_B


def batches_of(row_B: np.ndarray, size: int) -> list[np.ndarray]:
    return [row_B[at : at + size] for at in range(0, len(row_B), size)]


def assign_shards(
    counts_S: np.ndarray | Sequence[int], world: int, done: Iterable[int] = (), known_S: np.ndarray | int = 0
) -> list[range]:
    """`world` consecutive ranges of shard numbers with about equal work. Pairs that are only read, those of shards that
    are `done` and known_S of the others, count a hundredth."""
    work_S = 100 * np.array(counts_S, np.int64) - 99 * known_S
    work_S[list(done)] = np.asarray(counts_S)[list(done)]
    # A shard is assigned to the rank whose part of the work contains the middle of the shard.
    rank_S = (2 * np.cumsum(work_S) - work_S) * world // (2 * max(1, work_S.sum()))
    bounds = np.searchsorted(np.minimum(rank_S, world - 1), np.arange(world + 1)).tolist()
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:])]


@torch.no_grad()  # not inference_mode: ZeRO-3 keeps small weights that were gathered here for the next training step
def embed(
    engine: torch.nn.Module,
    samples: Samples,
    views: Views,
    pairs: Sequence[tuple[Rows, Rows]],
    device: torch.device,
    workers: int | Readers = 0,
    passes: int = 0,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield (batch, cos_B) of loader.PlainBatches, with the batch on `device` and the model in eval mode.

    cos_B: float32 (B,), the cosine of each picture with its least similar caption, NaN where the pair could not be
    read. passes: forward passes of each rank, the last ones of blank pairs, because ZeRO-3 gathers weights in each; a
    batch of these has no rows.
    """
    was_training = getattr(engine, "module", engine).training  # DeepSpeed's engine does not know its own mode
    engine.eval()
    dataset = PlainBatches(samples, pairs, views)
    reading = workers.batches(dataset) if isinstance(workers, Readers) else batches(dataset, workers=workers)
    for batch in fetched_ahead(reading, dataset):
        here = batch.to(device)
        image_BD, text_TD, _ = engine(here.images, here.tokens)
        text_BD = text_TD if here.caption_of is None else text_TD[least_similar(image_BD, text_TD, here.caption_of)]
        yield here, (image_BD * text_BD).sum(1).float().masked_fill(~here.valid, float("nan"))
    for _ in range(passes - len(pairs)):
        images = torch.zeros(1, 3, views.size, views.size, dtype=torch.uint8)
        blank = Batch(images, views.tokenize([""]), torch.zeros(1, dtype=torch.bool), torch.zeros(1), []).to(device)
        engine(blank.images, blank.tokens)
        no_rows = torch.zeros(0, dtype=torch.int64)
        yield Batch(blank.images[:0], blank.tokens[:0], blank.valid[:0], no_rows, []), torch.zeros(0, device=device)
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


def nothing(images_BCHW: torch.Tensor) -> Mapping[str, torch.Tensor]:
    return {}


def score_batches(
    reading: Reading,
    pairs: Sequence[tuple[Rows, Rows]],
    passes: int,
    take: Take,
    each_round: Callable[[int, int], None] | None = None,
) -> Iterator[Scored]:
    """Yield each batch of pairs, scored, with what `take` gives of its pictures. Takes part in the `passes` that all
    ranks agreed on, after each of which all call each_round(done, passes)."""
    engine, samples, views, _, device, workers = reading
    found = embed(engine, samples, views, pairs, device, workers, passes)
    for number, (batch, cos_B) in enumerate(found):
        if number < len(pairs):
            yield Scored(batch.rows.numpy(), cos_B, batch.bad, take(batch.images))
        if each_round:
            each_round(number + 1, passes)


def score_all_pairs(
    engine: torch.nn.Module,
    samples: Samples,
    views: Views,
    batch_size: int,
    device: torch.device,
    workers: int | Readers = 0,
    files: ScoreFiles | None = None,
    each_round: Callable[[int, int], None] | None = None,
    numbers: PictureNumbers | None = None,
) -> tuple[np.ndarray, list[Unread]]:
    """(score_N, bad): the float32 cosines of all pairs in (shard, position) order, the same vector on every rank.

    The vector is one copy per host, shared by its ranks (4 bytes per pair). Pairs without a score are NaN; `bad` lists
    those of this rank that cannot be read. With `files` a shard is written as soon as it is scored, and shards that
    have a file are read instead of scored. each_round(done, passes): called by all ranks after every forward pass.
    """
    index, world = samples.index, comm.world()
    score_N, bad = hosts.host_array(index.samples, np.float32), []
    listed = comm.broadcast_object(files.claim() if files and comm.is_rank0() else None)
    done = set(listed.done() if listed else ())
    row_K = numbers.row_K if numbers else NO_ROWS
    owned = assign_shards(index.counts, world, done, np.diff(np.searchsorted(row_K, index.offsets)))
    if numbers:
        numbers.begin(owned)

    def finish(shard: int, cos_P: np.ndarray, unread: list[Unread], values: Mapping[str, np.ndarray]) -> None:
        score_N[index.offsets[shard] : index.offsets[shard + 1]] = cos_P
        bad.extend(unread)
        if numbers:
            numbers.keep(shard, cos_P, values)

    names = numbers.names if numbers else ()
    for shard in sorted(done.intersection(owned[comm.rank()])):
        finish(shard, *files.read(shard, listed), files.numbers(shard, names, listed))
    left = [ShardBatches(index.offsets, [s for s in shards if s not in done], batch_size, row_K) for shards in owned]
    mine, passes = left[comm.rank()], max(map(len, left))
    reading = Reading(engine, samples, views, batch_size, device, workers)
    found = score_batches(reading, mine, passes, numbers.take if numbers else nothing, each_round)
    for shard, size in zip(mine.shards, mine.sizes):
        parts = list(islice(found, size))
        if not index.counts[shard]:
            continue
        parts += numbers.known(shard) if numbers else []
        whole = whole_shard(parts, int(index.offsets[shard]), int(index.counts[shard]))
        if files:
            cos_P, unread, values = whole
            files.write(shard, cos_P, {position: reason for _, position, _, reason in unread}, values)
        finish(shard, *whole)
    for _ in found:  # forward passes that only other ranks need
        pass
    hosts.share_between_hosts(score_N, [(index.offsets[s.start], index.offsets[s.stop]) for s in owned])
    return score_N, bad


def whole_shard(
    parts: Sequence[Scored], start: int, count: int
) -> tuple[np.ndarray, list[Unread], dict[str, np.ndarray]]:
    """(cosines, what cannot be read, numbers) of all pairs of a shard that starts at the row `start`, by position."""
    position_P = np.concatenate([part.row_B for part in parts]) - start
    order_P = np.argsort(position_P)
    if not np.array_equal(position_P[order_P], np.arange(count)):
        raise RuntimeError(f"{len(position_P)} pairs of a shard of {count} were scored")
    # One copy of each number per shard, so that the GPU is not synchronized per batch.
    cos_P = joined([part.cos_B for part in parts])[order_P]
    numbers = {name: joined([part.numbers[name] for part in parts])[order_P] for name in parts[0].numbers}
    return cos_P, [sample for part in parts for sample in part.bad], numbers


def joined(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """All parts in one, on the host; those that lie there already are the last ones."""
    here = [part for part in parts if part.device.type == "cpu"]
    there = [part for part in parts if part.device.type != "cpu"]
    return torch.cat(([torch.cat(there).cpu()] if there else []) + here).numpy()
