"""Captions of the pairs, read where they lie, a shard at a time."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import BadSample, UserError
from shards.samples.samples import Samples


class Captions:
    """The captions that were scored, in the metadata parts of the scores; where there are none, the first of each pair
    in the shards. None where a pair has none."""

    def __init__(self, metadata: dict[int, Path], samples: Samples | None, counts_S: np.ndarray):
        """metadata: {number of the shard: path of its part}."""
        self.metadata, self.samples, self.counts_S = metadata, samples, counts_S

    def column(self, shard: int) -> pa.ChunkedArray:
        """Those of one shard that metadata names. Raises UserError when the part is not whole."""
        texts = metadata_column(self.metadata, shard, "caption", int(self.counts_S[shard]))
        return texts if texts is not None else pa.chunked_array([pa.array([], pa.string())])

    def at(self, shard: int, positions: Iterable[int]) -> list[str | None]:
        """Those of a few pairs of one shard."""
        if self.metadata:
            column = self.column(shard)
            return [column[position].as_py() for position in positions]
        return [self.read(shard, position) for position in positions]

    def read(self, shard: int, position: int) -> str | None:
        """From the shard itself."""
        try:
            return self.samples.caption(shard, position)
        except BadSample:
            return None

    def __iter__(self) -> Iterator[Sequence[str | None]]:
        """The captions of each shard in turn."""
        for shard, count in enumerate(self.counts_S.tolist()):
            yield self.column(shard).to_pylist() if self.metadata else self.at(shard, range(count))


def metadata_column(metadata: dict[int, Path], shard: int, name: str, count: int) -> pa.ChunkedArray | None:
    """A column of a shard's metadata part; None of a shard without pairs. Raises UserError when it is not of `count`
    pairs."""
    if not count:
        return None
    try:
        column = pq.read_table(metadata[shard], columns=[name])[name]
    except (KeyError, OSError, ValueError) as error:
        part = metadata.get(shard, shard)
        raise UserError(
            f"scores: metadata part {part} cannot be read ({error}); bring it back, or score again"
        ) from None
    if len(column) != count:
        raise UserError(
            f"scores: metadata part {metadata[shard]} is of {len(column)} pairs, expected {count}; score again"
        )
    return column
