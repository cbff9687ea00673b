"""The index: what each shard holds, and where, so that any sample can be read without its neighbours.

A sample IS (shard, position in shard); its row over all shards is offsets[shard] + position. On disk:
DIR/tables/*.parquet, one for each shard (key, and byte offset, size and CRC-32 of picture and text;
shards/index/scan.py), then the list of the shards in columns, and DIR/index.json, written last
(shards/index/shard_list.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.index.findings import Findings
from shards.index.shard_list import Shard, ShardList, load_shards, write_index
from shards.index.tar_samples import MEMBER
from shards.index.verify import check_rows, named_table, verify
from shards.storage import remote
from shards.storage.files import patiently

__all__ = ["Members", "Shard", "ShardIndex", "ShardTable", "read_table", "write_index"]


@dataclass(frozen=True)
class Members:
    """A member of each sample of a shard: int64 (N,) byte offsets and sizes (MISSING = has none), and uint32 (N,)
    CRC-32 of the content."""

    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard, in order: names, pictures, and for each source of `--text` its texts."""

    keys: list[str]
    image: Members
    texts: tuple[Members, ...]


class ShardIndex:
    """Loaded index. shards: Shard i when it is asked for; counts: int64 (S,); offsets: int64 (S + 1,).

    repetitions: int64 (S,), how often each sample of the shard is seen in an epoch; views: samples of an epoch,
    repetitions counted. findings: where the index was just built.

    An index that is loaded is sent to another process as the names of its files.
    """

    findings: Findings | tuple[()] = ()

    def __init__(self, shards: Sequence[Shard], weights: Sequence[int] | None = None):
        """weights: repetitions of the samples in each part of a ShardList; None: 1."""
        self.shards = shards if isinstance(shards, ShardList) else ShardList.of(shards)
        self.weights = weights or [1] * len(self.shards.parts)
        self.counts = self.shards.numbers("samples")
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.offsets[-1])
        self.repetitions = np.repeat(np.array(self.weights, np.int64), [len(part.batch) for part in self.shards.parts])
        self.views = int((self.counts * self.repetitions).sum())
        self.fingerprint = self.shards.fingerprint()

    def __reduce__(self) -> tuple:
        return ShardIndex, (self.shards, self.weights)

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """The index in `folder`. Raises UserError when there is none, or it cannot be used."""
        return cls(load_shards(folder))

    def place(self, row: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, position) of rows over all shards: int64, of the shape of `row`."""
        shard = np.searchsorted(self.offsets, row, "right") - 1
        return shard, row - self.offsets[shard]

    @classmethod
    def merged(cls, sources: Mapping[str, tuple[str | Path, int]]) -> "ShardIndex":
        """One index of several: `sources` is {name: (folder, repetitions)}, in order. Raises UserError where two name
        the same shard."""
        found: dict[str, ShardList] = {}
        for name, (folder, _) in sources.items():
            shards = load_shards(folder)
            paths = shards.column("path")
            for other, before in found.items():
                twice = pc.index(pc.is_in(paths, value_set=before.column("path")), True).as_py()
                if twice >= 0:
                    raise UserError(
                        f"data.sources.{name}: shard {shards[twice].path} is in source {other} too; "
                        "name each shard once, and give its source a weight"
                    )
            found[name] = shards
        parts = [part for shards in found.values() for part in shards.parts]
        return cls(ShardList(parts), [times for _, times in sources.values()])

    def table(self, shard: int) -> ShardTable:
        """ShardTable of shard number `shard`; the last few are kept in memory. Raises ChangedShard where it cannot be
        read."""
        entry = self.shards[shard]
        return read_table(entry.table, entry.samples)

    def keys(self, shard: int) -> pa.ChunkedArray:
        """The keys of the samples of shard number `shard`, strings. Raises ChangedShard where they cannot be read."""
        entry = self.shards[shard]
        with named_table(entry.table):
            column = patiently(lambda: pq.read_table(entry.table, columns=["key"])["key"])
            check_rows(len(column), entry.samples)
            return column

    def verify(self, timeout: float = remote.TIMEOUT, stop: Callable[[], bool] = lambda: False) -> None:
        """Raise UserError if a table is missing, or a shard is missing or does not hold what was indexed.

        Of the tables some are opened, from all over the index; any that is damaged is told when it is read. Size and
        time of change of local shards are compared. Where only the time differs the shard is read, and its fingerprint
        decides; the result is kept beside the index if that can be written. Of shards behind URLs the sizes of some are
        compared, from all over the index. After stop() is true no further shard is compared.
        """
        verify(self.shards, timeout, stop)


@lru_cache(maxsize=64)
def read_table(path: str, samples: int) -> ShardTable:
    """The table at `path`, of so many samples. Raises ChangedShard."""
    with named_table(path):
        columns = patiently(lambda: pq.read_table(path))
        check_rows(len(columns), samples)
        kinds = [name.removesuffix("_size") for name in columns.column_names if name.endswith("_size")]
        image, *texts = (Members(*(columns[f"{kind}_{part}"].to_numpy() for part in MEMBER)) for kind in kinds)
        return ShardTable(columns["key"].to_pylist(), image, tuple(texts))
