"""What a start finds in the run directory, and what it refuses."""

import pytest
import yaml

from pipeline.training import checkpoint
from pipeline.training.run_dir import claim
from shards.errors import UserError
from tests.helpers.runs import config


def test_a_start_without_a_checkpoint_does_not_claim_the_directory(tmp_path):
    made = config(tmp_path, "run", train__lr=3.0)
    run_dir = tmp_path / "run"
    for lr in (3.0, 0.5):
        made.train.lr = lr
        assert claim(made, run_dir, "data") == (None, [])
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["lr"] == lr
    # It died while it wrote its first checkpoint, with a line of metrics: nothing that is worth keeping.
    (run_dir / "checkpoints" / "step_00000000").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    made.train.lr = 0.1
    found, (warning,) = claim(made, run_dir, "data")
    assert found is None and "step_00000000: it has no COMPLETE marker" in warning
    (run_dir / "checkpoints" / "step_00000009").mkdir()
    with pytest.raises(UserError, match="holds a run, but no complete checkpoint"):
        claim(made, run_dir, "data")


def test_a_run_with_a_checkpoint_keeps_its_config(tmp_path, monkeypatch):
    made, run_dir = config(tmp_path, "run"), tmp_path / "run"
    claim(made, run_dir, "data")
    monkeypatch.setattr(checkpoint, "newest_complete", lambda folder: (run_dir, []))
    monkeypatch.setattr(checkpoint, "load_state", lambda folder: {"data": "data"})
    made.train.lr = 0.5
    with pytest.raises(UserError, match="train.lr: 0.0005 -> 0.5"):
        claim(made, run_dir, "data")
    for text in ("- a list", "a: [", "\ufeff\x00"):
        (run_dir / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml: "):
            claim(made, run_dir, "data")
