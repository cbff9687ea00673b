"""Where the scores of a shard are: in a file of its own, or in one of many shards.

FOLDER/00007.parquet has shard 7. FOLDER/00010-00999.parquet has shards 10 to 999: each that is not empty is a row
group, in their order.
"""

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa  # which takes a while to load
    import pyarrow.parquet as pq

NAME = re.compile(r"(\d+)(?:-(\d+))?\.parquet")
OPEN_FILES = 8


class ScoreParts:
    """The score files in a folder, listed once. alone: numbers of the shards with a file of their own; parts: (first,
    last shard) of the other files, in order."""

    def __init__(self, folder: str | Path, counts_S: np.ndarray | Sequence[int]):
        """counts_S: pairs of each shard."""
        self.folder, self.counts_S = Path(folder), np.asarray(counts_S)
        self.filled_S = np.concatenate([[0], np.cumsum(self.counts_S > 0)])  # shards before each that are not empty
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [match for match in map(NAME.fullmatch, names) if match]
        self.alone = {int(match[1]) for match in found if match[2] is None}
        self.parts = sorted((int(match[1]), int(match[2])) for match in found if match[2] is not None)

    def done(self) -> list[int]:
        """Numbers of the shards that have scores, in order."""
        there_S = np.zeros(len(self.counts_S), bool)
        there_S[[shard for shard in self.alone if shard < len(there_S)]] = True
        for first, last in self.parts:
            there_S[first : last + 1] = True
        return np.flatnonzero(there_S & (self.counts_S > 0)).tolist()

    def place(self, shard: int) -> tuple[Path, int]:
        """(file, row group) of a shard: of many shards where there is one, else its own, which may be missing."""
        number = np.searchsorted([first for first, _ in self.parts], shard, "right") - 1
        if number < 0 or shard > self.parts[number][1]:
            return path_of(self.folder, shard), 0
        first, last = self.parts[number]
        return path_of(self.folder, first, last), int(self.filled_S[shard] - self.filled_S[first])

    def read(self, shard: int, columns: Sequence[str] | None = None) -> "pa.Table":
        """The rows of a shard, with the file's metadata. Raises OSError, ValueError."""
        path, group = self.place(shard)
        about = os.stat(path)
        return opened(path, about.st_mtime_ns, about.st_size).read_row_group(group, columns)

    def column(self, name: str) -> np.ndarray:
        """float32 (N,): a column of all shards, in order. Raises OSError, ValueError."""
        import pyarrow.parquet as pq

        alone = [(shard, shard) for shard in np.flatnonzero(self.counts_S).tolist() if not self.in_part(shard)]
        value_N, done = np.empty(self.counts_S.sum(), np.float32), 0
        for some in sorted([*self.parts, *alone]):
            # Reading ahead and threads cost many times what they save on row groups as small as a shard.
            with pq.ParquetFile(path_of(self.folder, *some), pre_buffer=False) as file:
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, [name], use_threads=False)[name]
                    if done + len(column) <= len(value_N):
                        value_N[done : done + len(column)] = column.to_numpy()
                    done += len(column)
        if done != len(value_N):
            raise ValueError(f"{self.folder} has {done:,} pairs, expected {len(value_N):,}")
        return value_N

    def in_part(self, shard: int) -> bool:
        return "-" in self.place(shard)[0].stem


def path_of(folder: Path, first: int, last: int | None = None) -> Path:
    """File of one shard, or of the shards `first` to `last`."""
    return folder / (f"{first:05d}.parquet" if last in (None, first) else f"{first:05d}-{last:05d}.parquet")


@lru_cache(maxsize=OPEN_FILES)
def opened(path: Path, changed: int, size: int) -> "pq.ParquetFile":
    """The file, whose footer is read once. `changed`, `size`: of this state of it."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)
