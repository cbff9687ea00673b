"""Scores on disk: what is ranked by, the cosine beside it, and of which model they are."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.safety.scores import ScoreFiles, load_scores
from shards.errors import UserError
from shards.index import build_index


@pytest.fixture
def index(make_shards, tmp_path):
    return build_index([str(path) for path in make_shards([5, 0, 3])], tmp_path / "index")


def write(folder, index, cos_N, score_N, lowered_N=None, **made):
    files = ScoreFiles(folder / "scores", index, **made)
    for shard in (0, 2):
        here = slice(index.offsets[shard], index.offsets[shard + 1])
        lowered_B = None if lowered_N is None else lowered_N[here]
        files.write(shard, cos_N[here], score_N[here], [(2, 1, "key", "torn")] if shard == 2 else [], lowered_B)
    return files


def test_the_cosine_stays_beside_the_score(index, tmp_path):
    cos_N, score_N = np.random.default_rng(0).uniform(-1, 1, (2, 8)).astype(np.float32)
    cos_N[6] = score_N[6] = np.nan
    files = write(tmp_path, index, cos_N, score_N, step=1)
    np.testing.assert_array_equal(load_scores(tmp_path, index.counts), score_N)
    np.testing.assert_array_equal(pq.read_table(files.path(0))["cosine"], cos_N[:5])
    found, bad = files.read(2)
    np.testing.assert_array_equal(found, score_N[5:])
    assert [(shard, position, reason) for shard, position, _, reason in bad] == [(2, 1, "torn")]


def test_scores_of_another_step_or_config_are_not_used(index, tmp_path):
    zero_N = np.zeros(8, np.float32)
    assert write(tmp_path, index, zero_N, zero_N, step=1, config="one").done() == [0, 2]
    assert ScoreFiles(tmp_path / "scores", index, 2, "one").done() == []
    assert ScoreFiles(tmp_path / "scores", index, 1, "two").done() == []


def test_the_mean_of_the_scores_of_all_splits_goes_on_from_the_split_before(index, tmp_path):
    scores = np.random.default_rng(0).uniform(-1, 1, (4, 8)).astype(np.float32)
    for n in range(4):
        before = tmp_path / str(n - 1) / "scores" if n else None
        write(tmp_path / str(n), index, scores[n] / 2, scores[n], step=n, before=before, splits=n)
        np.testing.assert_allclose(load_scores(tmp_path / str(n), index.counts), scores[: n + 1].mean(0), atol=1e-6)


def test_what_suspicion_lowers_is_no_part_of_the_mean_that_goes_on(index, tmp_path):
    rng = np.random.default_rng(0)
    scores, lowered = rng.uniform(-1, 1, (3, 8)).astype(np.float32), rng.uniform(0, 1, (3, 8)).astype(np.float32)
    for n in range(3):
        before = tmp_path / str(n - 1) / "scores" if n else None
        write(tmp_path / str(n), index, scores[n], scores[n], lowered[n], step=n, before=before, splits=n)
        expected = scores[: n + 1].mean(0) - lowered[n]
        np.testing.assert_allclose(load_scores(tmp_path / str(n), index.counts), expected, atol=1e-6)


def test_a_pair_that_has_no_score_now_has_none_and_one_that_had_none_before_has_this_one(index, tmp_path):
    first, second = np.full(8, 0.5, np.float32), np.full(8, 0.1, np.float32)
    first[2], second[6] = np.nan, np.nan
    write(tmp_path / "one", index, first, first, step=1)
    write(tmp_path / "two", index, second, second, step=2, before=tmp_path / "one" / "scores", splits=1)
    mean_N = load_scores(tmp_path / "two", index.counts)
    np.testing.assert_allclose(mean_N, [0.3, 0.3, 0.1, 0.3, 0.3, 0.3, np.nan, 0.3], atol=1e-6)


def test_scores_before_that_are_gone_are_named(index, tmp_path):
    zero_N = np.zeros(8, np.float32)
    with pytest.raises(UserError, match="00000.parquet: cannot be read .* selection.score=agreement"):
        write(tmp_path / "two", index, zero_N, zero_N, step=2, before=tmp_path / "one" / "scores", splits=1)
