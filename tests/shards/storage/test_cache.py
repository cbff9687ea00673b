"""A folder that processes share: every byte right, never above its limit, one fetch for all, and nothing half after
kill -9."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shards.errors import Unreachable, UserError
from shards.index.build_index import build_index
from shards.storage.cache import Cache
from shards.storage.prefetch import FetchAhead
from tests.helpers.servers import flaky

processes = multiprocessing.get_context("fork")


@pytest.fixture
def shards(make_shards, tmp_path):
    """Function: address of a server of tmp_path -> eight shards, as the index has them, behind it."""
    index = build_index([str(path) for path in make_shards([3] * 8)], tmp_path / "index", workers=1)

    def behind(address):
        return [replace(shard, path=f"{address}{shard.path.removeprefix(str(tmp_path))}") for shard in index.shards]

    return behind


def check(descriptor, shard):
    data = os.pread(descriptor, shard.size + 1, 0)
    assert hashlib.blake2b(data, digest_size=16).hexdigest() == shard.fingerprint
    os.close(descriptor)


def occupied(folder):
    """(bytes of shards and parts in a cache's folder, names of them)."""
    sizes = {}
    for entry in os.scandir(folder):
        try:
            sizes[entry.name] = entry.stat().st_size
        except FileNotFoundError:
            pass
    return sum(sizes.values()), sizes.keys() - {"lock"}


def read_many(cache, shards, seed, results):
    rng = random.Random(seed)
    for _ in range(40):
        shard = rng.choice(shards)
        check(cache.open(shard), shard)
    results.put(seed)


def test_many_processes_and_little_room(shards, tmp_path):
    with flaky(tmp_path, 0.1, seconds=0.05) as (address, log):
        there, results = shards(address), processes.Queue()
        limit = 6 * there[0].size  # four of them are in use at most
        cache = Cache(tmp_path / "cache", limit)
        workers = [processes.Process(target=read_many, args=(cache, there, seed, results)) for seed in range(4)]
        for worker in workers:
            worker.start()
        peak = 0
        while any(worker.is_alive() for worker in workers):
            peak = max(peak, occupied(cache.folder)[0])
            time.sleep(0.005)
        assert sorted(results.get(timeout=5) for _ in workers) == [0, 1, 2, 3]
    assert 0 < peak <= limit and all(name.endswith(".tar") for name in occupied(cache.folder)[1])


def open_one(cache, shard, results):
    started = time.monotonic()
    try:
        check(cache.open(shard), shard)
        results.put("read")
    except Unreachable:
        results.put(time.monotonic() - started)


def test_processes_share_one_fetch(shards, tmp_path):
    with flaky(tmp_path) as (address, log):
        shard, results, cache = shards(address)[0], processes.Queue(), Cache(tmp_path / "cache", 10**9)
        for _ in range(5):
            processes.Process(target=open_one, args=(cache, shard, results)).start()
        assert [results.get(timeout=30) for _ in range(5)] == ["read"] * 5
        assert [method for method, *_ in log].count("GET") == 1


def test_a_lost_server_keeps_nobody_waiting_longer_than_the_first(shards, tmp_path):
    with flaky(tmp_path, 1.0, kinds=["503"]) as (address, log):
        shard, results, cache = shards(address)[0], processes.Queue(), Cache(tmp_path / "cache", 10**9, timeout=2.0)
        for _ in range(4):
            processes.Process(target=open_one, args=(cache, shard, results)).start()
        assert max(results.get(timeout=30) for _ in range(4)) < 2 * 2.0
    assert not occupied(cache.folder)[1]


def test_nothing_half_is_seen_after_a_kill(shards, tmp_path, monkeypatch):
    with flaky(tmp_path, 1.0, kinds=["death", "hang"]) as (address, log):
        shard, cache = shards(address)[0], Cache(tmp_path / "cache", 10**9)
        worker = processes.Process(target=open_one, args=(cache, shard, None))
        worker.start()
        while not [fault for *_, fault in log if fault == "hang"]:  # some bytes have come
            time.sleep(0.01)
        assert occupied(cache.folder)[1] == {f"{shard.fingerprint}.part"}
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with flaky(tmp_path) as (address, log):
        first, second, *_ = shards(address)
        cache.limit = second.size  # what the dead left behind does not count
        check(cache.open(second), second)
        assert occupied(cache.folder) == (second.size, {f"{second.fingerprint}.tar"})
        check(cache.open(first), first)
        assert occupied(cache.folder) == (first.size, {f"{first.fingerprint}.tar"})


def test_the_least_recently_used_goes_first_and_what_is_open_stays(shards, tmp_path):
    with flaky(tmp_path) as (address, log):
        a, b, c, d, *_ = shards(address)
        cache = Cache(tmp_path / "cache", 3 * a.size)
        names = lambda: {name.removesuffix(".tar") for name in occupied(cache.folder)[1]}  # noqa: E731
        held = cache.open(a)
        for shard in (b, c, b, d):
            check(cache.open(shard), shard)
            time.sleep(0.01)
        assert names() == {a.fingerprint, b.fingerprint, d.fingerprint}  # a is the oldest, and open
        others = [cache.open(b), cache.open(d)]
        assert cache.open(c, over_limit=False) is None and len(names()) == 3
        check(cache.open(c), c)  # who needs it now gets it
        for descriptor in (held, *others):
            os.close(descriptor)
        check(cache.open(a), a)
        cache.prefetch(shards(address)[5])
        assert len(names()) == 3


def test_a_folder_that_is_no_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="data.cache: .*/file"):
        Cache(tmp_path / "file", 1)


def test_a_disk_without_locks_is_named_at_the_start(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(
        UserError, match="data.cache: .*/cache cannot be used [(]Function not implemented[)]; name another"
    ):
        Cache(tmp_path / "cache", 1)


def test_a_disk_that_locks_as_nfs_does(shards, tmp_path, monkeypatch):
    """By flock(2) a lock for one alone needs a file that is open for writing."""
    flock = fcntl.flock

    def as_nfs(file, kind):
        number = file if isinstance(file, int) else file.fileno()
        if kind & fcntl.LOCK_EX and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, kind)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with flaky(tmp_path) as (address, log):
        there = shards(address)
        cache = Cache(tmp_path / "cache", 2 * there[0].size)
        for shard in there:
            check(cache.open(shard), shard)
    assert 0 < occupied(cache.folder)[0] <= cache.limit


def test_a_lock_that_somebody_has_tidied_away_is_made_anew(shards, tmp_path):
    with flaky(tmp_path) as (address, log):
        there, cache = shards(address), Cache(tmp_path / "cache", 10**9)
        for shard in there[:2]:
            (cache.folder / "lock").unlink()
            check(cache.open(shard), shard)


def open_on_a_full_disk(cache, shard, results):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        cache.open(shard)
    except UserError as error:
        results.put(str(error))


def test_a_disk_that_takes_no_more_is_named(shards, tmp_path):
    with flaky(tmp_path) as (address, log):
        results, cache = processes.Queue(), Cache(tmp_path / "cache", 10**9)
        processes.Process(target=open_on_a_full_disk, args=(cache, shards(address)[0], results)).start()
        assert "lower data.cache_gb" in results.get(timeout=30)
    assert not occupied(cache.folder)[1]


class Order:
    """A data set of which item i reads the shards order[i]."""

    def __init__(self, order, shards, cache):
        self.order = order
        self.samples = SimpleNamespace(index=SimpleNamespace(shards=shards), reader=SimpleNamespace(cache=cache))

    def __len__(self):
        return len(self.order)

    def shards(self, item):
        return self.order[item]


def test_what_comes_next_is_fetched_before_it_is_asked_for_and_not_much_more(shards, tmp_path):
    with flaky(tmp_path) as (address, log):
        there = shards(address)
        cache = Cache(tmp_path / "cache", 12 * there[0].size)  # of which 3 may be fetched ahead
        dataset = Order([[0], [0, 1], [1, 2], [3], [4], [5], [6]], there, cache)
        reading = FetchAhead(iter(range(2, 7)), dataset, 2, cache)  # from item 2 on

        def fetched():
            time.sleep(0.5)
            return {
                number for number, shard in enumerate(there) if (cache.folder / f"{shard.fingerprint}.tar").exists()
            }

        assert fetched() == {1, 2, 3}
        assert next(reading) == 2
        assert fetched() == {1, 2, 3, 4, 5}
        assert list(reading) == [3, 4, 5, 6]


def test_an_error_of_a_fetch_ahead_is_raised(shards, tmp_path):
    with flaky(tmp_path, 1.0, kinds=["503"]) as (address, log):
        cache = Cache(tmp_path / "cache", 10**9, timeout=0.5)
        reading = FetchAhead(iter([0, 1]), Order([[0], [1]], shards(address), cache), 0, cache)
        time.sleep(1.5)
        with pytest.raises(Unreachable, match="nothing came for 0.5 s"):
            next(reading)
