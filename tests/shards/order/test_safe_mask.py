"""SafeMask: what is saved is what is loaded, or it is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order.safe_mask import SafeMask

counts = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@given(counts, st.integers(0, 10_000))
def test_flags_survive_packing_and_views_are_counted(counts_S, seed):
    flags = np.random.default_rng(seed).random(sum(counts_S)) < 0.5
    mask = SafeMask.from_flags(counts_S, flags)
    assert np.array_equal(mask.flags(), flags)
    shard_N = np.repeat(np.arange(len(counts_S)), counts_S)
    position_N = np.arange(len(flags)) - (np.cumsum(counts_S) - counts_S)[shard_N] if len(flags) else shard_N
    assert np.array_equal(mask.at(shard_N, position_N), flags)
    assert mask.counts("safe").sum() == flags.sum() and (mask.counts("safe") + mask.counts("risky") == counts_S).all()
    for shard in range(len(counts_S)):
        safe, risky = mask.positions(shard, "safe"), mask.positions(shard, "risky")
        assert sorted([*safe, *risky]) == mask.positions(shard, "all").tolist()
        assert len(mask.shard_bits(shard)) == (counts_S[shard] + 7) // 8


@given(counts, st.integers(0, 10_000))
def test_save_and_load(tmp_path_factory, counts_S, seed):
    folder = tmp_path_factory.mktemp("mask")
    mask = SafeMask.from_flags(counts_S, np.random.default_rng(seed).random(sum(counts_S)) < 0.3)
    mask.save(folder, {"fingerprint": "f", "threshold": 0.25})
    loaded, meta = SafeMask.load(folder, "f")
    assert (
        np.array_equal(loaded.flags(), mask.flags()) and meta["threshold"] == 0.25 and loaded.fraction == mask.fraction
    )


@pytest.fixture
def saved(tmp_path):
    SafeMask.from_flags([10, 7], np.arange(17) % 2 == 0).save(tmp_path, {"fingerprint": "f"})
    return tmp_path


def test_another_data_set_is_refused_by_name(saved):
    with pytest.raises(UserError, match="fingerprint f, these have g"):
        SafeMask.load(saved, "g")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "mask.json").unlink(),
        lambda folder: (folder / "safe.npy").unlink(),
        lambda folder: (folder / "safe.npy").write_bytes((folder / "safe.npy").read_bytes()[:-1]),
        lambda folder: np.save(folder / "safe.npy", np.zeros(4, np.uint8)),
        lambda folder: (folder / "mask.json").write_text(json.dumps({"fingerprint": "f"})),
    ],
)
def test_damage_is_refused(saved, damage):
    damage(saved)
    with pytest.raises(UserError, match="mask"):
        SafeMask.load(saved)
