"""The data of a config: several sources are one index, in which a sample has one place and its source's weight."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli.main import own_words
from pipeline.config.data import describe, open_index, open_samples
from pipeline.config.schema import Data, Selection
from pipeline.safety.round import save_round, select_pairs
from shards.errors import Unreachable, UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.index.shard_list import ShardList
from shards.order.safe_mask import SavedMask
from shards.views.batch import Views
from shards.views.loader import PlainBatches
from shards.views.readers import batches
from tests.helpers.saved_masks import cosines


@pytest.fixture
def folders(make_shards, tmp_path):
    """Folders of two indexes, of captions and of labels, and the paths of all shards."""
    paths = [str(path) for path in make_shards([4, 6, 3])]
    build_index(paths[:2], tmp_path / "a")
    build_index(paths[2:], tmp_path / "b", text="cls")
    return str(tmp_path / "a"), str(tmp_path / "b"), paths


def test_sources_are_one_index(folders):
    a, b, paths = folders
    data = Data(sources={"cc": {"index": a, "weight": 1}, "own": {"index": b, "weight": 3}})
    index = open_index(data)
    assert [shard.path for shard in index.shards] == paths and index.repetitions.tolist() == [1, 1, 3]
    assert (index.samples, index.views, index.offsets.tolist()) == (13, 19, [0, 4, 10, 13])
    assert describe(index) == "13 pairs in 3 shards (19 an epoch by the sources' weights)"
    samples = open_samples(data, index)
    assert samples.caption(1, 2) == "caption 2 of shard 1" and samples.caption(2, 2) == "2"
    assert open_index(Data(index=a)).fingerprint == ShardIndex.load(a).fingerprint != index.fingerprint
    twice = Data(sources={"cc": {"index": a, "weight": 1}, "again": {"index": a, "weight": 1}})
    with pytest.raises(UserError, match="data.sources.again: shard .* is in source cc too"):
        open_index(twice)


def test_a_mask_of_several_places_has_a_name_for_each_shard(folders, tmp_path):
    a, b, paths = folders
    index = open_index(Data(sources={"cc": {"index": a, "weight": 1}, "own": {"index": b, "weight": 2}}))
    urls = ["s3://bucket/set/a.tar", "https://host/set/a.tar?token=x", "pipe:aws s3 cp 's3://other/a.tar' -"]
    index.shards = ShardList.of([replace(shard, path=url) for shard, url in zip(index.shards, urls)])
    save_round(
        tmp_path / "mask",
        select_pairs(cosines(13), index.counts, Selection(first_fraction=0.5), 0),
        index,
        {"epoch": 0, "step": 0, "config": ""},
    )
    saved = SavedMask(tmp_path / "mask")
    assert [saved.find(url) for url in urls] == [0, 1, 2]


def test_a_command_in_somebody_elses_index_is_not_run(folders, tmp_path):
    *_, paths = folders
    build_index([f"pipe:cat {paths[0]}"], tmp_path / "pipe", allow_pipe=True)
    with pytest.raises(UserError, match="data.allow_pipe=true"):
        open_index(Data(index=str(tmp_path / "pipe")))
    data = Data(index=str(tmp_path / "pipe"), allow_pipe=True, cache=str(tmp_path / "cache"))
    assert open_samples(data, open_index(data)).caption(0, 1) == "caption 1 of shard 0"


def test_a_server_lost_in_a_reading_process_is_one_line(folders, tmp_path):
    a, _, paths = folders
    data = Data(index=a, cache=str(tmp_path / "cache"), remote_timeout=0.5)
    index = open_index(data)
    index.shards = ShardList.of([replace(shard, path="http://127.0.0.1:1/a.tar") for shard in index.shards])
    dataset = PlainBatches(open_samples(data, index), [(range(2), range(2))], Views(16, None, {}))
    with pytest.raises(Unreachable) as error:
        next(batches(dataset, workers=1))
    assert own_words(error.value).startswith("shard http://127.0.0.1:1/a.tar: nothing came for 0.5 s")
    assert "\n" not in own_words(error.value)


FAILS_WHILE_IT_READS = """
from pipeline.cli.main import main
from pipeline.training.signals import ignore
from shards.errors import UserError
from shards.index import build_index
from shards.views.readers import batches

reading = batches(range(100), workers=1, in_worker=ignore)

def fail(**options):
    next(reading)
    raise UserError("wrong")

build_index.build_index = fail
main(["index", "x", "--out", "y"])
"""


def test_a_command_that_fails_while_it_reads_ends(tmp_path):
    words = [sys.executable, "-c", FAILS_WHILE_IT_READS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[3])
    assert (done.returncode, done.stderr) == (2, "safeclip: wrong\n")
