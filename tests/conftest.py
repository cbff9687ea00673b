"""Shared by all tests: small shards on disk, as users have them."""

import os
import shutil
import sys

import numpy as np
import pytest
from hypothesis import settings

from tests.helpers import gpus
from tests.helpers.pictures import picture

os.environ.setdefault("OMP_NUM_THREADS", "1")


gpus.hide()  # the suite runs on CPUs, two to four processes on any host; tests/gpu gives its processes the GPUs back


# Files that take minutes come first, so that no worker ends with one of them.
LONG = ("slurm", "launch", "test_resume", "test_main", "test_comparison", "test_defence", "test_methods")
LONG += ("test_trained_rows", "test_weight_average", "test_signals", "test_sample", "test_frozen", "doctor")
LONG += ("evaluation/test_run", "test_engine", "test_evaluators")


def pytest_collection_modifyitems(items):
    def place(item):
        return next((n for n, name in enumerate(LONG) if name in item.nodeid.partition("::")[0]), len(LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """What a command, or a fixture of a whole module, set up in this process ends with the test that used it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def make_shards(tmp_path):
    """Function: counts per shard -> paths of tars with that many samples, written by webdataset."""
    from shards.build.write import write_shards

    def make(counts, folder="tars"):
        paths = []
        for shard, count in enumerate(counts):
            samples = [
                {
                    "__key__": f"s{shard}_{i:04d}",
                    "png": picture([shard, i]),
                    "txt": f"caption {i} of shard {shard}",
                    "cls": i % 3,
                }
                for i in range(count)
            ]
            if count:
                (path,) = write_shards(samples, tmp_path / folder / str(shard), max(1, count))
            else:
                path = tmp_path / folder / f"empty{shard}.tar"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(bytes(10240))
            paths.append(path)
        return paths

    return make


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Two masks of the same shards, apart from any run: data/ with NAMES, masks/one and masks/two."""
    from shards.index.build_index import build_index
    from tests.helpers.saved_masks import NAMES, cosines, make_tar, save_mask

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


settings.register_profile(
    "project", deadline=None, derandomize=True
)  # results, never timing; the same examples each time
settings.load_profile("project")
