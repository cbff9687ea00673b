"""Whether the shards of an index, and the tables of their samples, are what was indexed."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import ChangedShard, UserError
from shards.index.findings import saved
from shards.index.scan import fingerprint_of, table_name
from shards.index.shard_list import PIPE, Part, Shard, ShardList
from shards.progress import progress
from shards.storage import remote
from shards.storage.columns import PIECE, to_text
from shards.storage.files import write_bytes

REMOTE_TRIED = 32  # shards behind URLs of which the size is asked
TABLES_TRIED = 1_000  # tables that are opened
THREADS = 32  # which wait for the disk or the network
BLOCK = 256  # shards that a thread compares at a time, at most


def verify(shards: ShardList, timeout: float = remote.TIMEOUT, stop: Callable[[], bool] = lambda: False) -> None:
    """As ShardIndex.verify. Raises UserError."""
    for part in shards.parts:
        check_names(part)
    tried_S = ~shards.remote_S
    far = np.flatnonzero(shards.remote_S & ~shards.where(PIPE))
    tried_S[far[:: -(-len(far) // REMOTE_TRIED) or 1]] = True
    tables = range(0, len(shards), -(-len(shards) // TABLES_TRIED) or 1)
    size = min(BLOCK, len(shards) // (8 * THREADS) + 1)

    def compare(first: int) -> tuple[str | None, int]:
        """(what is wrong with the first shard of a block that is not as indexed, number of such shards)."""
        some = zip(shards.between(first, first + size), tried_S[first : first + size])
        found = ((shard, difference(shard, timeout)) for shard, tried in some if tried and not stop())
        wrong = [f"shard {shard.path}: {what}" for shard, what in found if what]
        return wrong[0] if wrong else None, len(wrong)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda number: check_table(shards[number]), tables):
            pass
        blocks = range(0, len(shards), size)
        found = list(progress(pool.map(compare, blocks), len(blocks), "parts of the index verified"))
    first, count = next((what for what, _ in found if what), None), sum(many for _, many in found)
    if first:
        more = f" (and {count - 1} more such shards)" if count > 1 else ""
        raise UserError(
            f"{first}{more}; bring it back, or index the shards again: `safeclip index SHARDS... --out INDEX`"
        )


def difference(shard: Shard, timeout: float) -> str | None:
    """How a shard differs from what was indexed; None where it does not."""
    if shard.remote:
        size, _ = remote.about(shard.path, timeout)
        return None if size in (None, shard.size) else f"{size} bytes, but {shard.size} were indexed"
    try:
        found = os.stat(shard.path)
        if found.st_size != shard.size:
            return f"{found.st_size} bytes, but {shard.size} were indexed"
        # The name of a shard's table is made from its time of change, among others.
        folder, table = os.path.split(shard.table)
        same = table_name(shard.path, shard.size, found.st_mtime_ns, shard.text, shard.image)
        if same == table:
            return None
        known = saved(Path(folder, same))
        if (
            known["shard"]["fingerprint"] if known else fingerprint_of(shard.path, shard.size, timeout)
        ) != shard.fingerprint:
            return "holds other bytes than were indexed"
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    if not known:
        with contextlib.suppress(OSError):  # a folder that cannot be written: the shard is read again next time
            write_bytes(Path(folder, same), Path(shard.table).read_bytes())
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


def check_names(part: Part) -> None:
    """Raise ChangedShard if a table is missing; its folder is listed once."""
    names = part.batch["table"]
    number = pc.index(pc.is_in(names, value_set=listed(part.tables)), False).as_py()
    if number >= 0:
        with named_table(os.path.join(part.tables, to_text(names[number].as_py()))):
            raise FileNotFoundError(errno.ENOENT, "missing")


def listed(folder: str) -> pa.Array:
    """Names of the files in a folder, as bytes; none where there is no such folder."""
    pieces = [pa.array([], pa.large_binary())]
    if os.path.isdir(folder):
        with os.scandir(os.fsencode(folder)) as entries:
            while piece := [entry.name for entry in islice(entries, PIECE)]:
                pieces.append(pa.array(piece, pa.large_binary()))
    return pa.concat_arrays(pieces)


def check_table(shard: Shard) -> None:
    """Read the end of a shard's table, which says how long it is. Raises ChangedShard."""
    with named_table(shard.table):
        check_rows(pq.read_metadata(shard.table).num_rows, shard.samples)
