"""Scores on disk: what is ranked by, the cosine beside it, and of which model they are."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.safety.score_files import ScoreFiles, load_scores, neighbours, number_of, prune_scores, saved_rounds
from shards.index.build_index import build_index
from tests.helpers.ranks import run_ranks


@pytest.fixture
def index(make_shards, tmp_path):
    return build_index([str(path) for path in make_shards([5, 0, 3])], tmp_path / "index")


def write(folder, index, cos_N, **made):
    files = ScoreFiles(folder / "scores", index, **made)
    files.claim()
    for shard in (0, 2):
        here = slice(index.offsets[shard], index.offsets[shard + 1])
        files.write(shard, cos_N[here], {1: "torn"} if shard == 2 else {})
    return files


def test_an_excluded_pair_keeps_its_cosine_and_has_no_score(index, tmp_path):
    cos_N = np.random.default_rng(0).uniform(-1, 1, 8).astype(np.float32)
    cos_N[6] = np.nan
    files = write(tmp_path, index, cos_N, step=1)
    np.testing.assert_array_equal(load_scores(tmp_path, index.counts), cos_N)
    for _ in range(2):  # the second time changes nothing
        files.conclude(lambda shard: {0: "copied", 1: "copied"} if shard == 2 else {})
        assert files.claim().done() == [0, 2]
        expected_N = cos_N.copy()
        expected_N[5] = np.nan
        np.testing.assert_array_equal(load_scores(tmp_path, index.counts), expected_N)
        found, bad = files.read(2)
        np.testing.assert_array_equal(found, cos_N[5:])
        assert [(shard, position, reason) for shard, position, _, reason in bad] == [(2, 1, "torn")]
        assert files.parts().read(2)["reason"].to_pylist() == ["copied", "torn", None]
    assert sorted(path.name for path in files.folder.iterdir()) == ["00000-00002.parquet", "made.json"]


def test_scores_of_another_step_or_config_are_not_used(index, tmp_path):
    zero_N = np.zeros(8, np.float32)
    assert write(tmp_path, index, zero_N, step=1, config="one").claim().done() == [0, 2]
    for made in ((2, "one"), (1, "two")):
        write(tmp_path, index, zero_N, step=1, config="one")
        assert ScoreFiles(tmp_path / "scores", index, *made).claim().done() == []


COUNTS = [0, 2, 3, 0, 0, 1, 4, 0, 2]
FILLED = [shard for shard, count in enumerate(COUNTS) if count]


@given(st.lists(st.sets(st.sampled_from(FILLED)), max_size=3))
def test_shards_are_found_in_any_files(tmp_path_factory, merged):
    """Some shards are put together, later others: every shard, and the column of all, is read as before."""
    folder = tmp_path_factory.mktemp("parts")
    index = SimpleNamespace(counts=np.array(COUNTS), keys=lambda shard: ["k"] * COUNTS[shard])
    files, score_N = ScoreFiles(folder / "scores", index, 0), np.arange(sum(COUNTS), dtype=np.float32)
    files.claim()
    starts = np.cumsum([0, *COUNTS])
    for shard in FILLED:
        files.write(shard, score_N[starts[shard] : starts[shard + 1]], {})
    for shards in merged:
        parts = files.parts()
        for some in neighbours([shard for shard in sorted(shards) if not parts.in_part(shard)], parts):
            files.merge(some, parts, lambda shard: {})
        assert files.claim().done() == FILLED
        np.testing.assert_array_equal(load_scores(folder, COUNTS), score_N)
        for shard in FILLED:
            np.testing.assert_array_equal(files.read(shard)[0], score_N[starts[shard] : starts[shard + 1]])


def test_a_merge_that_was_cut_off_is_done_again_by_any_number_of_ranks(index, tmp_path):
    score_N = np.arange(8, dtype=np.float32)
    files = write(tmp_path, index, score_N, step=1)
    saved = {shard: files.path(shard).read_bytes() for shard in (0, 2)}
    files.conclude()
    for shard, content in saved.items():  # dead before they were removed
        files.path(shard).write_bytes(content)
    for _ in range(2):
        np.testing.assert_array_equal(load_scores(tmp_path, index.counts), score_N)
        np.testing.assert_array_equal(files.read(2)[0], score_N[5:])
        run_ranks(conclude, 2, files)
    assert sorted(path.name for path in files.folder.iterdir()) == ["00000-00002.parquet", "made.json"]


def conclude(files):
    files.conclude()


@given(st.lists(st.integers(0, 1200), min_size=1, max_size=8, unique=True), st.data())
def test_scores_of_the_last_rounds_are_kept_and_all_masks(tmp_path_factory, numbers, data):
    masks = tmp_path_factory.mktemp("masks")
    whole = [number for number in numbers if data.draw(st.booleans())]
    for number in numbers:
        (masks / f"epoch_{number:03d}" / "scores").mkdir(parents=True)
    for number in whole:
        (masks / f"epoch_{number:03d}" / "mask.json").write_text("{}")
        (masks / f"epoch_{number:03d}" / "scores.old").mkdir()  # a removal that was cut off
    (masks / "epoch_001_good").mkdir()  # somebody's copy
    (masks / "epoch_001_good/mask.json").write_text("{}")
    assert [number_of(folder) for folder in saved_rounds(masks)] == sorted(whole)
    last, keep = data.draw(st.sampled_from(numbers)), data.draw(st.integers(1, 3))
    prune_scores(masks / f"epoch_{last:03d}", keep)
    gone = sorted(number for number in whole if number <= last)[:-keep]
    there = {int(path.parent.name[6:]) for path in masks.glob("*/scores")}
    assert there == set(numbers) - set(gone) and len(saved_rounds(masks)) == len(whole)
    assert not any((masks / f"epoch_{number:03d}" / "scores.old").exists() for number in gone)
