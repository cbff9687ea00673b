"""An audit of a run: the history of every pair over its splits, and what suspicion took off them."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.audit.audit import audit
from pipeline.config import Config, Selection
from pipeline.safety.scores import ScoreFiles
from pipeline.safety.split import mask_folder, save_split, split_pairs
from shards.index import build_index
from tests.audits import make_pairs

PAIRS, SPLITS, TORN = 60, 3, 7


def make_run(folder, index, cos_N, lowered_SN, suspicion):
    """A run's folder with SPLITS splits: at each the cosines, lowered by so much."""
    config = Config()
    config.data.index, config.model.name = str(folder.parent / "index"), "RN50"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    for number, lowered_N in enumerate(lowered_SN):
        where = mask_folder(folder, number)
        files = ScoreFiles(where / "scores", index, number)
        for shard in range(len(index.counts)):
            rows = slice(int(index.offsets[shard]), int(index.offsets[shard + 1]))
            torn = [(0, TORN, "key", "torn")] if shard == 0 else []
            files.write(shard, cos_N[rows], cos_N[rows], torn, lowered_N[rows])
        score_N = (cos_N - lowered_N).astype(np.float32)
        split = split_pairs(score_N, index.counts, Selection(first_share=0.5), number)
        meta = {"epoch": number, "step": number, "config": "", "score": "cosine", "mean_of": 1, "suspicion": suspicion}
        save_split(where, split, index, meta)
    return folder


@pytest.fixture
def pairs(tmp_path):
    """(folder, index, cosines): one pair cannot be read, one fits worst."""
    index = build_index(make_pairs(tmp_path / "data", [f"thing {row}" for row in range(PAIRS)]), tmp_path / "index")
    cos_N = np.random.default_rng(0).uniform(0, 0.5, PAIRS).astype(np.float32)
    cos_N[TORN], cos_N[9] = np.nan, -0.9
    return tmp_path, index, cos_N


def column(folder, name):
    return pq.read_table(folder / "findings.parquet")[name].to_numpy()


def test_what_suspicion_lowered_is_a_finding_of_its_own(pairs):
    folder, index, cos_N = pairs
    lowered_SN = np.zeros((SPLITS, PAIRS), np.float32)
    lowered_SN[:, 20:24] = 2.0  # these look like low scores, the last of them at one split only
    lowered_SN[2, 23] = 0.0
    run = make_run(folder / "run", index, cos_N, lowered_SN, suspicion=0.8)
    audit(run, folder / "out", worst=0.05, say=lambda line: None)
    score_N = column(folder / "out", "suspicion_score")
    np.testing.assert_allclose(score_N[[19, 20, 23]], np.exp([0, -2, -4 / 3]), rtol=1e-6)
    assert np.isnan(score_N[TORN]) and np.isnan(score_N).sum() == 1
    assert np.flatnonzero(column(folder / "out", "is_suspicion_issue")).tolist() == [20, 21, 22]
    # What does not match is told by the score as it was before, so that one finding does not stand in the other.
    assert np.nanargmin(column(folder / "out", "mismatch_score")) == 9
    np.testing.assert_allclose(column(folder / "out", "mismatch_score")[20], (1 + cos_N[20]) / 2, rtol=1e-5)


def test_the_history_is_told_over_all_splits(pairs):
    folder, index, cos_N = pairs
    run = make_run(folder / "run", index, cos_N, np.zeros((SPLITS, PAIRS), np.float32), suspicion=0.0)
    audit(run, folder / "out", worst=0.05, say=lambda line: None)
    found = json.loads((folder / "out/audit.json").read_text())["detectors"]
    assert "selection.suspicion" in found["suspicion"]["skipped"]
    assert np.nanargmin(column(folder / "out", "history_score")) == 9
    risky_N = column(folder / "out", "epochs_risky")
    assert risky_N[9] == risky_N[TORN] == SPLITS and risky_N[np.nanargmax(cos_N)] == 0
