"""Scores on disk, and the mean over splits that pairs can be ranked by."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.safety.scores import ScoreFiles, load_scores
from shards.errors import UserError
from shards.index import build_index


@pytest.fixture
def index(make_shards, tmp_path):
    return build_index([str(path) for path in make_shards([5, 0, 3])], tmp_path / "index")


def write(folder, index, step, cos_N, before=None, splits=0):
    files = ScoreFiles(folder / "scores", index, step, before and before / "scores", splits)
    for shard in (0, 2):
        start, stop = index.offsets[shard], index.offsets[shard + 1]
        returned_S = files.write(shard, cos_N[start:stop], [])
        np.testing.assert_array_equal(returned_S, files.read(shard)[0])
    return load_scores(folder, index.counts)


def test_the_score_is_the_mean_of_the_cosines_of_all_splits_and_the_cosine_stays_beside_it(index, tmp_path):
    cos = np.random.default_rng(0).uniform(-1, 1, (4, 8)).astype(np.float32)
    folders = [tmp_path / f"epoch_{n}" for n in range(4)]
    for n in range(4):
        score_N = write(folders[n], index, n, cos[n], folders[n - 1] if n else None, n)
        np.testing.assert_allclose(score_N, cos[: n + 1].mean(0), atol=1e-6)
        assert score_N.dtype == np.float32
        np.testing.assert_array_equal(pq.read_table(folders[n] / "scores/00000.parquet")["cosine"], cos[n, :5])


def test_a_pair_that_cannot_be_read_now_has_no_score_and_one_that_could_not_before_has_its_cosine(index, tmp_path):
    first, second = np.full(8, 0.5, np.float32), np.full(8, 0.1, np.float32)
    first[2], second[6] = np.nan, np.nan
    write(tmp_path / "one", index, 1, first)
    score_N = write(tmp_path / "two", index, 2, second, tmp_path / "one", 1)
    np.testing.assert_allclose(score_N, [0.3, 0.3, 0.1, 0.3, 0.3, 0.3, np.nan, 0.3], atol=1e-6)


def test_scores_before_that_are_gone_are_named(index, tmp_path):
    with pytest.raises(UserError, match="00000.parquet: cannot be read .* selection.score=mean"):
        write(tmp_path / "two", index, 2, np.zeros(8, np.float32), tmp_path / "one", 1)
