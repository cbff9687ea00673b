"""What storage asks of the objects that it is handed; their classes stand below it, and it imports none of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np  # a tenth of a second, and nothing here computes

    from shards.storage.reader import Reader  # which imports this module


class Readable(Protocol):
    """A file that is read on."""

    def read(self, count: int, /) -> bytes: ...


class StoredShard(Protocol):
    """shards.index.shard_index.Shard."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def remote(self) -> bool: ...


class StoredMembers(Protocol):
    """shards.index.shard_index.Members."""

    @property
    def offset(self) -> np.ndarray: ...

    @property
    def size(self) -> np.ndarray: ...

    @property
    def crc(self) -> np.ndarray: ...


class StoredTable(Protocol):
    """shards.index.shard_index.ShardTable."""

    @property
    def image(self) -> StoredMembers: ...

    @property
    def texts(self) -> Sequence[StoredMembers]: ...


class StoredIndex(Protocol):
    """shards.index.shard_index.ShardIndex."""

    @property
    def shards(self) -> Sequence[StoredShard]: ...

    def table(self, shard: int, /) -> StoredTable: ...


class StoredSamples(Protocol):
    """shards.samples.samples.Samples."""

    @property
    def index(self) -> StoredIndex: ...

    @property
    def reader(self) -> Reader: ...


class StoredDataset(Protocol):
    """A data set of shards.views.loader: it has a number of items, and knows the shards that each reads."""

    @property
    def samples(self) -> StoredSamples: ...

    def __len__(self) -> int: ...

    def shards(self, item: int, /) -> Iterable[int]: ...
