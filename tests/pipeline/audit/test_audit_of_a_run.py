"""An audit of a run: the history of every pair over its rounds, and what the guards excluded."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.attacks.manifest import make_attack
from pipeline.audit.audit import audit
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, lacking
from pipeline.config.schema import Config, Selection
from pipeline.guards.duplicates import Duplicates
from pipeline.safety.round import mask_folder, save_round, select_pairs
from pipeline.safety.score_files import ScoreFiles
from pipeline.training import run as running
from shards.build.shapes import shapes
from shards.errors import UserError
from shards.index.build_index import build_index
from tests.helpers.audits import make_pairs
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import config

PAIRS, ROUNDS, TORN = 60, 3, 7


def make_run(folder, index, cos_N, excluded_N):
    """A run's folder with ROUNDS rounds: at each the cosines, and which pairs a guard excludes."""
    made = Config()
    made.data.index, made.model.name = str(folder.parent / "index"), "RN50"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(made.model_dump()))
    score_N = np.where(excluded_N, np.nan, cos_N).astype(np.float32)
    for number in range(ROUNDS):
        where = mask_folder(folder, number)
        files = ScoreFiles(where / "scores", index, number)
        files.claim()
        parts = [slice(first, stop) for first, stop in zip(index.offsets, index.offsets[1:])]
        for shard, part in enumerate(parts):
            files.write(shard, cos_N[part], {TORN: "torn"} if shard == 0 else {})
        files.conclude(lambda n: dict.fromkeys(np.flatnonzero(excluded_N[parts[n]]).tolist(), Duplicates.reason))
        selected = select_pairs(
            score_N, index.counts, Selection(first_fraction=0.5), number, excluded=int(excluded_N.sum())
        )
        save_round(where, selected, index, {"epoch": number, "step": number, "config": "", "score": "cosine"})
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


def test_the_history_is_told_over_all_rounds(pairs):
    folder, index, cos_N = pairs
    run = make_run(folder / "run", index, cos_N, np.zeros(PAIRS, bool))
    audit(run, folder / "out", worst=0.05)
    found = json.loads((folder / "out/audit.json").read_text())["detectors"]
    assert "no run whose guards" in found["excluded"]["skipped"]
    assert np.nanargmin(column(folder / "out", "history_score")) == 9
    risky_N = column(folder / "out", "epochs_risky")
    assert risky_N[9] == risky_N[TORN] == ROUNDS and risky_N[np.nanargmax(cos_N)] == 0


def test_what_a_guard_excludes_is_judged_by_its_cosine_besides(pairs):
    folder, index, cos_N = pairs
    run = make_run(folder / "run", index, cos_N, np.isin(np.arange(PAIRS), [9, 20, 21]))
    audit(run, folder / "out", worst=0.05)
    assert np.flatnonzero(column(folder / "out", "is_excluded_issue")).tolist() == [9, 20, 21]
    assert np.flatnonzero(column(folder / "out", "is_broken_issue")).tolist() == [TORN]
    score_N = column(folder / "out", "mismatch_score")
    assert np.nanargmin(score_N) == 9 and np.isnan(score_N[TORN])
    np.testing.assert_allclose(score_N[[9, 20]], (1 + cos_N[[9, 20]]) / 2, rtol=1e-5)
    page = (folder / "out/report.html").read_text()
    assert "3 pairs by duplicates: its picture occurs in too many pairs" in page


def test_what_the_guards_of_a_run_excluded_is_a_finding(tmp_path):
    """Two epochs of the default preset on data in which two pictures stand in three pairs each."""
    shapes(tmp_path / "shapes", pairs=240, test=36)
    names = {"index": "index", "labels": "labels", "test": "test_index", "classnames": "classnames.txt"}
    attack = {key: str(tmp_path / "shapes" / name) for key, name in names.items()}
    attack["attacks"] = {"one": {"attack": "single_target", "targets": 2, "captions": 3}}
    make_attack({**attack, "out": str(tmp_path / "attack")})
    changes = {"train__epochs": 2, "train__unimodal_epochs": 0, "data__overlay": str(tmp_path / "attack")}
    run_ranks(running.train, 1, config(tmp_path, "run", **changes))
    audit(tmp_path / "run", tmp_path / "out")
    data = AuditData(tmp_path / "run")
    (rows,) = data.truth().values()
    assert data.excluded.rows_of()[Duplicates.reason].tolist() == rows.tolist() and len(rows) == 6
    assert set(np.flatnonzero(column(tmp_path / "out", "is_excluded_issue"))) == set(data.excluded.row_M)
    assert not data.saved.mask.flags()[data.excluded.row_M].any() and not len(data.reasons)
    assert "6 pairs by duplicates" in (tmp_path / "out/report.html").read_text()


def test_a_run_without_a_selection_round_is_told_to_be_scored(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no selection round; use `safeclip score --model"):
        AuditData(tmp_path / "run")


def test_a_changed_shard_is_why_there_are_no_pictures(pairs, caplog):
    folder, index, cos_N = pairs
    run = make_run(folder / "run", index, cos_N, np.zeros(PAIRS, bool))
    shard = Path(index.shards[0].path)
    shard.write_bytes(shard.read_bytes().replace(b"thing", b"thong"))
    data = AuditData(run)
    assert lacking(REGISTRY["dark"], data) == f"no pictures: {data.no_pictures}"
    assert f"no pictures: shard {shard}" in caplog.text and str(shard) in data.no_pictures
