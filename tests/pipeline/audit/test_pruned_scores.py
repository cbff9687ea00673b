"""A run whose older rounds have no scores any more (run.keep): what can be done with their masks, and what not."""

import json
import shutil

import numpy as np
import yaml

from pipeline.audit.audit import audit
from pipeline.audit.data import AuditData
from pipeline.audit.detectors.from_scores import History
from shards.index.build_index import build_index
from shards.order.safe_mask import SavedMask
from tests.helpers.saved_masks import ALL, cosines, refused, run, save_mask


def make_run(folder):
    """Two rounds, the first without its scores, in folder/run."""
    index = build_index([str(folder / name) for name in ALL], folder / "run_index")
    for number in (1, 2):
        mask = folder / "run" / "masks" / f"epoch_{number:03d}"
        save_mask(mask, index, cosines(index.samples, seed=number), step=number)
    shutil.rmtree(folder / "run" / "masks" / "epoch_001" / "scores")
    config = {"preset": "default", "model": {"name": "RN50"}, "data": {"index": str(folder / "run_index")}}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "run"


def test_a_run_is_audited_by_the_scores_that_were_kept(here):
    folder = make_run(here)
    masks = [SavedMask(folder / "masks" / f"epoch_00{number}").mask.flags() for number in (1, 2)]
    data = AuditData(folder)
    found = History().find(data, 0.1)
    order = np.argsort(data.cos_N, kind="stable")
    assert np.array_equal(np.argsort(found.score_N, kind="stable"), order)  # by the last round alone
    assert np.array_equal(found.more["flips"], masks[0] != masks[1])
    assert "40 pairs" in audit(folder, here / "audit", detectors=["mismatch", "history"])
    report = (here / "audit" / "report.html").read_text()
    assert "scores of 1 of 2 rounds were not kept (run.keep)" in report


def test_a_mask_without_scores_says_what_it_cannot_do(here, capsys):
    folder = make_run(here)
    old, last = (str(folder / "masks" / f"epoch_00{number}") for number in (1, 2))
    shown = run(capsys, "mask", "show", old)[1]
    assert "20 = 50.00%" in shown and "not known, the scores were not kept (run.keep)" in shown
    assert json.loads(run(capsys, "mask", "show", old, "--json")[1])["bad_pairs"] is None
    assert "Jaccard" in run(capsys, "mask", "diff", old, last)[1]
    assert "20 safe" in run(capsys, "mask", "apply", old, *ALL, "--out", "filtered")[1]
    for words in (
        ("export", old, "--format", "csv", "--out", "m.csv"),
        ("replay", old),
        ("diff", old, last, "--out", "moved.csv"),
    ):
        assert f"mask {old}: has no scores/; a run keeps those of its last rounds" in refused(capsys, "mask", *words)
    assert run(capsys, "mask", "export", last, "--format", "csv", "--out", "m.csv")[0] == 0
