"""Whether samples of an index can be read: one each of shards from all over it."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.doctor.footprint import Findings
from shards.errors import BadSample, ChangedShard, Unreachable
from shards.index.findings import findings_of
from shards.samples.samples import Samples

SPREAD = 32  # shards of which one sample is decoded


def try_samples(samples: Samples, about: str) -> Findings:
    """A finding where some of the samples that are tried cannot be read; fatal where that are all, or where a shard has
    changed or cannot be read. What the index found to be unusable is not tried."""
    index = samples.index
    filled = [s for s, count in enumerate(index.counts) if count and not index.shards[s].path.startswith("pipe:")]
    tried, bad = 0, []
    for shard in filled[:: -(-len(filled) // SPREAD) or 1]:
        usable_U = np.setdiff1d(np.arange(index.counts[shard]), list(unusable(index.shards[shard].table)))
        if not len(usable_U):
            continue
        tried, position = tried + 1, int(usable_U[len(usable_U) // 2])
        try:
            samples.image(shard, position)
            samples.caption(shard, position)
        except (ChangedShard, Unreachable) as error:
            return [("fatal", about, str(error))]
        except BadSample as error:
            bad.append(f"{index.shards[shard].path}, sample {samples.key(shard, position)}: {error}")
    if not bad:
        return []
    text = (
        f"{len(bad)} of {tried} samples that were tried cannot be read, the first: {bad[0]}; "
        "if it is not that sample alone, index the shards again or mend them"
    )
    return [("warning" if len(bad) < tried else "fatal", about, text)]


def unusable(table: str) -> dict[int, str]:
    """{position: reason} of the samples of a shard that its index found to be unusable."""
    sizes = pq.read_table(table, columns=[name for name in pq.read_schema(table).names if name.endswith("_size")])
    image_N, *texts = (column.to_numpy() for column in sizes.columns)
    found = {int(position): "no picture" for position in np.flatnonzero(image_N <= 0)}
    found |= {int(position): "no caption" for position in np.flatnonzero(np.maximum.reduce(texts) <= 0)}
    listed = (one for one in findings_of(Path(table)) if one.position is not None and not one.damage)
    return found | {one.position: one.kind for one in listed}
