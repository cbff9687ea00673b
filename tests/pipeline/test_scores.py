"""Scores on disk: what is ranked by, the cosine beside it, and of which model they are."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.safety.scores import ScoreFiles, load_scores
from shards.index import build_index


@pytest.fixture
def index(make_shards, tmp_path):
    return build_index([str(path) for path in make_shards([5, 0, 3])], tmp_path / "index")


def write(folder, index, cos_N, score_N, **made):
    files = ScoreFiles(folder / "scores", index, **made)
    for shard in (0, 2):
        here = slice(index.offsets[shard], index.offsets[shard + 1])
        files.write(shard, cos_N[here], score_N[here], [(2, 1, "key", "torn")] if shard == 2 else [])
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
