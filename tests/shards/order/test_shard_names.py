"""Names of a mask's shards: found as in a dict of all of them, and refused where they are no names."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.index.shard_list import Shard, ShardList
from shards.order.shard_names import COLUMNS, NamedShards, shard_columns
from shards.storage.columns import record_batch

parts = st.sampled_from(["a", "b", "a.b", "ü", "\udce9", "x\ny"])
names = st.lists(parts, min_size=1, max_size=3).map("/".join)


def named(some):
    return NamedShards(record_batch(COLUMNS, {"name": some, "bytes": [1] * len(some), "fingerprint": some}))


@given(st.lists(names, min_size=1, max_size=8, unique=True), names)
def test_names_are_found_as_in_a_dict(some, wanted):
    bases = Counter(name.rpartition("/")[2] for name in some)
    alone = {name.rpartition("/")[2]: number for number, name in enumerate(some)}
    known = {base: number for base, number in alone.items() if bases[base] == 1}
    known |= {name: number for number, name in enumerate(some)}
    shards = named(some)
    for name in [*some, *bases, wanted, "nobody"]:
        assert shards.number(name) == known.get(name)
    for name in some:
        assert shards.find(f"/moved/to/{name}") == known[name]
    assert shards[0] == {"name": some[0], "bytes": 1, "fingerprint": some[0]}


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "//x", "..", "../x", "a/../x", "a/..", "a\n/../x", "a\0", "./a", "a/", "b"]
)
def test_what_is_no_name_below_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="below one folder"):
        named(["b", name])


alike = [
    *(f"https://host/get?file={number}.tar" for number in range(3)),
    *(f"https://host/get/a.tar?part={number}&like=/b.tar" for number in range(2)),
    *(f"pipe:unzip -p all.tar.zip {number}" for number in range(3)),
    "/data/b.tar",
    "s3://bucket/b.tar",
]


@given(st.lists(st.sampled_from(alike), min_size=1, unique=True))
def test_shards_that_differ_in_a_query_or_a_command_have_names_of_their_own(urls):
    shards = ShardList.of([Shard(url, 1, 1, f"{number:032x}", "t.parquet") for number, url in enumerate(urls)])
    found = NamedShards(shard_columns(shards))
    assert [found.find(url) for url in urls] == list(range(len(urls)))


def test_names_of_shards_that_their_paths_tell_apart_have_no_query():
    urls = ["https://host/a.tar?key=1", "https://host/b.tar?key=1", "pipe:cat c.tar"]
    shards = ShardList.of([Shard(url, 1, 1, f"{number:032x}", "t.parquet") for number, url in enumerate(urls)])
    assert shard_columns(shards)["name"].to_pylist() == [b"https/host/a.tar", b"https/host/b.tar", b"c.tar"]
    found = NamedShards(shard_columns(shards))
    assert found.find("https://host/b.tar?key=2&like=/a.tar") == 1
