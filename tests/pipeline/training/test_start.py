"""What a start finds in the run directory, and what it refuses."""

import copy

import pytest
import yaml

from pipeline.training import checkpoint, start
from pipeline.training.model import build_model, picture_size, tokenizer_for
from shards.build.shapes import shapes
from shards.errors import UserError
from tests.helpers.models import MODEL
from tests.helpers.runs import config


def test_a_start_without_a_checkpoint_does_not_claim_the_directory(tmp_path):
    made = config(tmp_path, "run", train__lr=3.0)
    run_dir = tmp_path / "run"
    for lr in (3.0, 0.5):
        made.train.lr = lr
        assert start.claim(made, run_dir, "data") == (None, [])
        assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["lr"] == lr
    # It died while it wrote its first checkpoint, with a line of metrics: nothing that is worth keeping.
    (run_dir / "checkpoints" / "step_00000000").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    made.train.lr = 0.1
    found, (warning,) = start.claim(made, run_dir, "data")
    assert found is None and "step_00000000: it has no COMPLETE marker" in warning
    (run_dir / "checkpoints" / "step_00000009").mkdir()
    with pytest.raises(UserError, match="holds a run, but no complete checkpoint"):
        start.claim(made, run_dir, "data")


def test_a_run_with_a_checkpoint_keeps_its_config(tmp_path, monkeypatch):
    made, run_dir = config(tmp_path, "run"), tmp_path / "run"
    start.claim(made, run_dir, "data")
    monkeypatch.setattr(checkpoint, "newest_complete", lambda folder: (run_dir, []))
    monkeypatch.setattr(checkpoint, "load_state", lambda folder: {"data": "data"})
    made.train.lr = 0.5
    with pytest.raises(UserError, match="train.lr: 0.0005 -> 0.5"):
        start.claim(made, run_dir, "data")
    for text in ("- a list", "a: [", "\ufeff\x00"):
        (run_dir / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="config.yaml: "):
            start.claim(made, run_dir, "data")


KEYS = ["embed_dim", "vision_cfg", "text_cfg", "vision_cfg.image_size", "text_cfg.context_length"]
KEYS += ["vision_cfg.patch_size", "vision_cfg.head_width", "vision_cfg.layers", "text_cfg.heads", "text_cfg.vocab_size"]


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_value_of_a_model_config_is_one_line(key):
    for value in ("x", [], None, 1.5, 10**30):
        made = copy.deepcopy(MODEL)
        *parents, last = key.split(".")
        (made[parents[0]] if parents else made)[last] = value
        with pytest.raises(UserError, match="model.config") as error:
            for function in (tokenizer_for, picture_size, build_model):
                function({"config": made})
        assert "\n" not in str(error.value)


def test_an_error_of_a_start_is_in_the_log_file_of_its_rank(tmp_path, monkeypatch):
    shapes(tmp_path / "shapes", pairs=24, test=4)

    def fails(*args):
        raise ValueError("of the engine")

    monkeypatch.setattr(start, "start_engine", fails)
    with pytest.raises(ValueError):
        start.Run(config(tmp_path, "run"))
    assert "ValueError: of the engine" in (tmp_path / "run/logs/rank_0.log").read_text()
