"""SafeMask: one bit a pair, packed per shard. Which pairs are safe, which risky, and the nth of either in a shard."""

import io
import json
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.storage import write_bytes, write_json

VIEWS = ("all", "safe", "risky")


class SafeMask:
    """Safe or risky for every (shard, position). bits: one uint8 array, each shard starting at a byte of its own."""

    def __init__(self, counts_S, bits):
        self.counts_S = np.asarray(counts_S, np.int64)
        self.bits = bits
        self.starts = np.concatenate([[0], np.cumsum((self.counts_S + 7) // 8)])

    @classmethod
    def from_flags(cls, counts_S, safe_N):
        """From bool (N,) in (shard, position) order."""
        parts = np.split(np.asarray(safe_N, bool), np.cumsum(counts_S)[:-1])
        return cls(counts_S, np.concatenate([np.packbits(part) for part in parts] or [np.zeros(0, np.uint8)]))

    def shard_bits(self, shard):
        """uint8: the packed bits of one shard; a view that can be written to."""
        return self.bits[self.starts[shard] : self.starts[shard + 1]]

    def shard_flags(self, shard):
        """bool (n,): safe or not, of one shard."""
        return np.unpackbits(self.shard_bits(shard), count=int(self.counts_S[shard])).astype(bool)

    def flags(self):
        """bool (N,) in (shard, position) order."""
        return np.concatenate([self.shard_flags(s) for s in range(len(self.counts_S))] or [np.zeros(0, bool)])

    def counts(self, view):
        """int64 (S,): samples of "all", "safe" or "risky" in each shard."""
        if view == "all":
            return self.counts_S
        safe_S = np.array([self.shard_flags(s).sum() for s in range(len(self.counts_S))], np.int64)
        return safe_S if view == "safe" else self.counts_S - safe_S

    def positions(self, shard, view):
        """int64: positions of the view's samples in one shard, ascending."""
        flags = self.shard_flags(shard)
        return np.arange(len(flags)) if view == "all" else np.flatnonzero(flags if view == "safe" else ~flags)

    def locate(self, view, shard_B, nth_B):
        """int64 (B,): the position of the nth sample of the view within its shard."""
        position_B = np.empty(len(shard_B), np.int64)
        for shard in np.unique(shard_B):
            here = shard_B == shard
            position_B[here] = self.positions(shard, view)[nth_B[here]]
        return position_B

    @property
    def share(self):
        """Safe samples / all samples."""
        return float(self.counts("safe").sum() / max(1, self.counts_S.sum()))

    def save(self, folder, meta):
        """Write safe.npy, then mask.json with `meta` (its "fingerprint" names the index) and the counts per shard."""
        folder = Path(folder)
        file = io.BytesIO()
        np.save(file, self.bits, allow_pickle=False)
        write_bytes(folder / "safe.npy", file.getvalue())
        write_json(
            folder / "mask.json",
            {**meta, "counts": self.counts_S.tolist(), "safe_counts": self.counts("safe").tolist()},
        )

    @classmethod
    def load(cls, folder, fingerprint=None):
        """(mask, meta) from `folder`. Raises UserError when it is damaged or of other shards than `fingerprint` names."""
        folder = Path(folder)
        try:
            meta = json.loads((folder / "mask.json").read_text())
            mask = cls(meta["counts"], np.load(folder / "safe.npy", allow_pickle=False))
            whole = len(mask.bits) == mask.starts[-1] and mask.counts("safe").tolist() == meta["safe_counts"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"mask {folder}: cannot be read ({error}); expected safe.npy and mask.json") from None
        if not whole:
            raise UserError(f"mask {folder}: safe.npy does not hold what mask.json counts; it was changed or damaged")
        if fingerprint is not None and meta["fingerprint"] != fingerprint:
            raise UserError(
                f"mask {folder}: made for shards with fingerprint {meta['fingerprint']}, these have {fingerprint}; "
                "use the index it was made with"
            )
        return mask, meta
