"""Whether samples of an index can be read: one each of shards from all over it."""

from pipeline.doctor.footprint import Findings
from shards.errors import BadSample, ChangedShard
from shards.samples.samples import Samples

SPREAD = 32  # shards of which one sample is decoded


def try_samples(samples: Samples, about: str) -> Findings:
    """A finding where some of the samples that are tried cannot be read; fatal where that are all, or where a shard has
    changed."""
    index = samples.index
    filled = [s for s, count in enumerate(index.counts) if count and not index.shards[s].path.startswith("pipe:")]
    tried = filled[:: -(-len(filled) // SPREAD) or 1]
    bad = []
    for shard in tried:
        position = int(index.counts[shard]) // 2
        try:
            samples.image(shard, position)
            samples.caption(shard, position)
        except ChangedShard as error:
            return [("fatal", about, str(error))]
        except BadSample as error:
            bad.append(f"{index.shards[shard].path}, sample {samples.key(shard, position)}: {error}")
    if not bad:
        return []
    text = (
        f"{len(bad)} of {len(tried)} samples that were tried cannot be read, the first: {bad[0]}; "
        "if it is not that sample alone, index the shards again or mend them"
    )
    return [("warning" if len(bad) < len(tried) else "fatal", about, text)]
