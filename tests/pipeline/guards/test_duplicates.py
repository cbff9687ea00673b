"""Pictures that stand in many pairs are found at every world size, once a run, and are never safe."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import Config, Selection
from pipeline.guards import make_guards
from pipeline.guards.base import Pairs
from pipeline.guards.excluded import excluded_of_run
from pipeline.safety.scores import ScoreFiles
from pipeline.safety.scoring import score_all_pairs
from pipeline.safety.split import split_pairs
from pipeline.training.model import Towers, build_model, pixel_stats
from pipeline.training.start import make_views
from shards.index import ShardIndex, build_index
from shards.samples import Samples
from tests.conftest import picture
from tests.pipeline.test_run import MODEL
from tests.ranks import run_ranks
from tests.shards.test_index import write_tar

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


def excluded(folder, max_pairs=2):
    config = Config()
    config.model.config = MODEL
    samples, views = Samples(ShardIndex.load(folder / "index")), make_views(config)
    pairs = Pairs(samples, views, 4, 0, 0, torch.device("cpu"))
    return excluded_of_run(folder / "guards", make_guards({"duplicates": {"max_pairs": max_pairs}}), pairs)


def kept(folder):
    return excluded(folder).mask.flags()


def test_every_rank_finds_the_same_pairs_and_a_torn_picture_is_no_duplicate(tmp_path):
    make(tmp_path)
    expected = np.ones(18, bool)
    expected[[shard * 9 + position for shard, position in COPIES]] = False
    for flags in run_ranks(kept, 2, tmp_path):
        np.testing.assert_array_equal(flags, expected)
    mask = tmp_path / "guards" / "duplicates" / "mask.json"
    made = mask.stat().st_mtime_ns
    np.testing.assert_array_equal(kept(tmp_path), expected)
    assert mask.stat().st_mtime_ns == made  # not looked for again
    assert excluded(tmp_path, 3).mask.flags().all() and mask.stat().st_mtime_ns != made  # but with other settings


def test_a_duplicate_keeps_its_cosine_but_is_never_safe_and_no_bad_sample(tmp_path):
    index, config = make(tmp_path), Config()
    config.model.config = MODEL
    towers, samples = (Towers(build_model({"config": MODEL}), *pixel_stats()), Samples(index))
    arguments = towers, samples, make_views(config), 4, torch.device("cpu")
    files, found = ScoreFiles(tmp_path / "scores", index, 0), excluded(tmp_path)
    score_N, bad = score_all_pairs(*arguments, files=files, excluded=found)
    assert {sample[:2] for sample in bad} == {(0, 8), (1, 8)} == {s[:2] for n in range(2) for s in files.read(n)[1]}
    again_N, again = score_all_pairs(*arguments, files=files, excluded=found)  # from the files
    np.testing.assert_array_equal(again_N, score_N)
    assert sorted(again) == sorted(bad)
    assert set(np.flatnonzero(np.isnan(score_N))) == {1, 5, 8, 11, 17}
    split = split_pairs(score_N, index.counts, Selection(first_share=1.0, cap=1.0), 0, excluded=3)
    assert f"{13 / 15:.1%} of the pairs can be scored" in split.note
    np.testing.assert_array_equal(split.mask.flags(), ~np.isnan(score_N))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4))
def test_kept_are_those_whose_number_comes_at_most_so_often(numbers, most):
    (guard,) = make_guards({"duplicates": {"max_pairs": most}})
    number_N, valid_N = np.array(numbers, np.int64), np.ones(len(numbers), bool)
    flags = np.concatenate(list(guard.kept(number_N, valid_N, [0, len(numbers) // 2, len(numbers)])))
    assert flags.tolist() == [numbers.count(number) <= most for number in numbers]


def test_one_pixel_or_its_place_makes_another_number():
    (guard,) = make_guards({"duplicates": {}})
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), dtype=np.uint8)
    images = torch.from_numpy(pixels).repeat(3, 1, 1, 1)
    images[1, 0, 3, 4] ^= 1
    images[2] = images[2].flip(2)
    assert len(set(guard.numbers(images).tolist())) == 3
    assert guard.numbers(images[:1]) == guard.numbers(images[:1].clone())
