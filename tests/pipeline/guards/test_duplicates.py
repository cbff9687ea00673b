"""Pictures that stand in many pairs are found at every world size, and are never safe."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Config, Selection
from pipeline.distributed import comm
from pipeline.guards import duplicates, make_guards
from pipeline.guards.excluded import load_excluded, score_and_exclude
from pipeline.guards.features import hash_weights, picture_hash
from pipeline.safety.round import select_pairs
from pipeline.safety.score_files import ScoreFiles, load_scores
from pipeline.safety.scoring import Reading, score_all_pairs
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples
from tests.helpers.models import MODEL
from tests.helpers.pictures import picture
from tests.helpers.ranks import run_ranks
from tests.helpers.tars import write_tar

COPIES = {(0, 1), (0, 5), (1, 2)}  # one picture in three pairs; (1, 6) and (0, 7) share another


def make(folder):
    """Two shards of 9 pairs, indexed."""
    paths = []
    for shard in range(2):
        entries = []
        for i in range(9):
            same = "often" if (shard, i) in COPIES else "twice" if (shard, i) in {(1, 6), (0, 7)} else None
            seed = {"often": [99, 0], "twice": [98, 0], None: [shard, i]}[same]
            entries += [(f"{i}.png", picture(seed) if i != 8 else b"torn"), (f"{i}.txt", b"a thing")]
        paths.append(write_tar(folder / f"{shard}.tar", entries))
    return build_index([str(path) for path in paths], folder / "index")


def guarded(folder, max_pairs=2):
    """(score_N, bad, what is excluded, score files)."""
    config = Config()
    config.model.config = MODEL
    torch.manual_seed(0)
    towers = Towers(build_model({"config": MODEL}), *pixel_stats())
    index = ShardIndex.load(folder / "index")
    reading = Reading(towers, Samples(index), make_views(config), 4, torch.device("cpu"))
    guards = make_guards({"duplicates": {"max_pairs": max_pairs}})
    files = ScoreFiles(folder / f"at_most_{max_pairs}" / "scores", index, 0, numbers={"duplicates": ["hash"]})
    watch = lambda what: lambda done, rounds: None  # noqa: E731
    return *score_and_exclude(guards, folder / "guards", reading, files, 0, watch), files


def kept(folder):
    return guarded(folder)[2].masks["duplicates"].flags()


def test_every_rank_finds_the_same_pairs_and_a_torn_picture_is_no_duplicate(tmp_path):
    make(tmp_path)
    expected = np.ones(18, bool)
    expected[[shard * 9 + position for shard, position in COPIES]] = False
    for flags in run_ranks(kept, 2, tmp_path):
        np.testing.assert_array_equal(flags, expected)
    guards, index = make_guards({"duplicates": {}}), ShardIndex.load(tmp_path / "index")
    loaded = load_excluded(tmp_path / "guards", guards, index.fingerprint)
    np.testing.assert_array_equal(loaded.masks["duplicates"].flags(), expected)
    assert loaded.count == 3 and loaded.line() == "duplicates 3"
    with pytest.raises(UserError, match="made for shards with fingerprint"):
        load_excluded(tmp_path / "guards", guards, "another")
    assert guarded(tmp_path, 3)[2].count == 0


def apply(folder):
    score_N, _, found, files = guarded(folder)
    found.apply(score_N)
    files.conclude(found.of_shard)
    return np.flatnonzero(np.isnan(score_N))


def test_all_ranks_take_the_scores_of_excluded_pairs_away(tmp_path):
    index = make(tmp_path)
    for rows in run_ranks(apply, 2, tmp_path):
        assert rows.tolist() == [1, 5, 8, 11, 17]
    folder = tmp_path / "at_most_2"
    assert np.flatnonzero(np.isnan(load_scores(folder, index.counts))).tolist() == [1, 5, 8, 11, 17]
    cos_P, bad = ScoreFiles(folder / "scores", index, 0).read(0)
    assert np.flatnonzero(np.isnan(cos_P)).tolist() == [8] and [sample[:2] for sample in bad] == [(0, 8)]


def test_a_duplicate_keeps_its_cosine_but_is_never_safe_and_no_bad_sample(tmp_path):
    index = make(tmp_path)
    score_N, bad, found, files = guarded(tmp_path)
    cosine_N = score_N.copy()
    found.apply(score_N)
    files.conclude(found.of_shard)
    assert {sample[:2] for sample in bad} == {(0, 8), (1, 8)} == {s[:2] for n in range(2) for s in files.read(n)[1]}
    again_N, again = score_all_pairs(
        torch.nn.Identity(), Samples(index), None, 4, torch.device("cpu"), files=files
    )  # from the files
    np.testing.assert_array_equal(again_N, cosine_N)
    assert sorted(again) == sorted(bad)
    assert set(np.flatnonzero(np.isnan(score_N))) == {1, 5, 8, 11, 17}
    selected = select_pairs(score_N, index.counts, Selection(first_fraction=1.0, max_fraction=1.0), 0, excluded=3)
    assert f"{13 / 15:.1%} of the pairs can be scored" in selected.note
    np.testing.assert_array_equal(selected.mask.flags(), ~np.isnan(score_N))


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=30),
    st.integers(1, 4),
    st.sampled_from([3, 1 << 22]),
)
def test_excluded_are_those_whose_number_comes_more_often(pairs, limit, at_once):
    (guard,) = make_guards({"duplicates": {"max_pairs": limit}})
    number_M, valid_M = np.array([n for n, _ in pairs], np.int64), np.array([valid for _, valid in pairs], bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "AT_ONCE", at_once)
        patch.setattr(duplicates, "BLOCK", 7)
        flags = guard.excluded(number_M, valid_M, lambda done, rounds: None)
    assert flags.tolist() == [valid and pairs.count((number, True)) > limit for number, valid in pairs]


def shared_out(numbers, valid):
    """What each rank finds of its own numbers, in several rounds, and the most numbers that another rank sent it."""
    duplicates.AT_ONCE, duplicates.BLOCK, most, exchange = 1_000, 700, 0, comm.exchange

    def watched(parts):
        nonlocal most
        found = exchange(parts)
        most = max(most, sum(map(len, found)))
        return found

    comm.exchange = watched
    (guard,) = make_guards({"duplicates": {"max_pairs": 2}})
    start, stop = ((0, 7_000), (7_000, 7_000), (7_000, 10_000))[comm.rank()]  # one rank has none
    rounds = []
    flags = guard.excluded(numbers[start:stop], valid[start:stop], lambda *round: rounds.append(round))
    assert [done for done, _ in rounds] == list(range(1, rounds[-1][1] + 1))  # all ranks are told as often
    return flags, most


def test_ranks_count_together_and_none_holds_all(tmp_path):
    rng = np.random.default_rng(0)
    numbers = np.concatenate([rng.integers(-(2**63), 2**63, 4_000).repeat(2), np.full(500, 7), np.arange(1_500)])
    numbers, valid = rng.permutation(numbers), rng.random(10_000) < 0.9
    numbers[:300] = np.arange(100).repeat(3)
    found = run_ranks(shared_out, 3, numbers, valid)
    flags = np.concatenate([flags for flags, _ in found])
    known, count = np.unique(numbers[valid], return_counts=True)
    np.testing.assert_array_equal(flags, valid & np.isin(numbers, known[count > 2]))
    assert flags.sum() > 500 and max(most for _, most in found) < 1_500


def test_one_pixel_or_its_place_makes_another_hash():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), dtype=np.uint8)
    images = torch.from_numpy(pixels).repeat(40, 1, 1, 1)
    images[1, 0, 3, 4] ^= 1
    images[2] = images[2].flip(2)
    found = picture_hash(images).tolist()
    assert len(set(found)) == 3 and found[3:] == [found[0]] * 37
    weight_P = hash_weights(3 * 16 * 16).numpy()
    assert found[0] == int((pixels.reshape(-1) * weight_P).sum()) and (weight_P % 2 == 1).all()
