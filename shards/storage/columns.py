"""Columns of shards in a file that is mapped, so that a host holds it once, however many processes open it.

FOLDER/shards_DIGEST.arrow is an Arrow IPC file, uncompressed, of one record batch. DIGEST is the BLAKE2b-128 of its
content: a small JSON file beside it names it and is written after it, so the two always fit. Strings are bytes, for a
path on disk may be no UTF-8.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from shards.storage.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa  # which takes a while to load

NAME = re.compile(r"shards_([0-9a-f]{32})\.arrow")
KEPT = 24 * 60 * 60  # seconds that a file stays which is named no more: who has opened it may send it to a new process
BLOCK = 1 << 20  # bytes hashed at a time
PIECE = 8192  # rows that are Python objects at a time
RECENT = 256  # rows that stay Python objects

Item = TypeVar("Item")


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def record_batch(kinds: Mapping[str, type], columns: Mapping[str, Iterable]) -> pa.RecordBatch:
    """Columns of `kinds`, {name: int or str}. Raises ValueError, TypeError, KeyError."""
    import pyarrow as pa

    made = []
    for name, kind in kinds.items():
        values = columns[name]
        if isinstance(values, pa.Array):
            made.append(values)
        elif kind is str:
            made.append(pa.array([to_bytes(text) for text in values], pa.large_binary()))
        else:
            try:
                made.append(pa.array(values, pa.int64()))
            except OverflowError as error:
                raise ValueError(str(error)) from None
    return select(pa.record_batch(made, list(kinds)), kinds)


def select(batch: pa.RecordBatch, kinds: Mapping[str, type]) -> pa.RecordBatch:
    """The columns of `kinds`. Raises ValueError where one is missing, of another type, or holds a null or a negative
    number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    types = {int: pa.int64(), str: pa.large_binary()}
    for name, kind in kinds.items():
        at = batch.schema.get_field_index(name)
        if at < 0 or batch.column(at).type != types[kind] or batch.column(at).null_count:
            raise ValueError(f"column {name!r} is missing, or is none of {types[kind]}")
        if kind is int and len(batch) and pc.min(batch.column(at)).as_py() < 0:
            raise ValueError(f"column {name!r} has a negative number")
    return batch.select(list(kinds))


def write_columns(folder: Path, batch: pa.RecordBatch) -> str:
    """Write a file of the columns and return its name."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = memoryview(sink.getvalue())
    name = f"shards_{digest(data)}.arrow"
    write_bytes(folder / name, data)
    return name


def write_named(about: Path, value: dict, batch: pa.RecordBatch) -> None:
    """Write a file of the columns, and then the JSON file `about` beside it: `value`, and the file's name as "columns".

    What `about` named before stays for KEPT seconds from now; older files that it does not name are removed.
    """
    before = None
    with contextlib.suppress(OSError, ValueError):
        before = read_json(about).get("columns")
    name = write_columns(about.parent, batch)
    write_json(about, {**value, "columns": name})
    for path in about.parent.glob("shards_*.arrow"):
        if not NAME.fullmatch(path.name) or path.name == name:
            continue
        with contextlib.suppress(OSError):
            if path.name == before:
                os.utime(path)
            elif time.time() - path.stat().st_mtime > KEPT:
                path.unlink()


def open_columns(folder: Path, name: str, rows: int) -> pa.RecordBatch:
    """The columns of `rows` rows in a file, as views on its map. Raises ValueError."""
    import pyarrow as pa

    named = NAME.fullmatch(name)
    if not named:
        raise ValueError(f"{name!r:.80} is no name of a file of columns")
    try:
        with pa.memory_map(str(folder / name)) as source:
            data = source.read_buffer()
            if digest(memoryview(data)) != named[1]:
                raise ValueError(f"{name} was changed or damaged")
            reader = pa.ipc.open_file(data)
            if reader.num_record_batches != 1:
                raise ValueError(f"{name} has {reader.num_record_batches} batches, expected 1")
            batch = reader.get_batch(0)
        batch.validate(full=True)  # offsets of strings that lead out of the file
    except (OSError, pa.ArrowException) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{name}: {why}") from None
    if len(batch) != rows:
        raise ValueError(f"{name} has {len(batch)} rows, expected {rows}")
    return batch


def to_numpy(column: pa.Array) -> np.ndarray:
    """A view on a column of numbers, or a copy of one of bool: pa.Array.to_numpy, which would load pandas first."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_boolean(column.type):
        return np.from_dlpack(column.cast(pa.uint8())).astype(bool)
    return np.from_dlpack(column)


def digest(data: memoryview) -> str:
    found = hashlib.blake2b(digest_size=16)
    for start in range(0, len(data), BLOCK):
        found.update(data[start : start + BLOCK])
    return found.hexdigest()


class Rows(Sequence[Item]):
    """The rows of some batches of columns one after the other, each an object that is made when it is asked for.

    make: the function that makes the rows of a batch, of its columns in order; strings are str.
    """

    def __init__(self, batches: Sequence[tuple[pa.RecordBatch, Callable[..., Item]]]):
        self.batches = batches
        self.starts = [0, *accumulate(len(batch) for batch, _ in batches)]
        self.recent = lru_cache(RECENT)(self.made)

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, number: int) -> Item: ...
    @overload
    def __getitem__(self, number: slice) -> list[Item]: ...

    def __getitem__(self, number: int | slice) -> Item | list[Item]:
        if isinstance(number, slice):
            return [self.made(at) for at in range(*number.indices(len(self)))]
        at = int(number) + (len(self) if number < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.recent(at)

    def made(self, number: int) -> Item:
        batch, make = self.batches[place := bisect_right(self.starts, number) - 1]
        return make(*(text_or_number(column[number - self.starts[place]].as_py()) for column in batch.columns))

    def __iter__(self) -> Iterator[Item]:
        return self.between(0, len(self))

    def between(self, first: int, last: int) -> Iterator[Item]:
        """The rows from `first` to before `last`, some at a time."""
        for (batch, make), begin in zip(self.batches, self.starts):
            for start in range(max(0, first - begin), min(len(batch), last - begin), PIECE):
                some = batch.slice(start, min(PIECE, last - begin - start))
                columns = (column.to_pylist() for column in some.columns)
                yield from (make(*map(text_or_number, values)) for values in zip(*columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def column(self, name: str) -> pa.Array:
        """One column of all rows; a view where there is one batch."""
        import pyarrow as pa

        columns = [batch[name] for batch, _ in self.batches]
        return columns[0] if len(columns) == 1 else pa.concat_arrays(columns)


def text_or_number(value: bytes | int) -> str | int:
    return to_text(value) if isinstance(value, bytes) else value
