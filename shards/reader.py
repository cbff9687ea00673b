"""Raw bytes of one sample, by its place in the shard: one pread, no neighbours touched."""

import os
from collections import OrderedDict

from shards.errors import BadSample

OPEN_FILES = 64


class Reader:
    """Reads members of an index's shards. Files are opened where they are read, so it can be sent to worker processes."""

    def __init__(self, index):
        self.index, self.files = index, OrderedDict()

    def __getstate__(self):
        return {"index": self.index, "files": OrderedDict()}

    def image_bytes(self, shard, position):
        """bytes of the encoded picture. Raises BadSample."""
        table = self.index.table(shard)
        return self.read(shard, table.image_offset[position], table.image_size[position], "picture")

    def text_bytes(self, shard, position):
        """bytes of the caption (or label). Raises BadSample."""
        table = self.index.table(shard)
        return self.read(shard, table.text_offset[position], table.text_size[position], "caption")

    def read(self, shard, offset, size, what):
        if size < 0:
            raise BadSample(f"no {what}")
        data = os.pread(self.descriptor(shard), int(size), int(offset))
        if len(data) != size:
            raise BadSample(f"{what}: the shard is shorter than its index says")
        return data

    def descriptor(self, shard):
        """File descriptor of a shard; the least recently used is closed when too many are open."""
        if shard in self.files:
            self.files.move_to_end(shard)
        else:
            self.files[shard] = os.open(self.index.shards[shard].path, os.O_RDONLY)
            if len(self.files) > OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
        return self.files[shard]

    def __del__(self):
        for descriptor in self.files.values():
            os.close(descriptor)
