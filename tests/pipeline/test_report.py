"""What a run trained on: the pairs of its slow epochs and of every safe set."""

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.evaluation.report import trained_on
from shards.index import build_index
from shards.masks import SafeMask


@pytest.fixture
def index(tmp_path, make_shards):
    return build_index([str(path) for path in make_shards([4, 3])], tmp_path / "index")


def settings(method="safeclip", slow=1, suspicion=0.0, copies=None):
    config = Config()
    config.train.method, config.train.slow_epochs = method, slow
    config.selection.suspicion, config.selection.copies = suspicion, copies
    return config


def kept(folder, index, rows):
    mask = SafeMask.from_flags(index.counts, np.isin(np.arange(7), rows))
    mask.save(folder, {"fingerprint": index.fingerprint})
    return mask


def test_it_is_all_that_any_epoch_let_in(tmp_path, index):
    splits = [(None, kept(tmp_path / "first", index, [0, 5])), (None, kept(tmp_path / "second", index, [0, 1]))]
    kept(tmp_path / "masks/slow", index, [3])
    kept(tmp_path / "masks/singles", index, [3, 6])
    for expected, config in (
        ([0, 1, 5], settings(slow=0)),
        ([0, 1, 3, 5], settings(suspicion=0.8, copies=2)),
        ([0, 1, 3, 5, 6], settings(copies=2)),
        (range(7), settings()),  # the slow epochs train on all
        (range(7), settings(method="clip")),
    ):
        assert np.flatnonzero(trained_on(tmp_path, config, index, splits)).tolist() == list(expected)


def test_without_the_slow_epochs_mask_it_is_not_known(tmp_path, index):
    assert trained_on(tmp_path, settings(suspicion=0.8), index, []) is None
