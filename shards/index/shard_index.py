"""The index: what each shard holds, and where, so that any sample can be read without its neighbours.

A sample IS (shard, position in shard); its row over all shards is offsets[shard] + position. On disk:
DIR/tables/*.parquet, one for each shard (key, and byte offset, size and CRC-32 of picture and text;
shards/index/scan.py), and DIR/index.json, written last.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ChangedShard, UserError
from shards.index.scan import MEMBER, Finding, fingerprint_of, saved, table_name
from shards.storage import remote
from shards.storage.files import write_bytes, write_json

VERSION = 3
REMOTE_TRIED = 32  # shards behind URLs of which `verify` asks the size
TABLES_TRIED = 1_000  # tables that `verify` opens
THREADS = 32  # of `verify`, which waits for the disk or the network


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar: absolute path or URL, bytes, samples, BLAKE2b-128 of its content in hex, its table's file, and what are
    its text and picture."""

    path: str
    size: int
    samples: int
    fingerprint: str
    table: str
    text: str = "txt"
    image: str = ""

    @property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return remote.is_remote(self.path)


@dataclass(frozen=True)
class Members:
    """A member of each sample of a shard: int64 (N,) byte offsets and sizes (MISSING = has none), and uint32 (N,)
    CRC-32 of the content."""

    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard, in order: names, pictures, and for each source of `--text` its texts."""

    keys: list[str]
    image: Members
    texts: tuple[Members, ...]


class ShardIndex:
    """Loaded index. counts: int64 (S,); offsets: int64 (S + 1,).

    repetitions: int64 (S,), how often each sample of the shard is seen in an epoch; views: samples of an epoch,
    repetitions counted. findings: where the index was just built.
    """

    findings: Sequence[Finding] = ()

    def __init__(self, shards: list[Shard], repetitions: Sequence[int] | None = None):
        self.shards = shards
        self.counts = np.array([shard.samples for shard in shards], np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])
        self.samples = int(self.offsets[-1])
        self.repetitions = np.ones(len(shards), np.int64) if repetitions is None else np.asarray(repetitions, np.int64)
        self.views = int((self.counts * self.repetitions).sum())
        # The bytes say it all, but for a field of a .json or members that are named.
        names = (s.fingerprint + (s.text if s.text not in ("txt", "cls") else "") + s.image for s in shards)
        self.fingerprint = hashlib.blake2b("".join(names).encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """The index in `folder`. Raises UserError when there is none, or it cannot be used."""
        path = Path(folder) / "index.json"
        try:
            found = json.loads(path.read_text())
            if found["version"] != VERSION:
                raise UserError(
                    f"index {path}: version {found['version']}, expected {VERSION}; "
                    f"make it again with `safeclip index SHARDS... --out {folder}`"
                )
            tables = path.absolute().parent / "tables"
            shards = [Shard(**{**entry, "table": str(tables / entry["table"])}) for entry in found["shards"]]
            return cls([replace(shard, text=found["text"], image=found["image"]) for shard in shards])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"index {path}: cannot be read ({error}); make it with `safeclip index SHARDS... --out {folder}`"
            ) from None

    def place(self, row: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, position) of rows over all shards: int64, of the shape of `row`."""
        shard = np.searchsorted(self.offsets, row, "right") - 1
        return shard, row - self.offsets[shard]

    @classmethod
    def merged(cls, sources: Mapping[str, tuple[str | Path, int]]) -> "ShardIndex":
        """One index of several: `sources` is {name: (folder, repetitions)}, in order. Raises UserError where two name
        the same shard."""
        shards: list[Shard] = []
        repetitions: list[int] = []
        owner: dict[str, str] = {}
        for name, (folder, times) in sources.items():
            for shard in cls.load(folder).shards:
                if shard.path in owner:
                    raise UserError(
                        f"data.sources.{name}: shard {shard.path} is in source {owner[shard.path]} too; "
                        "name each shard once, and give its source a weight"
                    )
                owner[shard.path] = name
                shards.append(shard)
                repetitions.append(times)
        return cls(shards, repetitions)

    def table(self, shard: int) -> ShardTable:
        """ShardTable of shard number `shard`; the last few are kept in memory. Raises ChangedShard where it cannot be
        read."""
        return read_table(self.shards[shard].table, self.shards[shard].samples)

    def verify(self, timeout: float = remote.TIMEOUT) -> None:
        """Raise UserError if a table is missing, or a shard is missing or does not hold what was indexed.

        Of the tables some are opened, from all over the index; any that is damaged is told when it is read. Size and
        time of change of local shards are compared. Where only the time differs the shard is read, and its fingerprint
        decides; the result is kept beside the index if that can be written. Of shards behind URLs the sizes of some are
        compared, from all over the index.
        """
        local = [shard for shard in self.shards if not shard.remote]
        far = [shard for shard in self.shards if shard.remote and not shard.path.startswith("pipe:")]
        tried = far[:: -(-len(far) // REMOTE_TRIED) or 1]
        check_names(shard.table for shard in self.shards)
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(check_table, self.shards[:: -(-len(self.shards) // TABLES_TRIED) or 1]):
                pass
            found = list(pool.map(difference, local + tried, repeat(timeout)))
        wrong = [f"shard {shard.path}: {what}" for shard, what in zip(local + tried, found) if what]
        if wrong:
            more = f" (and {len(wrong) - 1} more such shards)" if len(wrong) > 1 else ""
            raise UserError(
                f"{wrong[0]}{more}; bring it back, or index the shards again: `safeclip index SHARDS... --out INDEX`"
            )


def write_index(folder: Path, shards: Sequence[Shard], text: str, image: str) -> None:
    """Write the list of the shards, whose tables are in `folder`/tables already. text, image: of `build_index`."""
    entries = [{key: value for key, value in asdict(shard).items() if key not in ("text", "image")} for shard in shards]
    write_json(folder / "index.json", {"version": VERSION, "text": text, "image": image, "shards": entries})


def difference(shard: Shard, timeout: float) -> str | None:
    """How a shard differs from what was indexed; None where it does not."""
    if shard.remote:
        size, _ = remote.about(shard.path, timeout)
        return None if size == shard.size else f"{size} bytes, but {shard.size} were indexed"
    try:
        found = os.stat(shard.path)
        if found.st_size != shard.size:
            return f"{found.st_size} bytes, but {shard.size} were indexed"
        # The name of a shard's table is made from its time of change, among others.
        table = Path(shard.table)
        same = table.with_name(table_name(shard.path, shard.size, found.st_mtime_ns, shard.text, shard.image))
        if same == table:
            return None
        known = saved(same)
        if (
            known["shard"]["fingerprint"] if known else fingerprint_of(shard.path, shard.size, timeout)
        ) != shard.fingerprint:
            return "holds other bytes than were indexed"
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    if not known:
        with contextlib.suppress(OSError):  # a folder that cannot be written: the shard is read again next time
            write_bytes(same, table.read_bytes())
    return None


@contextlib.contextmanager
def named_table(path: str) -> Iterator[None]:
    """What goes wrong in the block is said of the table at `path`. Raises ChangedShard."""
    try:
        yield
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            why = os.strerror(error.errno)
        else:
            why = str(error).partition("\n")[0] or "damaged"
        raise ChangedShard(
            f"index table {path}: cannot be read ({why}); make it again with `safeclip index SHARDS... --out INDEX`"
        ) from None


def check_rows(found: int, expected: int) -> None:
    """Raises ValueError."""
    if found != expected:
        raise ValueError(f"{found} samples, but the index has {expected}")


def check_names(paths: Iterable[str]) -> None:
    """Raise ChangedShard if a file is missing; each folder is listed once."""
    there: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in there:
            there[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in there[folder]:
            with named_table(path):
                raise FileNotFoundError(errno.ENOENT, "missing")


def check_table(shard: Shard) -> None:
    """Read the end of a shard's table, which says how long it is. Raises ChangedShard."""
    with named_table(shard.table):
        check_rows(pq.read_metadata(shard.table).num_rows, shard.samples)


@lru_cache(maxsize=64)
def read_table(path: str, samples: int) -> ShardTable:
    """The table at `path`, of so many samples. Raises ChangedShard."""
    with named_table(path):
        columns = pq.read_table(path)
        check_rows(len(columns), samples)
        kinds = [name.removesuffix("_size") for name in columns.column_names if name.endswith("_size")]
        image, *texts = (Members(*(columns[f"{kind}_{part}"].to_numpy() for part in MEMBER)) for kind in kinds)
        return ShardTable(columns["key"].to_pylist(), image, tuple(texts))
