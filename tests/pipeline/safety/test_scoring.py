"""Batches of a pass over all pairs."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.safety.scoring import ShardBatches


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=8), st.integers(1, 9), st.data())
def test_each_pair_that_is_not_known_is_in_one_batch_of_its_shard(shards, size, data):
    offsets_S = np.concatenate([[0], np.cumsum([count for count, _ in shards])]).astype(np.int64)
    chosen = [shard for shard, (_, own) in enumerate(shards) if own]
    known = sorted(data.draw(st.sets(st.integers(0, max(0, int(offsets_S[-1]) - 1))))) if offsets_S[-1] else []
    batches = ShardBatches(offsets_S, chosen, size, np.array(known, np.int64))
    found = [row_B.tolist() for row_B, caption_row_B in batches if row_B is caption_row_B]
    assert len(found) == len(batches) == sum(batches.sizes)
    own = [row for shard in chosen for row in range(offsets_S[shard], offsets_S[shard + 1])]
    assert sum(found, []) == [row for row in own if row not in known]
    for rows in found:
        assert 0 < len(rows) <= size and len(set(np.searchsorted(offsets_S, rows, "right"))) == 1
    for shard, number in zip(chosen, batches.sizes):
        left = [row for row in range(offsets_S[shard], offsets_S[shard + 1]) if row not in known]
        assert number == -(-len(left) // size)  # all full but the last
