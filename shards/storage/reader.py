"""Raw bytes of one sample, by its place in the shard: one pread, no neighbours touched."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections import OrderedDict

from shards.errors import BadSample, ChangedShard, Unreachable
from shards.storage import remote
from shards.storage.cache import Cache
from shards.storage.captions import sources
from shards.storage.files import patiently
from shards.storage.protocols import StoredIndex, StoredMembers

logger = logging.getLogger(__name__)

OPEN_FILES = 64
OPEN_COPIES = 8  # of shards behind URLs: an open copy keeps its place in the cache


class Reader:
    """Reads members of an index's shards. Files are opened where they are read, so it can be sent to worker processes.

    Shards behind URLs are read whole, through `cache`. Without one, and where not `whole`, each member is read by a
    request of its own, which is for who reads a few samples only; but a command gives its shard to the cache only.

    What is read is compared with the CRC-32 in the index. A shard that holds other bytes raises ChangedShard, one that
    cannot be read, also when it is opened anew and tried again, Unreachable.
    """

    def __init__(self, index: StoredIndex, cache: Cache | None = None, whole: bool = True):
        self.index, self.cache, self.whole = index, cache, whole
        self.files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor
        self.dropped: set[int] = set()  # shards of which a copy was damaged

    def __getstate__(self) -> dict:
        return {**vars(self), "files": OrderedDict()}

    def image_bytes(self, shard: int, position: int) -> bytes:
        """The encoded picture. Raises BadSample."""
        return self.read(shard, position, "picture", self.index.table(shard).image)

    def texts(self, shard: int, position: int) -> list[bytes]:
        """The captions (or the label). Raises BadSample where there is none."""
        found: list[bytes] = []
        wrong: list[BadSample] = []
        for source, members in zip(sources(self.index.shards[shard].text), self.index.table(shard).texts):
            try:
                found += source.texts(self.read(shard, position, "caption", members))
            except BadSample as error:
                wrong.append(error)
        if not found:
            raise wrong[0]
        return found

    def read(self, shard: int, position: int, what: str, members: StoredMembers) -> bytes:
        """The member at `position`."""
        size, offset = members.size.item(position), members.offset.item(position)
        if size < 0:
            raise BadSample(f"no {what}")
        entry = self.index.shards[shard]
        while True:
            try:
                data = patiently(lambda: self.bytes_at(shard, offset, size))
            except OSError as error:
                raise Unreachable(
                    f"shard {entry.path}: cannot be read ({error.strerror or error}); "
                    "bring it back, or mend its file system, and start again"
                ) from None
            if len(data) == size and zlib.crc32(data) == members.crc.item(position):
                return data
            if not self.drop_copy(shard):
                raise ChangedShard(
                    f"shard {entry.path}: the {what} of sample {position} is not the one that was indexed; "
                    "bring the shard back, or index it again: `safeclip index SHARDS... --out NEW_FOLDER`"
                )

    def drop_copy(self, shard: int) -> bool:
        """Whether a shard is read from a copy, which is then fetched anew: it was right when it was fetched."""
        entry = self.index.shards[shard]
        if not entry.remote or shard not in self.files or shard in self.dropped:
            return False
        logger.warning(f"shard {entry.path}: its copy in {self.cache.folder} is damaged; it is fetched again")
        self.dropped.add(shard)
        self.cache.drop(entry, self.files[shard])
        os.close(self.files.pop(shard))
        return True

    def bytes_at(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset` on, fewer at its end. After an OSError the next call opens it anew: a
        file server that was replaced knows no file of the one before."""
        file = self.descriptor(shard)
        if file is None:
            timeout = self.cache.timeout if self.cache else remote.TIMEOUT
            return remote.read_range(self.index.shards[shard].path, offset, size, timeout)
        try:
            data = os.pread(file, size, offset)
            while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more  # a network file system may give less than it was asked for
            return data
        except OSError:
            with contextlib.suppress(OSError):
                os.close(self.files.pop(shard))
            raise

    def descriptor(self, shard: int) -> int | None:
        """File descriptor of a shard, None where its members are requested; the least recently used is closed when too
        many are open."""
        if shard in self.files:
            self.files.move_to_end(shard)
            return self.files[shard]
        entry = self.index.shards[shard]
        command = entry.path.startswith("pipe:")
        if entry.remote and (self.cache is None or not (self.whole or command)):
            return None
        self.files[shard] = self.cache.open(entry) if entry.remote else os.open(entry.path, os.O_RDONLY)
        while len(self.files) > (OPEN_COPIES if entry.remote else OPEN_FILES):
            os.close(self.files.popitem(last=False)[1])
        return self.files[shard]

    def __del__(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
