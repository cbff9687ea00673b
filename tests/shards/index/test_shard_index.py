"""The index finds every sample, reads what webdataset reads, and notices every damage."""

import errno
import fcntl
import multiprocessing
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import BadSample, ChangedShard, Unreachable, UserError
from shards.index import build_index as build
from shards.index import shard_index, shard_list, verify
from shards.index.build_index import build_index, turn
from shards.index.shard_index import ShardIndex
from shards.shares import Share
from shards.storage.reader import Reader
from tests.helpers.pictures import picture
from tests.helpers.tars import contents, write_tar


def test_we_read_what_webdataset_wrote_and_webdataset_reads_what_we_wrote(make_shards, tmp_path):
    paths = make_shards([5, 0, 3])
    mine = contents(build_index([str(p) for p in paths], tmp_path / "index"))
    theirs = webdataset.WebDataset([str(p) for p in paths], shardshuffle=False, empty_check=False)
    assert mine == [(s["__key__"], s["png"], s["txt"]) for s in theirs]
    assert len(mine) == 8


def test_a_loaded_index_is_the_built_one(make_shards, tmp_path):
    built = build_index([str(p) for p in make_shards([4, 6])], tmp_path / "index")
    loaded = ShardIndex.load(tmp_path / "index")
    assert (
        loaded.shards == built.shards
        and loaded.fingerprint == built.fingerprint
        and contents(loaded) == contents(built)
    )
    assert loaded.offsets.tolist() == [0, 4, 10]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("key", ["plain", "folder/with.dot/name", "ключ/ü", "long/" + "x" * 180])
def test_names_of_any_kind(tmp_path, form, key):
    path = write_tar(
        tmp_path / "a.tar", [(f"{key}.jpg", b"picture"), (f"{key}.txt", b"text"), (f"{key}.json", b"{}")], form
    )
    assert contents(build_index([str(path)], tmp_path / "index")) == [(key, b"picture", b"text")]


def test_the_key_ends_at_the_first_dot_of_the_base_name(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.b/c.seg.png", b"no"), ("a.b/c.png", b"picture"), ("a.b/c.txt", b"text")])
    assert contents(build_index([str(path)], tmp_path / "index")) == [("a.b/c", b"picture", b"text")]


def test_a_sample_that_lacks_a_member_keeps_its_place(tmp_path):
    sound = [("d.png", b"4"), ("d.txt", b"a dog")]
    members = [("a.png", b"1"), ("b.txt", b"2"), ("c.png", b"3"), ("c.txt", b""), *sound]
    path = write_tar(tmp_path / "a.tar", members)
    index = build_index([str(path)], tmp_path / "index")
    assert index.samples == 4
    with pytest.raises(BadSample, match="no caption"):
        Reader(index).texts(0, 0)[0]
    with pytest.raises(BadSample, match="no picture"):
        Reader(index).image_bytes(0, 1)
    assert Reader(index).texts(0, 2)[0] == b""


def refused(paths, tmp_path, match):
    with pytest.raises(UserError, match=match) as error:
        build_index([str(p) for p in paths], tmp_path / "index")
    assert "\n" not in str(error.value) and not (tmp_path / "index" / "index.json").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_cut_goes_unnoticed(tmp_path_factory, data):
    """Wherever a tar is cut (at a member's end, in a header, in a file), it is an error that names the shard."""
    folder = tmp_path_factory.mktemp("cut")
    path = write_tar(folder / "a.tar", [(f"{i}.{e}", picture(i, 8)) for i in range(3) for e in ("png", "txt")])
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the archive's end block follows
    path.write_bytes(
        whole[: data.draw(st.one_of(st.integers(0, end), st.integers(0, end // 512).map(lambda n: 512 * n)))]
    )
    refused([path], folder, "a.tar.*cut short")


def test_a_corrupt_header_is_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"1"), ("a.txt", b"2")])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 0xFF
    path.write_bytes(data)
    refused([path], tmp_path, "a.tar: corrupt header")


def test_bad_input_is_named(tmp_path):
    twice = write_tar(tmp_path / "twice.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3")])
    refused([twice], tmp_path, "twice.tar: key 'a' comes twice")
    refused([write_tar(tmp_path / "two.tar", [("a.png", b"1"), ("a.jpg", b"2")])], tmp_path, "two image members")
    refused([tmp_path / "no.tar"], tmp_path, "no.tar: missing")
    refused([twice, twice], tmp_path, "named twice")
    refused([write_tar(tmp_path / "none.tar", [])], tmp_path, "none of 0 samples")
    refused([twice, tmp_path / "none.tar"], tmp_path, "twice.tar: key 'a' comes twice.*at byte 2560")
    with pytest.raises(UserError, match="--text: got 'TXT'"):
        build_index([str(twice)], tmp_path / "index", text="TXT")


def test_a_changed_shard_is_refused_by_name(make_shards, tmp_path):
    paths = make_shards([2, 2])
    index = build_index([str(p) for p in paths], tmp_path / "index")
    index.verify()
    paths[1].write_bytes(paths[1].read_bytes()[:-512])
    with pytest.raises(UserError, match=f"{paths[1]}.*indexed"):
        index.verify()
    paths[1].unlink()
    with pytest.raises(UserError, match=f"{paths[1]}: missing"):
        index.verify()


def test_no_shard_is_compared_after_a_stop(make_shards, tmp_path):
    paths = make_shards([1] * 40)
    index = build_index([str(p) for p in paths], tmp_path / "index")
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match="and 39 more such shards"):
        index.verify()
    asked = []
    with pytest.raises(UserError, match="missing") as stopped:
        index.verify(stop=lambda: asked.append(1) or len(asked) > 5)
    assert "39 more" not in str(stopped.value) and len(asked) == 40
    index.verify(stop=lambda: True)


def test_other_bytes_of_the_same_size_are_refused(make_shards, tmp_path):
    (path,) = make_shards([2])
    index = build_index([str(path)], tmp_path / "index")
    path.write_bytes(path.read_bytes().replace(b"caption 1", b"Caption 1"))
    for _ in range(2):
        with pytest.raises(UserError, match=f"{path}: holds other bytes than were indexed.*safeclip index"):
            index.verify()
    assert build_index([str(path)], tmp_path / "index").verify() is None


@pytest.mark.parametrize("writable", [True, False])
def test_a_shard_of_another_time_is_read_and_the_result_kept(make_shards, tmp_path, monkeypatch, writable):
    paths = make_shards([2, 1])
    index = build_index([str(path) for path in paths], tmp_path / "index")
    read, original = [], verify.fingerprint_of
    monkeypatch.setattr(verify, "fingerprint_of", lambda path, *rest: (read.append(path), original(path, *rest))[1])
    if not writable:
        monkeypatch.setattr(verify, "write_bytes", refuse)
    os.utime(paths[1], ns=(0, 0))
    index.verify()
    index.verify()
    assert read == [str(paths[1])] * (1 if writable else 2)
    paths[1].write_bytes(paths[0].read_bytes()[: paths[1].stat().st_size])
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(UserError, match="holds other bytes"):
        index.verify()


def refuse(*_):
    raise OSError(errno.EROFS, "Read-only file system")


@settings(max_examples=60)
@given(st.data())
def test_no_change_of_a_member_is_read(tmp_path_factory, data):
    """Whatever is written into a shard after it was indexed: a member is the one that was indexed, or refused."""
    folder = tmp_path_factory.mktemp("changed")
    members = [(f"{i}.{e}", bytes([65 + i]) * 700 if e == "png" else b"text %d" % i) for i in range(3) for e in KINDS]
    path = write_tar(folder / "a.tar", members)
    index, whole = build_index([str(path)], folder / "index"), bytearray(path.read_bytes())
    sound = contents(index)
    at = data.draw(st.integers(0, len(whole)))
    whole[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=700))
    path.write_bytes(whole)
    reader = Reader(index)
    for position, (_, image, text) in enumerate(sound):
        for read, expected in ((reader.image_bytes, image), (reader.texts, [text])):
            try:
                assert read(0, position) == expected
            except ChangedShard as error:
                assert str(path) in str(error) and "safeclip index" in str(error)


KINDS = ("png", "txt")


def test_a_shard_that_is_gone_while_it_is_read_is_named(make_shards, tmp_path):
    (path,) = make_shards([3])
    index = build_index([str(path)], tmp_path / "index")
    path.unlink()
    with pytest.raises(Unreachable, match=f"{path}: cannot be read"):
        Reader(index).image_bytes(0, 2)


def test_an_index_that_is_none_or_of_another_version_is_refused(make_shards, tmp_path):
    with pytest.raises(UserError, match="safeclip index"):
        ShardIndex.load(tmp_path)
    build_index([str(path) for path in make_shards([1])], tmp_path / "index")
    file = tmp_path / "index" / "index.json"
    file.write_text(file.read_text().replace(f'"version": {shard_list.VERSION}', '"version": 2'))
    with pytest.raises(UserError, match="version 2, expected .*safeclip index"):
        ShardIndex.load(tmp_path / "index")


def test_braces_are_expanded(make_shards, tmp_path):
    make_shards([2, 3, 1])
    index = build_index([f"{tmp_path}/tars/{{0..2}}/00000.tar"], tmp_path / "index")
    assert index.counts.tolist() == [2, 3, 1]


def test_files_of_the_user_beside_the_tables_stay(make_shards, tmp_path):
    mine = tmp_path / "index" / "tables" / "mydata.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    os.utime(mine, (0, 0))
    build_index([str(path) for path in make_shards([1])], tmp_path / "index")
    assert mine.read_bytes() == b"mine"
    with pytest.raises(UserError, match="^--out: got an empty path"):
        build_index([str(tmp_path / "tars/0/00000.tar")], "")


def test_tables_of_the_old_index_stay_for_who_has_it_open(make_shards, tmp_path):
    paths = [str(path) for path in make_shards([1, 2])]
    old = build_index(paths, tmp_path / "index")
    for shard in old.shards:
        os.utime(shard.table, (0, 0))
    build_index(paths[:1], tmp_path / "index")
    assert len(contents(old)) == 3
    os.utime(old.shards[1].table, (0, 0))
    build_index(paths[:1], tmp_path / "index")
    assert [os.path.exists(shard.table) for shard in old.shards] == [True, False]


def test_processes_that_index_into_one_folder_wait_for_each_other(make_shards, tmp_path):
    paths = [str(path) for path in make_shards([1, 2])]
    build_index(paths[:1], tmp_path / "index")
    context = multiprocessing.get_context("fork")
    with turn(tmp_path / "index"):
        other = context.Process(target=build_index, args=(paths, tmp_path / "index"), kwargs={"workers": 1})
        other.start()
        other.join(1)
        assert other.is_alive() and ShardIndex.load(tmp_path / "index").samples == 1
    other.join(60)
    assert other.exitcode == 0 and ShardIndex.load(tmp_path / "index").samples == 3
    assert not (tmp_path / "index" / ".lock").exists()


@pytest.mark.parametrize("damage", ["gone", "truncated", "short"])
def test_a_table_that_cannot_be_used_is_named(make_shards, tmp_path, damage):
    built = build_index([str(path) for path in make_shards([3])], tmp_path / "index")
    table = Path(built.shards[0].table)
    if damage == "gone":
        table.unlink()
    elif damage == "truncated":
        table.write_bytes(table.read_bytes()[:-40])
    else:
        pq.write_table(pq.read_table(table).slice(0, 2), table)
    index = ShardIndex.load(tmp_path / "index")
    shard_index.read_table.cache_clear()
    for use in (index.verify, lambda: index.table(0)):
        with pytest.raises(UserError, match=f"index table {table}: .*`safeclip index") as error:
            use()
        assert "\n" not in str(error.value)
    assert len(contents(build_index([shard.path for shard in index.shards], tmp_path / "index"))) == 3


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/null", path)])
def test_what_is_no_regular_file_is_refused(tmp_path, make):
    make(tmp_path / "a.tar")
    refused([tmp_path / "a.tar"], tmp_path, "a.tar: no regular file")


def test_few_shards_wait_at_a_time(monkeypatch):
    """All at once would take a gigabyte for half a million shards, and minutes before the first is read."""
    waiting, urls = [], [str(number) for number in range(300)]

    class Pool(ThreadPoolExecutor):
        def submit(self, *job):
            waiting.append(self._work_queue.qsize())
            return super().submit(*job)

    def scan(url):
        time.sleep(0.001)
        return {"path": url}, []

    monkeypatch.setattr(build, "ThreadPoolExecutor", Pool)
    assert [entry["path"] for entry, _ in build.scan_all(scan, urls, Share(), 1)] == urls
    assert len(waiting) == 300 and max(waiting) < 10


def test_a_disk_without_locks_takes_one_job_at_a_time(make_shards, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", fail)
    index = build_index([str(path) for path in make_shards([2, 3])], tmp_path / "index", workers=1)
    assert len(contents(index)) == 5 and "has no locks (Function not implemented)" in caplog.text
