"""Shards as a mask names them, wherever they lie: columns of name, bytes and fingerprint."""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.index.shard_list import ShardList
from shards.storage.columns import PIECE, Rows, record_batch, select, to_bytes, to_numpy, to_text

COLUMNS = {"name": str, "bytes": int, "fingerprint": str}
ODD = r"\A\z|\A[^/]|//|/\z|/\.\.?(/|\z)"  # no path as `as_path` makes it
# Names become paths of files that are written, and a mask may come from anybody.
UNFIT = r"\A\z|\A/|//|/\z|(\A|/)\.\.?(/|\z)|\x00"


def shard_columns(shards: ShardList) -> pa.RecordBatch:
    """COLUMNS of an index's shards.

    A name is the path below the folder that all the shards have in common: it means the same wherever they are moved
    together.
    """
    paths = shards.column("path")
    if pc.any(pc.match_substring_regex(paths, ODD)).as_py():
        usual = mapped(as_path, paths)
        paths = usual if distinct(usual) else mapped(partial(as_path, whole=True), paths)
    common = common_folder(pc.unique(pc.replace_substring_regex(paths, r"/[^/]*\z", "")).to_pylist())
    names = pc.binary_replace_slice(paths, 0, len(common) + 1, b"")
    sizes, prints = shards.column("size"), shards.column("fingerprint")
    return record_batch(COLUMNS, {"name": names, "bytes": sizes, "fingerprint": prints})


def mapped(function: Callable[[str], str], paths: pa.Array) -> pa.Array:
    """function(path) of each path in a column."""
    pieces = (paths.slice(start, PIECE).to_pylist() for start in range(0, len(paths), PIECE))
    made = ([to_bytes(function(to_text(path))) for path in piece] for piece in pieces)
    return pa.concat_arrays([pa.array(piece, pa.large_binary()) for piece in made])


def common_folder(folders: Iterable[bytes]) -> bytes:
    """The folder that some absolute ones lie in; the root is b""."""
    common = None
    for folder in folders:
        if common is None:
            common = folder
        elif folder != common and not folder.startswith(common + b"/"):
            common = os.path.commonpath([common or b"/", folder or b"/"]).rstrip(b"/")
    return common or b""


def as_path(url: str, whole: bool = False) -> str:
    """An absolute path for a shard's path or URL: s3://bucket/a.tar is /s3/bucket/a.tar, a `pipe:` command is the tar
    that it names.

    whole: with the query of a URL, and all that a command says, of shards that differ in nothing else.
    """
    if url.startswith("pipe:"):
        url = next(
            (word.strip("'\"") for word in url.split() if ".tar" in word and not whole),
            "pipe/" + hashlib.sha256(url.encode()).hexdigest(),
        )
    if "://" in url:
        url = (url if whole else url.partition("?")[0]).replace("://", "/")
    return "/" + os.path.normpath(os.path.join("/", url)).lstrip("/")


class NamedShards(Rows[dict]):
    """{"name", "bytes", "fingerprint"} of the shards of a mask, in its order. batch: COLUMNS."""

    def __init__(self, batch: pa.RecordBatch):
        """Raises ValueError unless the names are different paths below one folder."""
        self.batch = select(batch, COLUMNS)
        self.name = self.batch["name"]
        if pc.any(pc.match_substring_regex(self.name, UNFIT)).as_py() or not distinct(self.name):
            raise ValueError("names of shards are no different paths below one folder")
        super().__init__([(self.batch, lambda *values: dict(zip(COLUMNS, values)))])

    def number(self, name: str) -> int | None:
        """Number of the shard with a name, or with a base name that no other shard has; None where there is none."""
        found = equal(self.name, self.by_name, name)
        if not found and "/" not in name:
            found = equal(*self.by_base, name)
        return found[0] if len(found) == 1 else None

    def find(self, url: str) -> int | None:
        """Number of the shard that a path or URL names: the longest tail that is a shard's name, or its base name if no
        other shard has it."""
        usual, whole = (PurePosixPath(as_path(url, whole)).parts for whole in (False, True))
        # No tail begins in a query, which may hold the name of another shard.
        last = len(whole) if url.startswith("pipe:") else len(usual)
        tails = [whole[start:] for start in range(1, last)] + [usual[start:] for start in range(1, len(usual))]
        numbers = (self.number("/".join(tail)) for tail in tails)
        return next((number for number in numbers if number is not None), None)

    # Sorted columns are searched: a dict of all names would take more memory than the mask, in each process.
    @cached_property
    def by_name(self) -> np.ndarray:
        """Numbers of the shards, ascending by name."""
        return to_numpy(pc.array_sort_indices(self.name))

    @cached_property
    def by_base(self) -> tuple[pa.Array, np.ndarray]:
        """(base names, numbers of the shards, ascending by them)."""
        bases = pc.replace_substring_regex(self.name, r"(?s)\A.*/", "")
        return bases, to_numpy(pc.array_sort_indices(bases))


def distinct(column: pa.Array) -> bool:
    """Whether no two values are the same. Names in order, as most are, need no memory for that."""
    return pc.all(pc.less(column[:-1], column[1:])).as_py() is not False or len(pc.unique(column)) == len(column)


def equal(column: pa.Array, order: np.ndarray, text: str) -> list[int]:
    """The first two places of a column, sorted by `order`, that hold the text."""
    wanted = to_bytes(text)
    first = bisect_left(order, wanted, key=lambda number: column[int(number)].as_py())
    return [int(number) for number in order[first : first + 2] if column[int(number)].as_py() == wanted]
