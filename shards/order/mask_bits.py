"""SafeMask: one bit a pair, packed per shard. Which pairs are safe, which risky, and the nth of either in a shard.

On disk: safe.npy (the bits), columns of the shards (shards/storage/columns.py), and mask.json, written last.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.errors import UserError
from shards.order.shard_names import COLUMNS
from shards.storage.columns import open_columns, record_batch, select, to_numpy, write_named
from shards.storage.files import read_json, whole_file

VERSION = 2  # of mask.json
VIEWS = ("all", "safe", "risky")
COUNTS = {"counts": int, "safe_counts": int}  # columns
PIECE = 1 << 15  # words of 8 bytes


class SafeMask:
    """Safe or risky for every (shard, position). bits: one uint8 array, each shard starting at a byte of its own.

    A mask that is loaded is mapped, so that a host holds it once, and is sent to another process as its folder.
    columns: COUNTS, and what is known of the shards, of a mask that is loaded.
    """

    columns: pa.RecordBatch | None = None
    saved: tuple[Path, str | None] | None = None  # folder, and name of the columns in it

    def __init__(self, counts_S: Sequence[int] | np.ndarray, bits: np.ndarray):
        self.counts_S = np.asarray(counts_S, np.int64)
        self.bits = bits
        self.starts = byte_starts(self.counts_S)

    def __reduce__(self) -> tuple:
        return (loaded_again, self.saved) if self.saved else (SafeMask, (self.counts_S, self.bits))

    @classmethod
    def from_flags(cls, counts_S: Sequence[int] | np.ndarray, safe_N: Sequence[bool] | np.ndarray) -> "SafeMask":
        """From bool (N,) in (shard, position) order."""
        parts = np.split(np.asarray(safe_N, bool), np.cumsum(counts_S)[:-1])
        return cls(counts_S, np.concatenate([np.packbits(part) for part in parts] or [np.zeros(0, np.uint8)]))

    def shard_bits(self, shard: int) -> np.ndarray:
        """uint8: the packed bits of one shard; a view that can be written to."""
        return self.bits[self.starts[shard] : self.starts[shard + 1]]

    def shard_flags(self, shard: int) -> np.ndarray:
        """bool (n,): safe or not, of one shard."""
        return np.unpackbits(self.shard_bits(shard), count=int(self.counts_S[shard])).astype(bool)

    def at(self, shard_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
        """bool (B,): safe or not, of single samples."""
        byte_B = self.bits[self.starts[shard_B] + position_B // 8]
        return (byte_B >> (7 - position_B % 8) & 1).astype(bool)

    def flags(self) -> np.ndarray:
        """bool (N,) in (shard, position) order."""
        return np.concatenate([self.shard_flags(s) for s in range(len(self.counts_S))] or [np.zeros(0, bool)])

    def counts(self, view: str) -> np.ndarray:
        """int64 (S,): samples of "all", "safe" or "risky" in each shard."""
        if view == "all":
            return self.counts_S
        if self.columns is not None:  # compared with the bits, which nobody changes, when it was loaded
            safe_S = to_numpy(self.columns["safe_counts"])
        else:
            safe_S = np.diff(ones_before(self.bits, self.starts))
        return safe_S if view == "safe" else self.counts_S - safe_S

    def positions(self, shard: int, view: str) -> np.ndarray:
        """int64: positions of the view's samples in one shard, ascending."""
        flags = self.shard_flags(shard)
        return np.arange(len(flags)) if view == "all" else np.flatnonzero(flags if view == "safe" else ~flags)

    def locate(self, view: str, shard_B: np.ndarray, nth_B: np.ndarray) -> np.ndarray:
        """int64 (B,): the position of the nth sample of the view within its shard."""
        position_B = np.empty(len(shard_B), np.int64)
        for shard in np.unique(shard_B):
            here = shard_B == shard
            position_B[here] = self.positions(shard, view)[nth_B[here]]
        return position_B

    def moved(self, before: "SafeMask") -> tuple[int, int]:
        """(in, out): samples that are safe here and risky in the mask `before`, and the other way round."""
        came, went = (count_ones(a, b) for a, b in ((self.bits, before.bits), (before.bits, self.bits)))
        return came, went

    @property
    def fraction(self) -> float:
        """Safe samples / all samples."""
        return float(self.counts("safe").sum() / max(1, self.counts_S.sum()))

    def save(self, folder: str | Path, meta: dict, shards: pa.RecordBatch | None = None) -> None:
        """Write safe.npy, the columns of the shards, and mask.json with `meta` (its "fingerprint" names the index).
        shards: shard_names.COLUMNS, for who has no index."""
        folder = Path(folder)
        with whole_file(folder / "safe.npy") as file:
            np.save(file, self.bits, allow_pickle=False)
        columns = {"counts": self.counts_S, "safe_counts": self.counts("safe")}
        named = {} if shards is None else {name: shards[name] for name in COLUMNS}
        batch = record_batch({**COUNTS, **{key: COLUMNS[key] for key in named}}, columns | named)
        write_named(folder / "mask.json", {**meta, "version": VERSION, "shards": len(self.counts_S)}, batch)

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str | None = None) -> tuple["SafeMask", dict]:
        """(mask, meta) from `folder`. Raises UserError when it is damaged or of other shards than `fingerprint`
        names."""
        folder = Path(folder)
        try:
            meta = read_json(folder / "mask.json")
            columns = open_counts(folder, meta)
            mask = cls(to_numpy(columns["counts"]), read_bits(folder / "safe.npy"))
            whole = len(mask.bits) == mask.starts[-1] and (mask.counts_S <= 8 * len(mask.bits)).all()
            whole = whole and np.array_equal(mask.counts("safe"), to_numpy(columns["safe_counts"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise UserError(f"mask {folder}: cannot be read ({error}); expected safe.npy and mask.json") from None
        if not whole:
            raise UserError(f"mask {folder}: safe.npy does not hold what mask.json counts; it was changed or damaged")
        if fingerprint is not None and meta["fingerprint"] != fingerprint:
            raise UserError(
                f"mask {folder}: made for shards with fingerprint {meta['fingerprint']}, these have {fingerprint}; "
                "use the index it was made with"
            )
        mask.columns, mask.saved = columns, (folder, meta.get("columns"))
        return mask, meta


def open_counts(folder: Path, meta: dict) -> pa.RecordBatch:
    """COUNTS, and the other columns that there are. Raises OSError, ValueError, KeyError, TypeError, AttributeError."""
    if meta.get("version") == VERSION:
        columns = open_columns(folder, meta["columns"], meta["shards"])
        select(columns, COUNTS)
        return columns
    if "version" in meta:
        raise ValueError(f"mask.json is of version {meta['version']!r:.20}, expected {VERSION}")
    # The first version had all in mask.json.
    counts, shards = {name: meta.pop(name) for name in COUNTS}, meta.pop("shards", None)
    named = {name: [shard[name] for shard in shards] for name in COLUMNS} if shards is not None else {}
    return record_batch({**COUNTS, **{name: COLUMNS[name] for name in named}}, counts | named)


def loaded_again(folder: Path, columns: str | None) -> SafeMask:
    """The mask in `folder`, in another process. Raises UserError where it is another one by now."""
    mask, meta = SafeMask.load(folder)
    if meta.get("columns") != columns:
        raise UserError(f"mask {folder}: was replaced since it was opened; start again")
    return mask


def read_bits(path: Path) -> np.ndarray:
    """uint8: the packed bits in a file, mapped, so that a host holds them once. Raises OSError, ValueError,
    EOFError."""
    try:
        bits = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        bits = np.load(path, allow_pickle=False)
    if bits.dtype != np.uint8 or bits.ndim != 1:
        raise ValueError(f"safe.npy holds {bits.dtype} of {bits.ndim} dimensions, expected uint8 of 1")
    return bits


def byte_starts(counts_S: np.ndarray) -> np.ndarray:
    """int64 (S + 1,): where the packed bits of each shard start, and where the last ones end."""
    return np.concatenate([[0], np.cumsum((np.asarray(counts_S, np.int64) + 7) // 8)])


def ones_before(bits: np.ndarray, byte_S: np.ndarray) -> np.ndarray:
    """int64 (S,): how many bits are set before each of the bytes byte_S, which ascend."""
    words, word_S = bits[: len(bits) // 8 * 8].view(np.uint64), byte_S // 8
    ones_S, before = np.zeros(len(byte_S), np.int64), 0
    # Some words at a time: the sums of all at once would take more memory than the mask.
    for first in range(0, len(words) + 1, PIECE):
        sum_W = np.cumsum(np.bitwise_count(words[first : first + PIECE]), dtype=np.uint32)
        here = slice(*np.searchsorted(word_S, (first, first + PIECE)))
        ones_S[here] = before + np.concatenate([[0], sum_W])[word_S[here] - first]
        before += int(sum_W[-1]) if len(sum_W) else 0
    for place in range(7):  # bytes of the word that each lies in
        inside = np.flatnonzero(byte_S % 8 > place)
        ones_S[inside] += np.bitwise_count(bits[8 * word_S[inside] + place])
    return ones_S


def count_ones(a: np.ndarray, b: np.ndarray) -> int:
    """Bits that are set in `a` and not in `b`."""
    size = 8 * PIECE
    return sum(int(np.bitwise_count(a[at : at + size] & ~b[at : at + size]).sum()) for at in range(0, len(a), size))
