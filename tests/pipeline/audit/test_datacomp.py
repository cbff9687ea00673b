"""DataComp's subset file from the uids of shards."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audit import datacomp
from pipeline.audit.datacomp import as_array
from shards.order.safe_mask import SafeMask


@given(st.lists(st.tuples(st.booleans(), st.none() | st.integers(0, 9), st.integers(0, 2)), max_size=40))
def test_a_subset_file_has_each_safe_uid_that_no_risky_pair_has(tmp_path_factory, pairs):
    pairs = [(safe, uid, shard) for safe, uid, shard in sorted(pairs, key=lambda pair: pair[2]) if uid or not safe]
    counts = [sum(shard == number for _, _, shard in pairs) for number in range(3)]
    mask = SafeMask.from_flags(counts, [safe for safe, _, _ in pairs])
    uids = [
        as_array([None if uid is None else (uid << 120).to_bytes(16, "big") for _, uid, of in pairs if of == shard])
        for shard in range(3)
    ]
    out = tmp_path_factory.mktemp("subset") / "subset.npy"
    count = datacomp.write_subset(SimpleNamespace(mask=mask), out, uids, "")
    wanted = {uid for safe, uid, _ in pairs if safe} - {uid for safe, uid, _ in pairs if not safe}
    assert np.load(out).tolist() == [(uid << 56, 0) for uid in sorted(wanted)] and count == len(wanted)


def test_a_subset_file_takes_few_bytes_a_pair(tmp_path):
    mask = SafeMask.from_flags([20_000] * 10, np.arange(200_000) % 10 > 0)

    def uids():
        for shard in range(10):
            uid_N = np.ones(20_000, datacomp.UID)
            uid_N["uid"] = np.frombuffer(np.random.default_rng(shard).bytes(320_000), "S16")
            yield uid_N

    tracemalloc.start()
    assert datacomp.write_subset(SimpleNamespace(mask=mask), tmp_path / "subset.npy", uids(), "") == 180_000
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 40 * 200_000, f"{most / 200_000:.1f} bytes a pair"
