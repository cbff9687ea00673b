"""Shards behind URLs: the same index and the same bytes as of local ones, whatever the server does; and a lost server
is an error in time."""

import pickle
import time
from dataclasses import replace

import numpy as np
import pytest

from shards.errors import ChangedShard, Unreachable, UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples
from shards.storage import remote, retry
from shards.storage.cache import Cache
from shards.storage.prefetch import fetched_ahead
from shards.storage.reader import Reader
from shards.views.loader import PlainBatches
from tests.helpers.servers import Flaky, flaky, gs, s3
from tests.helpers.tars import contents


def read_all(index, cache):
    """`contents` through a cache, or without one."""
    reader = Reader(index, cache)
    return [
        (index.table(s).keys[p], reader.image_bytes(s, p), reader.texts(s, p)[0])
        for s in range(len(index.shards))
        for p in range(index.counts[s])
    ]


@pytest.mark.parametrize("kind, store", [("s3", s3), ("gs", gs)])
def test_buckets(make_shards, tmp_path, monkeypatch, kind, store):
    paths, urls = make_shards([5, 0, 7]), [f"{kind}://shards/set/{{0..2}}.tar"]
    local = build_index([str(path) for path in paths], tmp_path / "local")
    with store(monkeypatch) as (put, delete):
        for number, path in enumerate(paths):
            put(path, f"set/{number}.tar")
        index = build_index(urls, tmp_path / "index", workers=1)
        assert index.fingerprint == local.fingerprint
        cache = Cache(tmp_path / "cache", 10**9)
        assert contents(index) == read_all(index, cache) == contents(local)
        index.verify()
        put(paths[0], "set/2.tar")
        with pytest.raises(UserError, match=rf"{kind}://shards/set/2.tar: .* bytes, but .* were indexed"):
            index.verify()
        again = build_index(urls, tmp_path / "index", workers=1)  # the ETag has changed
        assert again.counts.tolist() == [5, 0, 5]
        delete("set/0.tar")
        with pytest.raises(UserError, match=f"{kind}://shards/set/0.tar: missing"):
            index.verify()
        with pytest.raises(UserError, match=f"{kind}://shards/set/0.tar: missing"):
            build_index(urls, tmp_path / "index", workers=1)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_fails_at_random(make_shards, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(remote, "CHUNK", 2000)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    paths = make_shards([6, 4, 5])
    names = [str(path.relative_to(tmp_path)) for path in paths]
    local = build_index([str(path) for path in paths], tmp_path / "local")
    with flaky(tmp_path, 0.4 if ranges else 0.5, ranges, seconds=0.2) as (address, log):
        index = build_index([f"{address}/{name}" for name in names], tmp_path / "index", workers=1, timeout=30)
        assert index.fingerprint == local.fingerprint
        assert read_all(index, Cache(tmp_path / "cache", 10**9, timeout=30)) == contents(local)
        assert {fault for _, _, fault in log} == {None, "503", "death", "hang"}


@pytest.mark.parametrize("how", ["hangs", "refuses", "is gone"])
def test_a_lost_server_is_one_line_in_time(make_shards, tmp_path, monkeypatch, how):
    (path,) = make_shards([3])
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.05)
    index = build_index([str(path)], tmp_path / "index")
    with flaky(tmp_path, 1.0, seconds=100, kinds=["hang" if how == "hangs" else "503"]) as (address, _):
        url = f"{'http://127.0.0.1:1' if how == 'is gone' else address}/{path.relative_to(tmp_path)}"
        index.shards = [replace(index.shards[0], path=url)]
        cache, started = Cache(tmp_path / "cache", 10**9, timeout=2.0), time.monotonic()
        with pytest.raises(Unreachable, match="00000.tar: nothing came for 2 s .*data.remote_timeout") as error:
            Reader(index, cache).image_bytes(0, 0)
        assert time.monotonic() - started < 10 and "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_other_bytes_than_those_indexed_are_refused(make_shards, tmp_path):
    (path,) = make_shards([3])
    with flaky(tmp_path) as (address, _):
        index = build_index([f"{address}/{path.relative_to(tmp_path)}"], tmp_path / "index")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match="00000.tar: holds other bytes than those that were indexed"):
            read_all(index, Cache(tmp_path / "cache", 10**9))
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_commands_are_run_only_where_they_are_allowed(make_shards, tmp_path):
    (path,) = make_shards([3])
    mark, local = tmp_path / "ran", contents(build_index([str(path)], tmp_path / "local"))
    url = f"pipe:touch {mark}; cat {path}"
    with pytest.raises(UserError, match="data.allow_pipe=true"):
        build_index([url], tmp_path / "index")
    assert not mark.exists()
    index = build_index([url], tmp_path / "index", allow_pipe=True)
    mark.unlink()
    with pytest.raises(UserError, match="data.allow_pipe=true"):
        read_all(ShardIndex.load(tmp_path / "index"), Cache(tmp_path / "cache", 10**9))
    with pytest.raises(UserError, match="data.allow_pipe=true"):
        contents(index)  # without a cache there is no way at all
    assert not mark.exists()
    assert read_all(index, Cache(tmp_path / "cache", 10**9, allow_pipe=True)) == local and mark.exists()
    with pytest.raises(Unreachable, match="the command ends with 3"):
        build_index(["pipe:exit 3"], tmp_path / "other", allow_pipe=True, timeout=1.0)


def test_a_server_that_tells_no_sizes(make_shards, tmp_path, monkeypatch):
    paths, send = make_shards([3, 4]), Flaky.send_header
    monkeypatch.setattr(Flaky, "protocol_version", "HTTP/1.0")  # the end of the connection is that of the file
    monkeypatch.setattr(Flaky, "send_header", lambda *header: header[1] == "Content-Length" or send(*header))
    with flaky(tmp_path, ranges=False) as (address, _):
        urls = [f"{address}/{path.relative_to(tmp_path)}" for path in paths]
        index = build_index(urls, tmp_path / "index", workers=1)
        index.verify()
        local = build_index([str(path) for path in paths], tmp_path / "local")
        assert read_all(index, Cache(tmp_path / "cache", 10**9)) == contents(index) == contents(local)


def test_a_copy_that_was_damaged_on_disk_is_fetched_again_once(make_shards, tmp_path, caplog):
    (path,) = make_shards([3])
    with flaky(tmp_path) as (address, log):
        index = build_index([f"{address}/{path.relative_to(tmp_path)}"], tmp_path / "index", workers=1)
        cache = Cache(tmp_path / "cache", 10**9)
        expected = read_all(index, cache)
        (copy,) = (tmp_path / "cache").glob("*.tar")
        copy.write_bytes(bytes(byte ^ 1 for byte in copy.read_bytes()))
        first, second = Reader(index, cache), Reader(index, cache)
        assert second.descriptor(0) is not None  # both have the damaged copy open
        log.clear()
        for reader in (first, second):
            assert [reader.image_bytes(0, position) for position in range(3)] == [row[1] for row in expected]
        assert [method for method, *_ in log].count("GET") == 1 and "is damaged" in caplog.text
        others = replace(index.table(0).image, crc=np.zeros(3, np.uint32))
        with pytest.raises(ChangedShard, match="00000.tar: the picture of sample 1 is not the one that was indexed"):
            Reader(index, cache).read(0, 1, "picture", others)


def test_single_samples_need_no_whole_shard_but_that_of_a_command(make_shards, tmp_path):
    here, there = make_shards([3, 4])
    local = contents(build_index([str(here), str(there)], tmp_path / "local"))
    with flaky(tmp_path) as (address, log):
        urls = [f"pipe:cat {here}", f"{address}/{there.relative_to(tmp_path)}"]
        index = build_index(urls, tmp_path / "index", workers=1, allow_pipe=True)
        cache = Cache(tmp_path / "cache", 10**9, allow_pipe=True)
        samples = pickle.loads(pickle.dumps(Samples(index, cache=cache).scattered()))
        found = [(s, p, samples.reader.image_bytes(s, p)) for s in range(2) for p in range(index.counts[s])]
    assert [data for *_, data in found] == [picture for _, picture, _ in local]
    assert [path.stem for path in (tmp_path / "cache").glob("*.tar")] == [index.shards[0].fingerprint]
    reading = iter([])
    assert fetched_ahead(reading, PlainBatches(samples, [([3], [3])], None)) is reading


def test_single_samples_of_a_lost_server_are_waited_for_as_long_as_it_is_said(make_shards, tmp_path):
    (path,) = make_shards([3])
    index = build_index([str(path)], tmp_path / "index")
    index.shards = [replace(index.shards[0], path="http://127.0.0.1:1/00000.tar")]
    samples = Samples(index, cache=Cache(tmp_path / "cache", 10**9, timeout=0.5)).scattered()
    with pytest.raises(Unreachable, match="nothing came for 0.5 s"):
        samples.captions(0, 1)


@pytest.mark.parametrize(
    "where", ["set%20of%20m%C3%BCller/00000.tar?version=2", "moved/set%20of%20m%C3%BCller/00000.tar"]
)
def test_escapes_queries_and_redirects_of_a_url(make_shards, tmp_path, where):
    (path,) = make_shards([4])
    (tmp_path / "set of müller").mkdir()
    path.rename(tmp_path / "set of müller" / "00000.tar")
    with flaky(tmp_path) as (address, _):
        index = build_index([f"{address}/{where}"], tmp_path / "index")
        found = read_all(index, Cache(tmp_path / "cache", 10**9))
    assert found == contents(build_index([str(tmp_path / "set of müller" / "00000.tar")], tmp_path / "local"))


@pytest.mark.parametrize(
    "url, names", [("nothing://a/b.tar", "nothing"), ("http://127.0.0.1:1/a.tar", "nothing came for 1 s")]
)
def test_a_url_that_nothing_opens_is_one_line(tmp_path, url, names):
    with pytest.raises(UserError, match=names) as error:
        build_index([url], tmp_path / "index", timeout=1.0)
    assert "\n" not in str(error.value)
