"""A random sample of the pairs that is scored before all others, with the features of its pictures: guards learn on it,
and know what to look for in the pass over the others."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.distributed import comm
from pipeline.guards.features import take
from pipeline.safety.score_files import claim
from pipeline.safety.scoring import Reading, Scored, batches_of, joined, score_batches
from shards.samples.samples import Samples
from shards.storage.files import write_bytes

if TYPE_CHECKING:
    from pipeline.guards.base import Guard

CHUNK = 4_096  # pairs of a file


def dtype(name: str) -> type[np.generic]:
    """Of the feature `name`."""
    return np.int64 if name == "hash" else np.uint8


class Sample:
    """row_R: the rows of the sample, in random order; cos_R: their cosines, NaN = unreadable; row_K: the same rows in
    ascending order; learnt: the guards that have learnt on it, in order.

    FOLDER/00007.parquet has rows 7 * CHUNK to 8 * CHUNK of row_K: row, cosine, reason (why it cannot be read), and the
    bytes of each feature.
    """

    def __init__(self, folder: Path, samples: Samples, size: int, features: Iterable[str], seed: int):
        count = samples.index.samples
        self.folder, self.samples, self.names = folder, samples, tuple(features)
        self.row_R = np.random.default_rng([seed, 3]).choice(count, size, replace=False)
        self.row_K = np.sort(self.row_R)
        self.learnt: list[Guard] = []
        self.chunks = [self.row_K[at : at + CHUNK] for at in range(0, size, CHUNK)]

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.parquet"

    def score(self, reading: Reading, made: Mapping, each_round: Callable[[int, int], None] | None = None) -> None:
        """Score the chunks that have no file of this model yet. All ranks call. made: of which model and config a file
        is."""
        done = comm.on_rank0(self.claim, {**made, "pairs": len(self.row_K), "features": list(self.names)})
        if len(self.row_K) < self.samples.index.samples:
            reading = reading._replace(samples=self.samples.scattered())
        left = [chunk for chunk in range(len(self.chunks)) if chunk not in done]
        todo = [
            {chunk: batches_of(self.chunks[chunk], reading.batch_size) for chunk in left[rank :: comm.world()]}
            for rank in range(comm.world())
        ]
        mine, passes = todo[comm.rank()], max(sum(map(len, some.values())) for some in todo)
        pairs = [(row_B, row_B) for some in mine.values() for row_B in some]
        found = score_batches(reading, pairs, passes, lambda images: take(images, self.names), each_round)
        for chunk, some in mine.items():
            self.write(chunk, list(islice(found, len(some))))
        for _ in found:  # forward passes that only other ranks need
            pass
        comm.barrier()
        parts = [self.read(chunk, ["cosine"])["cosine"].to_numpy() for chunk in range(len(self.chunks))]
        cos_K = np.concatenate([np.zeros(0, np.float32), *parts])
        self.cos_R = cos_K[np.searchsorted(self.row_K, self.row_R)]

    def claim(self, made: dict) -> set[int]:
        """Numbers of the chunks that are done. Rank 0 calls."""
        claim(self.folder, made)
        # Not file by file: NFS remembers for a while that a file was missing, though another host writes it meanwhile.
        there = set(os.listdir(self.folder))
        return {chunk for chunk in range(len(self.chunks)) if self.path(chunk).name in there}

    def write(self, chunk: int, parts: Sequence[Scored]) -> None:
        offsets, file = self.samples.index.offsets, io.BytesIO()
        why = {int(offsets[shard]) + position: reason for part in parts for shard, position, _, reason in part.bad}
        columns = {"row": self.chunks[chunk], "cosine": joined([part.cos_B for part in parts])}
        columns["reason"] = pa.array([why.get(row) for row in self.chunks[chunk].tolist()], pa.string())
        for name in self.names:
            columns[name] = as_binary(joined([part.numbers[name] for part in parts]))
        pq.write_table(pa.table(columns), file)
        write_bytes(self.path(chunk), file.getbuffer())

    def read(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        return pq.read_table(self.path(chunk), columns=list(columns))

    def features(self, row_S: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """{name: (S, ...)}: features of some of the rows, ascending."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        chunk_S = np.searchsorted(self.row_K, row_S) // CHUNK
        for chunk in np.unique(chunk_S).tolist() or range(len(self.chunks))[:1]:  # of no rows the width counts
            table, at = self.read(chunk, names), np.searchsorted(self.chunks[chunk], row_S[chunk_S == chunk])
            for name in names:
                found[name].append(from_binary(table[name], dtype(name))[at])
        return {
            name: np.concatenate(parts) if parts else np.zeros((0, 1), dtype(name)) for name, parts in found.items()
        }

    def low_and_high(self, fraction: float, count: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        """Sorted rows: of at most `count` pairs of the lowest `fraction` of the cosines, and of at most 2 * `count`
        above their median; without those whose pictures an earlier guard excludes."""
        low, high = low_and_high(self.cos_R, self.row_R, fraction, count)
        return self.left(low, device), self.left(high, device)

    def left(self, row_S: np.ndarray, device: torch.device) -> np.ndarray:
        """The rows whose pictures no guard of `learnt` excludes."""
        for guard in self.learnt:
            if guard.dtype == np.bool_ and guard.features:
                seen = self.features(row_S, guard.features)
                excluded_S = guard.numbers({name: torch.from_numpy(seen[name]).to(device) for name in seen})
                row_S = row_S[~excluded_S.cpu().numpy()]
        return row_S

    def scored(self, start: int, stop: int) -> list[Scored]:
        """The pairs of the sample among the rows from start to stop, with their features; in parts."""
        first, last = np.searchsorted(self.row_K, [start, stop]).tolist()
        chunks = range(first // CHUNK, -(-last // CHUNK)) if first < last else ()
        parts = []
        for chunk in chunks:
            here = slice(max(first - chunk * CHUNK, 0), last - chunk * CHUNK)
            table, row_B = opened(self.path(chunk))[here], self.chunks[chunk][here]
            bad = []
            for number in np.flatnonzero(table["reason"].is_valid().to_numpy()).tolist():
                shard, position = (int(place) for place in self.samples.index.place(row_B[number]))
                bad.append((shard, position, self.samples.key(shard, position), table["reason"][number].as_py()))
            seen = {name: torch.from_numpy(from_binary(table[name], dtype(name))) for name in self.names}
            parts.append(Scored(row_B, torch.tensor(table["cosine"].to_numpy()), bad, seen))
        return parts


def low_and_high(score_R: np.ndarray, row_R: np.ndarray, fraction: float, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`Sample.low_and_high` of the rows row_R, in random order; scores that are NaN do not count."""
    there_R = ~np.isnan(score_R)
    row_R, score_R = row_R[there_R], score_R[there_R]
    threshold, median = np.quantile(score_R, [fraction, 0.5]) if len(row_R) else (0, 0)
    return np.sort(row_R[score_R < threshold][:count]), np.sort(row_R[score_R > median][: 2 * count])


@lru_cache(maxsize=1)
def opened(path: Path) -> pa.Table:
    """Consecutive shards have consecutive rows of a file."""
    return pq.read_table(path)


def as_binary(value_BD: np.ndarray) -> pa.Array:
    """The bytes of each of the B rows."""
    value_BD = np.ascontiguousarray(value_BD)
    width = pa.binary(value_BD.nbytes // max(1, len(value_BD)) or 1)
    return pa.FixedSizeBinaryArray.from_buffers(width, len(value_BD), [None, pa.py_buffer(value_BD)])


def from_binary(column: pa.ChunkedArray, dtype: type[np.generic]) -> np.ndarray:
    """(B,) or (B, D) of what `as_binary` made."""
    array = column.combine_chunks()
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width :][: len(array) * width]
    value_BD = data.reshape(len(array), width).copy().view(dtype)
    return value_BD[:, 0] if value_BD.shape[1] == 1 else value_BD
