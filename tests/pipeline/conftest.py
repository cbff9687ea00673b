"""Saved masks with their shards, apart from any run."""

import shutil

import numpy as np
import pytest

from shards.index.shard_index import build_index
from tests.saved_masks import NAMES, cosines, make_tar, save_mask


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two masks of the same shards, apart from any run: data/ with NAMES, masks/one and masks/two."""
    folder = tmp_path_factory.mktemp("saved")
    for shard, (name, count) in enumerate(zip(NAMES, (20, 0, 7, 13))):
        make_tar(folder / "first" / name, shard, count)
    index = build_index([str(folder / "first" / name) for name in NAMES], folder / "index")
    cos = cosines(40)
    cos[[3, 25]] = np.nan
    bad = [(0, 3, "d/0_003", "no caption"), (2, 5, "d/2_005", "no picture")]
    save_mask(folder / "masks" / "one", index, cos, bad=bad)
    save_mask(folder / "masks" / "two", index, cosines(40, seed=1), 0.6, step=40)
    shutil.rmtree(folder / "index")
    (folder / "first").rename(folder / "data")  # the shards have moved since
    return folder


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    """A copy of `saved` to damage, as the working directory."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
