"""Scores on disk: what is ranked by, the cosine beside it, and of which model they are."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.safety.score_files import ScoreFiles, load_scores
from shards.index.shard_index import build_index


@pytest.fixture
def index(make_shards, tmp_path):
    return build_index([str(path) for path in make_shards([5, 0, 3])], tmp_path / "index")


def write(folder, index, cos_N, **made):
    files = ScoreFiles(folder / "scores", index, **made)
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
        files.exclude(2, {0: "copied", 1: "copied"})
        assert files.done() == [0, 2]
        expected_N = cos_N.copy()
        expected_N[5] = np.nan
        np.testing.assert_array_equal(load_scores(tmp_path, index.counts), expected_N)
        found, bad = files.read(2)
        np.testing.assert_array_equal(found, cos_N[5:])
        assert [(shard, position, reason) for shard, position, _, reason in bad] == [(2, 1, "torn")]
        assert pq.read_table(files.path(2))["reason"].to_pylist() == ["copied", "torn", None]


def test_scores_of_another_step_or_config_are_not_used(index, tmp_path):
    zero_N = np.zeros(8, np.float32)
    assert write(tmp_path, index, zero_N, step=1, config="one").done() == [0, 2]
    assert ScoreFiles(tmp_path / "scores", index, 2, "one").done() == []
    assert ScoreFiles(tmp_path / "scores", index, 1, "two").done() == []
