"""Tars by hand, and what an index reads from its shards."""

import io
import tarfile

from shards.storage.reader import Reader


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(index):
    reader = Reader(index)
    return [
        (index.table(s).keys[p], reader.image_bytes(s, p), reader.texts(s, p)[0])
        for s in range(len(index.shards))
        for p in range(index.counts[s])
    ]
