"""The shards of an index: DIR/index.json, and columns in a mapped file beside it (shards/storage/columns.py)."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.errors import UserError
from shards.storage import remote
from shards.storage.columns import Rows, open_columns, record_batch, select, to_numpy, write_named

VERSION = 4
COLUMNS = {"path": str, "size": int, "samples": int, "fingerprint": str, "table": str}
REMOTE = r"\Apipe:|://"  # remote.is_remote
PIPE = r"\Apipe:"


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
class Part:
    """Shards that have one folder of tables, and the same members as text and picture. batch: COLUMNS; file: that they
    are mapped from, if any."""

    batch: pa.RecordBatch
    tables: str
    text: str
    image: str
    file: Path | None = None

    def shard(self, path: str, size: int, samples: int, fingerprint: str, table: str) -> Shard:
        return Shard(path, size, samples, fingerprint, os.path.join(self.tables, table), self.text, self.image)

    def __reduce__(self) -> tuple:
        """A mapped file is sent to another process as its name."""
        about = (self.tables, self.text, self.image)
        return (opened, (self.file, len(self.batch), *about)) if self.file else (Part, (self.batch, *about))


def opened(file: Path, rows: int, tables: str, text: str, image: str) -> Part:
    """The shards in a file of columns. Raises UserError."""
    try:
        return Part(select(open_columns(file.parent, file.name, rows), COLUMNS), tables, text, image, file)
    except (OSError, ValueError) as error:
        raise UserError(f"index {file}: cannot be read ({error}); start again") from None


class ShardList(Rows[Shard]):
    """Shard i when it is asked for; what concerns all is computed from the columns."""

    def __init__(self, parts: Sequence[Part]):
        super().__init__([(part.batch, part.shard) for part in parts])
        self.parts = list(parts)

    def __reduce__(self) -> tuple:
        return ShardList, (self.parts,)

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "ShardList":
        """Of Shards in memory."""
        parts = []
        for (tables, text, image), some in groupby(
            shards, lambda shard: (os.path.dirname(shard.table), shard.text, shard.image)
        ):
            parts.append(Part(batch_of(list(some)), tables, text, image))
        return cls(parts or [Part(batch_of([]), "", "txt", "")])

    def numbers(self, name: str) -> np.ndarray:
        """int64 (S,): "size" or "samples"."""
        return to_numpy(self.column(name))

    def where(self, pattern: str) -> np.ndarray:
        """bool (S,): whether a pattern (RE2) is in the path."""
        return to_numpy(pc.match_substring_regex(self.column("path"), pattern))

    @cached_property
    def remote_S(self) -> np.ndarray:
        """bool (S,): whether a shard lies behind a URL."""
        return self.where(REMOTE)

    def refuse_pipe(self, allow_pipe: bool) -> None:
        """Raise UserError if one is a command, unless these may be run."""
        for number in np.flatnonzero(self.where(PIPE))[:1]:
            remote.refuse_pipe(self[number].path, allow_pipe)

    def fingerprint(self) -> str:
        """Of the content of all shards, in order, and of what are text and picture."""
        found = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            # The bytes say it all, but for a field of a .json or members that are named.
            suffix = (part.text if part.text not in ("txt", "cls") else "") + part.image
            for block in joined(part.batch["fingerprint"], suffix.encode()):
                found.update(block)
        return found.hexdigest()


def joined(column: pa.Array, suffix: bytes) -> Iterator[memoryview]:
    """The bytes of a column's strings, each with a suffix, one after the other."""
    if suffix:
        end, between = (pa.scalar(part, pa.large_binary()) for part in (suffix, b""))
        column = pc.binary_join_element_wise(column, end, between)
    _, starts, data = column.buffers()
    if data and len(column):
        first, last = np.frombuffer(starts, np.int64, len(column) + 1, 8 * column.offset)[[0, -1]]
        yield memoryview(data)[first:last]


def batch_of(shards: Sequence[Shard]) -> pa.RecordBatch:
    """COLUMNS of Shards; of a table its name."""
    columns = {name: [getattr(shard, name) for shard in shards] for name in COLUMNS}
    return record_batch(COLUMNS, {**columns, "table": list(map(os.path.basename, columns["table"]))})


def write_index(folder: Path, shards: Sequence[Shard], text: str, image: str) -> None:
    """Write the list of the shards, whose tables are in `folder`/tables already. text, image: of `build_index`."""
    about = {"version": VERSION, "text": text, "image": image, "shards": len(shards)}
    write_named(folder / "index.json", about, batch_of(shards))


def load_shards(folder: str | Path) -> ShardList:
    """The shards of the index in `folder`. Raises UserError when there is none, or it cannot be used."""
    path = Path(folder) / "index.json"
    here = path.absolute().parent
    try:
        found = json.loads(path.read_text())
        if found["version"] not in (3, VERSION):
            raise UserError(
                f"index {path}: version {found['version']}, expected {VERSION}; "
                f"make it again with `safeclip index SHARDS... --out {folder}`"
            )
        about = (str(here / "tables"), found["text"], found["image"])
        if found["version"] == 3:  # the shards are in the JSON
            columns = {name: [entry[name] for entry in found["shards"]] for name in COLUMNS}
            return ShardList([Part(record_batch(COLUMNS, columns), *about)])
        batch = select(open_columns(here, found["columns"], found["shards"]), COLUMNS)
        return ShardList([Part(batch, *about, here / found["columns"])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"index {path}: cannot be read ({error}); make it with `safeclip index SHARDS... --out {folder}`"
        ) from None
