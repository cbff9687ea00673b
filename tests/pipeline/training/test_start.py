"""What a start refuses, and where its errors are told."""

import copy

import pytest

from pipeline.training import start
from pipeline.training.model import build_model, picture_size, tokenizer_for
from pipeline.training.signals import Preempted
from shards.build.shapes import shapes
from shards.errors import UserError
from tests.helpers.models import MODEL
from tests.helpers.runs import config

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


def test_a_start_that_is_asked_to_stop_claims_nothing(tmp_path):
    shapes(tmp_path / "shapes", pairs=24, test=4)
    with pytest.raises(Preempted):
        start.Run(config(tmp_path, "run"), stop=lambda: True)
    assert not (tmp_path / "run").exists()
    with start.Run(config(tmp_path, "run", run__restart=True), stop=lambda: True) as run:
        assert run.state["step"] == 0
