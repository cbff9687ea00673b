"""Raw bytes of one sample, by its place in the shard: one pread, no neighbours touched."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING

from shards.errors import BadSample, ChangedShard
from shards.storage import remote
from shards.storage.cache import Cache
from shards.storage.captions import json_field
from shards.storage.protocols import StoredIndex

if TYPE_CHECKING:
    import numpy as np

OPEN_FILES = 64
OPEN_COPIES = 8  # of shards behind URLs: an open copy keeps its place in the cache


class Reader:
    """Reads members of an index's shards. Files are opened where they are read, so it can be sent to worker processes.

    Shards behind URLs are read whole, through `cache`; without one, each member by a
    request of its own, which is for who reads a few samples only.

    What is read is compared with the CRC-32 in the index. A shard that holds other bytes raises ChangedShard.
    """

    def __init__(self, index: StoredIndex, cache: Cache | None = None):
        self.index, self.cache = index, cache
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor

    def __getstate__(self) -> dict:
        return {"index": self.index, "cache": self.cache, "files": OrderedDict()}

    def image_bytes(self, shard: int, position: int) -> bytes:
        """The encoded picture. Raises BadSample."""
        table = self.index.table(shard)
        return self.read(shard, position, "picture", table.image_offset, table.image_size, table.image_crc)

    def text_bytes(self, shard: int, position: int) -> bytes:
        """The caption (or label). Raises BadSample."""
        table, text = self.index.table(shard), self.index.shards[shard].text
        data = self.read(shard, position, "caption", table.text_offset, table.text_size, table.text_crc)
        return json_field(data, text.partition(":")[2]) if text.startswith("json:") else data

    def read(
        self, shard: int, position: int, what: str, offset_N: np.ndarray, size_N: np.ndarray, crc_N: np.ndarray
    ) -> bytes:
        """The member at `position`, of which the arrays of the shard's table say the place and the checksum."""
        size = size_N.item(position)
        if size < 0:
            raise BadSample(f"no {what}")
        try:
            file = self.descriptor(shard)
            if file is None:
                data = remote.read_range(self.index.shards[shard].path, offset_N.item(position), size)
            else:
                data = os.pread(file, size, offset_N.item(position))
            if len(data) == size and zlib.crc32(data) == crc_N.item(position):
                return data
            wrong = f"the {what} of sample {position} is not the one that was indexed"
        except OSError as error:
            wrong = f"cannot be read ({error.strerror or error})"
        raise ChangedShard(
            f"shard {self.index.shards[shard].path}: {wrong}; "
            "bring the shard back, or index it again: `safeclip index SHARDS... --out NEW_FOLDER`"
        )

    def descriptor(self, shard: int) -> int | None:
        """File descriptor of a shard, None behind a URL without a cache; the least recently used is closed when too
        many are open."""
        if shard in self.files:
            self.files.move_to_end(shard)
            return self.files[shard]
        entry = self.index.shards[shard]
        if entry.remote and self.cache is None:
            return None
        self.files[shard] = self.cache.open(entry) if entry.remote else os.open(entry.path, os.O_RDONLY)
        while len(self.files) > (OPEN_COPIES if entry.remote else OPEN_FILES):
            os.close(self.files.popitem(last=False)[1])
        return self.files[shard]

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
