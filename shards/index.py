"""The index: what each shard holds, and where, so that any sample can be read without its neighbours.

A sample IS (shard, position in shard); its row over all shards is offsets[shard] + position. On disk: DIR/tables/00000.parquet
for each shard (key, and byte offset and size of picture and text), and DIR/index.json, written last.
"""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand

from shards import tar
from shards.errors import UserError
from shards.storage import write_bytes, write_json

VERSION = 1
PICTURES = ("jpg", "jpeg", "png", "webp")
MISSING = -1  # size of a member that the sample does not have


@dataclass(frozen=True)
class Shard:
    """One tar: absolute path, bytes, samples, and the BLAKE2b-128 of its content in hex."""

    path: str
    size: int
    samples: int
    fingerprint: str


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard, in order: names, and int64 (N,) byte offsets and sizes (MISSING = has none)."""

    keys: list
    image_offset: np.ndarray
    image_size: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray


class ShardIndex:
    """Loaded index. shards: list of Shard; counts: int64 (S,); offsets: int64 (S + 1,); samples: int; fingerprint: str."""

    def __init__(self, folder, text, shards):
        self.folder, self.text, self.shards = Path(folder), text, shards
        self.counts = np.array([shard.samples for shard in shards], np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.offsets[-1])
        self.fingerprint = hashlib.blake2b("".join(s.fingerprint for s in shards).encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, folder):
        """The index in `folder`. Raises UserError when there is none, or it cannot be used."""
        path = Path(folder) / "index.json"
        try:
            found = json.loads(path.read_text())
            if found["version"] != VERSION:
                raise UserError(f"index {path}: version {found['version']}, expected {VERSION}; index the shards again")
            return cls(folder, found["text"], [Shard(**shard) for shard in found["shards"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"index {path}: cannot be read ({error}); make it with `safeclip index SHARDS... --out {folder}`"
            ) from None

    def place(self, row):
        """(shard, position) of rows over all shards: int64, of the shape of `row`."""
        shard = np.searchsorted(self.offsets, row, "right") - 1
        return shard, row - self.offsets[shard]

    def table(self, shard):
        """ShardTable of shard number `shard`; the last few are kept in memory."""
        return read_table(self.folder, shard)

    def verify(self):
        """Raise UserError if a shard is missing or is not the size that was indexed."""
        wrong = []
        for shard in self.shards:
            path = Path(shard.path)
            if not path.exists():
                wrong.append(f"shard {path}: missing")
            elif path.stat().st_size != shard.size:
                wrong.append(f"shard {path}: {path.stat().st_size} bytes, but {shard.size} were indexed")
        if wrong:
            more = f" (and {len(wrong) - 1} more such shards)" if len(wrong) > 1 else ""
            raise UserError(f"{wrong[0]}{more}; bring it back, or index the shards again")


@lru_cache(maxsize=64)
def read_table(folder, shard):
    columns = pq.read_table(folder / "tables" / f"{shard:05d}.parquet")
    return ShardTable(
        columns["key"].to_pylist(),
        *(columns[name].to_numpy() for name in ("image_offset", "image_size", "text_offset", "text_size")),
    )


def build_index(paths, out, text="txt", workers=None):
    """Index local tars (`paths`: list of str, brace-expanded) into the folder `out`; returns the ShardIndex.

    `text` is the extension of the member that is a sample's text ("txt" for captions, "cls" for labels). One pass over each
    shard, shards in parallel. A sample without picture or text keeps its position. Raises UserError naming the shard.
    """
    expanded = [path for pattern in paths for path in braceexpand(str(pattern))]
    for path in expanded:
        if path.startswith("pipe:") or "://" in path:
            raise UserError(f"shard {path}: only local paths can be indexed; copy or mount the shards first")
    absolute = [str(Path(path).absolute()) for path in expanded]
    twice = next((path for i, path in enumerate(absolute) if path in set(absolute[:i])), None)
    if twice:
        raise UserError(f"shard {twice}: named twice; name each shard once")
    missing = next((path for path in absolute if not Path(path).is_file()), None)
    if missing:
        raise UserError(f"shard {missing}: missing; check the path (braces are expanded, wildcards are your shell's)")
    out = Path(out)
    jobs = [(path, text, str(out / "tables" / f"{number:05d}.parquet")) for number, path in enumerate(absolute)]
    if len(jobs) == 1:
        shards = [index_shard(*jobs[0])]
    else:
        with ProcessPoolExecutor(workers) as pool:
            shards = list(pool.map(index_shard, *zip(*jobs))) if jobs else []
    if not sum(shard.samples for shard in shards):
        raise UserError(
            f"shards {' '.join(map(str, paths))}: no samples in them; expected members KEY.jpg (or jpeg, png, webp) and KEY.{text}"
        )
    write_json(out / "index.json", {"version": VERSION, "text": text, "shards": [asdict(shard) for shard in shards]})
    return ShardIndex(out, text, shards)


def index_shard(path, text, table_path):
    """Read one tar, write its table, return its Shard. Raises UserError."""
    size, digest = Path(path).stat().st_size, hashlib.blake2b(digest_size=16)
    rows, done, key_now = [], set(), None
    with open(path, "rb") as file:

        def read(count):
            data = file.read(count)
            digest.update(data)
            return data

        for name, offset, length in tar.members(path, size, read):
            key, extension = tar.sample_of(name)
            if key is None:
                continue
            if key != key_now:
                if key in done:
                    raise UserError(
                        f"shard {path}: key {key!r} comes twice, at byte {offset} again; rename one of the samples"
                    )
                done.add(key)
                rows.append(
                    {"key": key, "image_offset": 0, "image_size": MISSING, "text_offset": 0, "text_size": MISSING}
                )
                key_now = key
            kind = "image" if extension in PICTURES else "text" if extension == text else None
            if kind:
                if rows[-1][f"{kind}_size"] != MISSING:
                    raise UserError(
                        f"shard {path}: sample {key!r} has two {kind} members, at byte {offset} again; expected one"
                    )
                rows[-1][f"{kind}_offset"], rows[-1][f"{kind}_size"] = offset, length
    fields = [("key", pa.string())] + [
        (f"{kind}_{part}", pa.int64()) for kind in ("image", "text") for part in ("offset", "size")
    ]
    for row in rows:
        row["key"] = row["key"].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), sink)
    write_bytes(table_path, sink.getvalue().to_pybytes())
    return Shard(path, size, len(rows), digest.hexdigest())
