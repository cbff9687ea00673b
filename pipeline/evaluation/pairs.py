"""Held-out pairs: pictures and captions of shards that are not trained on. They need no labels."""

from functools import cached_property

import numpy as np
import pyarrow.compute as pc

from pipeline.config.data import open_samples
from pipeline.config.schema import Config
from pipeline.distributed import comm
from shards.errors import BadSample, UserError
from shards.index.shard_index import ShardIndex
from shards.storage.columns import to_numpy


class HeldOutPairs:
    """The first evaluation.max_pairs pairs of the index evaluation.pairs, in its order, as they are in the shards.

    samples: the pairs, decoded as the training data are (data.limits, data.cache). place_N: (shard, position) of each.
    """

    def __init__(self, config: Config, trained: ShardIndex | None = None):
        """trained: the index of the training data. Raises UserError where the pairs are missing, damaged, labels, or
        trained on."""
        folder = config.evaluation.pairs
        index = ShardIndex.load(folder)
        if not index.samples:
            raise UserError(f"evaluation.pairs: {folder} has no pairs; index held-out shards with `safeclip index`")
        if index.shards[0].text == "cls":
            raise UserError(
                f"evaluation.pairs: {folder} indexes labels, expected captions; "
                "index the shards without --text cls, or name a test set with evaluation.test=DIR"
            )
        refuse_trained(index, trained, folder)
        index.shards.refuse_pipe(config.data.allow_pipe)
        self.samples = open_samples(config.data, index, poisoned=False)
        comm.on_rank0(self.samples.verify, config.data.remote_timeout)
        rows = np.arange(min(index.samples, config.evaluation.max_pairs))
        self.place_N = list(zip(*(part.tolist() for part in index.place(rows))))

    @cached_property
    def captions(self) -> list[str | None]:
        """The caption of every pair, None where it cannot be read."""
        return [read_caption(self, *place) for place in self.place_N]


def read_caption(pairs: HeldOutPairs, shard: int, position: int) -> str | None:
    try:
        return pairs.samples.caption(shard, position)
    except BadSample:
        return None


def refuse_trained(index: ShardIndex, trained: ShardIndex | None, folder: str) -> None:
    """Raise UserError if a shard of `index` has the content of a training shard. Copies of single pairs in other shards
    are not noticed."""
    if not trained:
        return
    known_S = pc.is_in(index.shards.column("fingerprint"), value_set=trained.shards.column("fingerprint"))
    both = np.flatnonzero(to_numpy(known_S) & (index.counts > 0))
    if len(both):
        raise UserError(
            f"evaluation.pairs: {len(both)} of the {len(index.shards)} shards of {folder} are trained on too, the "
            f"first: {index.shards[both[0]].path}; leave them out of one of the two indices"
        )
