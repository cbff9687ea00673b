"""Shards that the coming batches need are fetched while the batches before them are used."""

import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

from shards.storage.cache import Cache
from shards.storage.protocols import StoredDataset, StoredShard

Item = TypeVar("Item")

THREADS = 4  # that fetch at the same time, in each rank


def fetched_ahead(reading: Iterator[Item], dataset: StoredDataset, start: int = 0) -> Iterator[Item]:
    """`reading`, the items of `dataset` from `start` on, with FetchAhead where whole shards are read through a
    cache."""
    reader = dataset.samples.reader
    return FetchAhead(reading, dataset, start, reader.cache) if reader.cache and reader.whole else reading


class FetchAhead(Generic[Item]):
    """Iterates over `reading` (one item after another from number `start` on) while threads fetch what comes next into
    a cache.

    dataset.shards(i) says which shards item i reads; at most cache.ahead bytes, or the shards of one item, are fetched
    ahead. An error of a fetch is raised here.
    """

    def __init__(self, reading: Iterator[Item], dataset: StoredDataset, start: int, cache: Cache):
        self.reading, self.dataset, self.cache, self.index = reading, dataset, cache, dataset.samples.index
        self.item, self.stopped = start, False
        self.error: Exception | None = None
        self.ahead: dict[int, int] = {}  # number of an item that was not used yet -> bytes that were fetched for it
        self.change = threading.Condition()
        self.todo = self.coming(start)
        self.head = next(self.todo, None)
        for _ in range(THREADS):
            threading.Thread(target=self.work, daemon=True).start()

    def coming(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield (item, shard number): shards behind URLs, where an item needs them that the one before it did not."""
        before: set[int] = set()
        for item in range(start, len(self.dataset)):
            now = {shard for shard in self.dataset.shards(item) if self.index.shards[shard].remote}
            yield from ((item, shard) for shard in sorted(now - before))
            before = now

    def work(self) -> None:
        try:
            while (shard := self.take()) is not None:
                self.cache.prefetch(shard)
        except Exception as error:
            self.error = error

    def take(self) -> StoredShard | None:
        """The next shard to fetch, as soon as there may be more ahead; None at the end."""
        with self.change:
            while self.head and not self.stopped and not self.may_go_on():
                self.change.wait()
            if not self.head or self.stopped:
                return None
            (item, number), self.head = self.head, next(self.todo, None)
            shard = self.index.shards[number]
            self.ahead[item] = self.ahead.get(item, 0) + shard.size
            return shard

    def may_go_on(self) -> bool:
        item, number = self.head
        return item <= self.item or sum(self.ahead.values()) + self.index.shards[number].size <= self.cache.ahead

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self.error:
            raise self.error
        try:
            batch = next(self.reading)
        except BaseException:
            self.stop()
            raise
        with self.change:
            self.ahead.pop(self.item, None)
            self.item += 1
            self.change.notify_all()
        return batch

    def stop(self) -> None:
        with self.change:
            self.stopped = True
            self.change.notify_all()
