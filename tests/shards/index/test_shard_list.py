"""The list of an index's shards: what is written is what is loaded, under the same fingerprint."""

import hashlib
import json
import os
import pickle
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import Shard, ShardIndex, write_index
from shards.storage.remote import is_remote

paths = st.one_of(
    st.binary(min_size=1, max_size=9).map(lambda name: "/data/" + name.decode("utf-8", "surrogateescape")),
    st.sampled_from(["s3://bucket/a.tar", "pipe:cat a.tar", "/data/pipe:a", "/a:/b.tar"]),
)
prints = st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}")
entries = st.builds(Shard, paths, st.integers(0, 2**40), st.integers(0, 2**20), prints, prints)
members = st.sampled_from([("txt", ""), ("cls", ""), ("json:ü", ""), ("txt", "input.png"), ("json:a+txt", "png")])


def placed(shards, folder, text, image):
    return [replace(one, table=f"{folder}/tables/{one.table}", text=text, image=image) for one in shards]


@settings(max_examples=50)
@given(st.lists(entries, min_size=1, max_size=6), members)
def test_an_index_is_loaded_as_it_was_written(tmp_path_factory, shards, about):
    folder, (text, image) = tmp_path_factory.mktemp("index"), about
    write_index(folder, shards, text, image)
    index, expected = ShardIndex.load(folder), placed(shards, folder, text, image)
    assert index.shards == expected and list(index.shards) == expected
    assert index.counts.tolist() == [shard.samples for shard in shards] and index.samples == sum(index.counts)
    assert index.shards.remote_S.tolist() == [is_remote(shard.path) for shard in shards]
    named = "".join(s.fingerprint + (text if text not in ("txt", "cls") else "") + image for s in shards)
    assert index.fingerprint == hashlib.blake2b(named.encode(), digest_size=16).hexdigest()
    assert index.fingerprint == ShardIndex(expected).fingerprint


@settings(max_examples=20)
@given(st.lists(entries, min_size=1, max_size=4), members)
def test_an_index_of_version_3_is_read(tmp_path_factory, shards, about):
    folder, (text, image) = tmp_path_factory.mktemp("index"), about
    listed = [{key: value for key, value in asdict(one).items() if key not in ("text", "image")} for one in shards]
    old = {"version": 3, "text": text, "image": image, "shards": listed}
    (folder / "index.json").write_text(json.dumps(old))
    index = ShardIndex.load(folder)
    assert index.shards == placed(shards, folder, text, image)
    write_index(folder, shards, text, image)
    assert index.fingerprint == ShardIndex.load(folder).fingerprint


def test_an_index_is_sent_to_another_process_as_its_files(tmp_path):
    shards = [Shard(f"/d/{n}.tar", 1, 5, f"{n:032x}", f"{n}.parquet") for n in range(2000)]
    write_index(tmp_path / "a", shards[:1500], "txt", "")
    write_index(tmp_path / "b", shards[1500:], "cls", "")
    one = ShardIndex.load(tmp_path / "a")
    two = ShardIndex.merged({"a": (tmp_path / "a", 1), "b": (tmp_path / "b", 3)})
    for index in (one, two):
        sent = pickle.dumps(index)
        write_index(tmp_path / "a", shards[:1], "txt", "")  # an index that is made anew leaves it what it was
        other = pickle.loads(sent)
        assert len(sent) < 2000 and other.shards == index.shards and other.fingerprint == index.fingerprint
        assert other.repetitions.tolist() == index.repetitions.tolist() and other.views == index.views
    in_memory = pickle.loads(pickle.dumps(ShardIndex(shards)))
    assert in_memory.shards == shards


def test_a_list_that_another_one_replaces_stays_for_a_day_from_then_on(tmp_path):
    lists = [[Shard(f"/d/{n}.tar", 1, 5, f"{n:032x}", f"{n}.parquet")] for n in range(3)]

    def files():
        return {file.name for file in tmp_path.glob("shards_*.arrow")}

    def write(shards):
        for name in files():  # all that stands there was written long ago
            os.utime(tmp_path / name, (0, 0))
        write_index(tmp_path, shards, "txt", "")
        return json.loads((tmp_path / "index.json").read_text())["columns"]

    first = write(lists[0])
    sent = pickle.dumps(ShardIndex.load(tmp_path))
    second = write(lists[1])
    assert files() == {first, second} and pickle.loads(sent).shards[0].path == "/d/0.tar"
    third = write(lists[2])
    assert files() == {second, third}


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "other", "count"])
def test_damaged_columns_are_one_line(make_shards, tmp_path, damage):
    paths = [str(path) for path in make_shards([2, 3])]
    expected = list(build_index(paths, tmp_path / "index").shards)
    (file,) = (tmp_path / "index").glob("shards_*.arrow")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    whole = file.read_bytes()
    if damage in ("cut", "changed"):
        file.write_bytes(whole[:-30] if damage == "cut" else whole.replace(b"00000.tar", b"00001.tar"))
    elif damage == "gone":
        file.unlink()
    else:
        about.update({"columns": "../x.arrow"} if damage == "other" else {"shards": 3})
        (tmp_path / "index" / "index.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="index .*index.json: cannot be read .*`safeclip index SHARDS") as error:
        ShardIndex.load(tmp_path / "index")
    assert "\n" not in str(error.value)
    assert build_index(paths, tmp_path / "index").shards == expected
