"""SafeMask: what is saved is what is loaded, or it is refused."""

import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order import mask_bits
from shards.order.mask_bits import COUNTS
from shards.order.safe_mask import FIELDS, SafeMask, SavedMask
from shards.storage.columns import record_batch, write_columns

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
        lambda folder: np.save(folder / "safe.npy", np.zeros(3)),
        lambda folder: (folder / "mask.json").write_text(json.dumps({"fingerprint": "f"})),
        lambda folder: rewrite(folder, version=3),
        lambda folder: rewrite(folder, columns="../x"),
        lambda folder: rewrite(folder, shards=3),
        lambda folder: next(folder.glob("shards_*")).unlink(),
        lambda folder: os.truncate(next(folder.glob("shards_*")), 100),
        lambda folder: counted(folder, [10, 17], [5, 4]),
        lambda folder: counted(folder, [10, 7], [4, 5]),
        lambda folder: counted(folder, [2**62, 2**62 + 17], [9, 0]),
    ],
)
def test_damage_is_refused(saved, damage):
    damage(saved)
    with pytest.raises(UserError, match="mask") as error:
        SafeMask.load(saved)
    assert "\n" not in str(error.value)


def rewrite(folder, **changed):
    meta = json.loads((folder / "mask.json").read_text())
    (folder / "mask.json").write_text(json.dumps(meta | changed))


def counted(folder, counts, safe_counts):
    """Columns that are whole, but of other counts."""
    rewrite(folder, columns=write_columns(folder, record_batch(COUNTS, {"counts": counts, "safe_counts": safe_counts})))


@given(st.binary(max_size=70), st.data())
def test_bits_are_counted_in_pieces(data, draw):
    bits = np.frombuffer(data, np.uint8)
    places = np.array(sorted(draw.draw(st.lists(st.integers(0, len(bits)), max_size=6))), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_bits, "PIECE", draw.draw(st.integers(1, 4)))
        found = mask_bits.ones_before(bits, places)
    assert found.tolist() == [sum(byte.bit_count() for byte in data[:place]) for place in places]


@given(counts, st.integers(0, 10_000))
def test_a_mask_with_all_in_its_json_is_read(tmp_path_factory, counts_S, seed):
    folder = tmp_path_factory.mktemp("mask")
    mask = SafeMask.from_flags(counts_S, np.random.default_rng(seed).random(sum(counts_S)) < 0.3)
    np.save(folder / "safe.npy", mask.bits)
    shards = [{"name": f"{n}.tar", "bytes": n, "fingerprint": str(n)} for n in range(len(counts_S))]
    old = {"counts": counts_S, "safe_counts": mask.counts("safe").tolist(), "shards": shards}
    about = dict.fromkeys(FIELDS, 0)
    (folder / "mask.json").write_text(json.dumps({**old, **about}))
    saved = SavedMask(folder)
    assert np.array_equal(saved.mask.flags(), mask.flags()) and saved.shards == shards
    saved.mask.save(folder, saved.meta, saved.shards.batch)
    assert SavedMask(folder).shards == shards and not {"counts", "safe_counts"} & set(SavedMask(folder).meta)


def test_a_mask_is_sent_to_another_process_as_its_folder(tmp_path):
    mask = SafeMask.from_flags([8000] * 50, np.arange(400_000) % 3 == 0)
    mask.save(tmp_path, {"fingerprint": "f"})
    loaded, _ = SafeMask.load(tmp_path)
    sent = pickle.dumps(loaded)
    assert len(sent) < 500 and np.array_equal(pickle.loads(sent).bits, mask.bits)
    assert np.array_equal(pickle.loads(pickle.dumps(mask)).bits, mask.bits)
    SafeMask(mask.counts_S, ~mask.bits).save(tmp_path, {"fingerprint": "f"})
    with pytest.raises(UserError, match="was replaced since it was opened"):
        pickle.loads(sent)
