"""What a run trained on: the pairs of every safe set, and of the run that it started from."""

import numpy as np
import pytest
import yaml

from pipeline.config.schema import Config
from pipeline.evaluation.selection_quality import trained_on
from shards.index.build_index import build_index
from shards.order.safe_mask import SafeMask


@pytest.fixture
def index(tmp_path, make_shards):
    return build_index([str(path) for path in make_shards([4, 3])], tmp_path / "index")


def settings(method="safeclip"):
    config = Config()
    config.train.method, config.data.overlay = method, "attack"
    return config


def kept(folder, index, rows):
    SafeMask.from_flags(index.counts, np.isin(np.arange(7), rows)).save(folder, {"fingerprint": index.fingerprint})


def trained(run_dir, config, index):
    return np.flatnonzero(trained_on(run_dir, config, index)).tolist()


def test_it_is_all_that_any_epoch_let_in(tmp_path, index):
    kept(tmp_path / "masks/epoch_002", index, [0, 5])
    kept(tmp_path / "masks/epoch_003", index, [0, 1])
    for expected, config in (
        ([0, 1, 5], settings()),  # the low-rate epochs on all pairs do not count
        (range(7), settings("clip")),
        (range(7), settings("roclip")),
    ):
        assert trained(tmp_path, config, index) == list(expected)


def test_a_run_that_starts_from_another_has_trained_on_what_that_one_did(tmp_path, index):
    kept(tmp_path / "clean", index, [0, 2])
    kept(tmp_path / "filter", index, [0, 4])
    before = settings("clip")
    before.preset, before.data.mask = "clip", str(tmp_path / "filter")
    before.data.index, before.model.name = "index", "RN50"
    (tmp_path / "before").mkdir()
    (tmp_path / "before/config.yaml").write_text(yaml.safe_dump(before.model_dump()))
    config = settings("cleanclip")
    config.data.mask, config.model.pretrained = str(tmp_path / "clean"), str(tmp_path / "before")
    assert trained(tmp_path, config, index) == [0, 2, 4]
    config.data.overlay = None  # on data without poison
    assert trained(tmp_path, config, index) == [0, 4]
    config.data.overlay, before.data.overlay = "attack", None
    (tmp_path / "before/config.yaml").write_text(yaml.safe_dump(before.model_dump()))
    assert trained(tmp_path, config, index) == [0, 2]
    config.model.pretrained = str(tmp_path / "gone")
    assert trained_on(tmp_path, config, index) is None
