"""SafeMask: one bit a pair, packed per shard. Which pairs are safe, which risky, and the nth of either in a shard.

A mask's folder is an artefact of its own: with the shards and nothing else of the run, `SavedMask` reads it, and
`dataset.select(IsSafe(FOLDER))` trains on the safe pairs in webdataset without a copy of the data.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from shards.errors import UserError
from shards.index.tar import key_text
from shards.order.score_parts import ScoreParts
from shards.storage.files import read_json, write_bytes, write_json
from shards.storage.protocols import StoredShard

if TYPE_CHECKING:
    import pyarrow as pa  # which takes a while to load

VIEWS = ("all", "safe", "risky")
PIECE = 4096  # shards
ONES = np.array([number.bit_count() for number in range(256)], np.uint8)  # bits that are set in a byte
FIELDS = (
    "fingerprint",
    "shards",
    "epoch",
    "step",
    "config",
    "fraction",
    "first_fraction",
    "threshold",
    "mixture",
    "note",
)


class SafeMask:
    """Safe or risky for every (shard, position). bits: one uint8 array, each shard starting at a byte of its own."""

    def __init__(self, counts_S: Sequence[int] | np.ndarray, bits: np.ndarray):
        self.counts_S = np.asarray(counts_S, np.int64)
        self.bits = bits
        self.starts = byte_starts(self.counts_S)

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
        safe_S, filled = np.zeros(len(self.counts_S), np.int64), np.flatnonzero(self.counts_S)
        # Some shards at a time: the sums of all bytes at once would take as much memory again as the mask.
        for some in np.split(filled, range(PIECE, len(filled), PIECE)) if len(filled) else ():
            first, last = self.starts[some[0]], self.starts[some[-1] + 1]
            safe_S[some] = np.add.reduceat(ONES[self.bits[first:last]], self.starts[some] - first, dtype=np.int64)
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
        came, went = (int(ONES[a & ~b].sum()) for a, b in ((self.bits, before.bits), (before.bits, self.bits)))
        return came, went

    @property
    def fraction(self) -> float:
        """Safe samples / all samples."""
        return float(self.counts("safe").sum() / max(1, self.counts_S.sum()))

    def save(self, folder: str | Path, meta: dict) -> None:
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
    def load(cls, folder: str | Path, fingerprint: str | None = None) -> tuple["SafeMask", dict]:
        """(mask, meta) from `folder`. Raises UserError when it is damaged or of other shards than `fingerprint`
        names."""
        folder = Path(folder)
        try:
            meta = read_json(folder / "mask.json")
            mask = cls(meta["counts"], read_bits(folder / "safe.npy"))
            whole = len(mask.bits) == mask.starts[-1] and mask.counts("safe").tolist() == meta["safe_counts"]
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"mask {folder}: cannot be read ({error}); expected safe.npy and mask.json") from None
        if not whole:
            raise UserError(f"mask {folder}: safe.npy does not hold what mask.json counts; it was changed or damaged")
        if fingerprint is not None and meta["fingerprint"] != fingerprint:
            raise UserError(
                f"mask {folder}: made for shards with fingerprint {meta['fingerprint']}, these have {fingerprint}; "
                "use the index it was made with"
            )
        return mask, meta


def read_bits(path: Path) -> np.ndarray:
    """uint8: the packed bits in a file, mapped, so that a host holds them once. Raises OSError, ValueError,
    EOFError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        return np.load(path, allow_pickle=False)


def byte_starts(counts_S: np.ndarray) -> np.ndarray:
    """int64 (S + 1,): where the packed bits of each shard start, and where the last ones end."""
    return np.concatenate([[0], np.cumsum((np.asarray(counts_S, np.int64) + 7) // 8)])


def shard_list(shards: Sequence[StoredShard]) -> list[dict]:
    """[{"name", "bytes", "fingerprint"}] of an index's shards, for mask.json.

    A name is the path below the folder that all the shards have in common: it means the same wherever they are moved
    together.
    """
    paths = [as_path(shard.path) for shard in shards]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [
        {"name": os.path.relpath(path, common), "bytes": shard.size, "fingerprint": shard.fingerprint}
        for path, shard in zip(paths, shards)
    ]


def as_path(url: str) -> str:
    """An absolute path for a shard's path or URL: s3://bucket/a.tar is /s3/bucket/a.tar, a `pipe:` command is the tar
    that it names."""
    if url.startswith("pipe:"):
        url = next(
            (word.strip("'\"") for word in url.split() if ".tar" in word),
            "pipe/" + hashlib.sha256(url.encode()).hexdigest(),
        )
    if "://" in url:
        url = url.partition("?")[0].replace("://", "/")
    return os.path.normpath(os.path.join("/", url))


class SavedMask:
    """A mask's folder, {mask.json, safe.npy, scores/}, read without the run and the index that it comes from.

    meta: of mask.json; shards: {"name", "bytes", "fingerprint"}, in the mask's order.
    Raises UserError when the folder is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.mask, self.meta = SafeMask.load(folder)
        lacking = [field for field in FIELDS if field not in self.meta]
        if lacking:
            raise UserError(
                f"mask {folder}: mask.json has no {lacking[0]!r}; it was not saved by a run, or was changed"
            )
        try:
            self.shards = [{key: s[key] for key in ("name", "bytes", "fingerprint")} for s in self.meta["shards"]]
            names = {shard["name"]: number for number, shard in enumerate(self.shards)}
            # Names become paths of files that are written, and a mask may come from anybody.
            fit = all(name and not {"/", ".."} & set(PurePosixPath(name).parts) for name in names)
        except (KeyError, TypeError):
            fit, names = False, {}
        if not fit or not len(names) == len(self.shards) == len(self.mask.counts_S):
            raise UserError(
                f"mask {folder}: the shards in mask.json do not fit it; "
                f"expected name, bytes and fingerprint of {len(self.mask.counts_S)} shards, "
                "the names different paths below one folder; it was changed or damaged"
            )
        bases = Counter(PurePosixPath(name).name for name in names)
        alone = {PurePosixPath(name).name: number for name, number in names.items()}
        self.number = {**{base: number for base, number in alone.items() if bases[base] == 1}, **names}

    @cached_property
    def parts(self) -> ScoreParts:
        """The score files."""
        return ScoreParts(self.folder / "scores", self.mask.counts_S)

    def find(self, url: str) -> int:
        """Number of the shard that a path or URL names: the longest tail that is a shard's name, or its base name if no
        other shard has it. Raises UserError."""
        parts = PurePosixPath(as_path(url)).parts
        for start in range(len(parts)):
            number = self.number.get("/".join(parts[start:]))
            if number is not None:
                return number
        raise UserError(
            f"shard {url}: not one of the {len(self.shards)} shards of mask {self.folder}, the first of which is "
            f"{self.shards[0]['name']}; give the shards that it was made with, under their names"
        )

    def table(self, shard: int, columns: Sequence[str] = ("key", "cosine", "score", "reason")) -> "pa.Table":
        """One shard's pairs by position: key (str), cosine and score (float, NaN = unreadable), reason
        (str or null), or other columns of pipeline.safety.score_files.ScoreFiles."""
        import pyarrow as pa

        count = int(self.mask.counts_S[shard])
        if not count:  # an empty shard has no scores
            texts = ("key", "reason")
            return pa.table({name: pa.array([], pa.string() if name in texts else pa.float32()) for name in columns})
        try:
            path, _ = self.parts.place(shard)
            table = self.parts.read(shard, list(columns))
            step = json.loads((table.schema.metadata or {}).get(b"step", b"null"))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"scores {path}: cannot be read ({error}); bring the mask's scores/ back") from None
        if (len(table), step) != (count, self.meta["step"]) or table.num_columns != len(columns):
            raise UserError(
                f"scores {path}: {len(table)} pairs scored at step {step}, but the mask is of {count} pairs at step "
                f"{self.meta['step']}; bring the mask's own scores/ back"
            )
        return table


def fingerprint(path: str | Path) -> str:
    """BLAKE2b-128 of a file's content, in hex. Raises UserError when it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"shard {path}: {error.strerror}; check the path") from None
    return digest.hexdigest()


def require_same(path: str | Path, found: str, expected: str) -> None:
    """Raise UserError unless the fingerprint `found` of the shard at `path` is the one that the mask expects."""
    if found != expected:
        raise UserError(
            f"shard {path}: has fingerprint {found}, the mask was made for {expected}; "
            "use the shard that it was made with"
        )


class IsSafe:
    """Whether a webdataset sample is safe: `WebDataset(urls).select(IsSafe(FOLDER))` reads in place and copies nothing.

    A sample is looked up by the name of its shard and its key. The content of a shard is compared with the mask's
    fingerprint when its first sample comes, once in a process (1 to 2 s a GB); shards that are not local files cannot
    be, and need verify=False, which trusts their names. Raises UserError naming the shard: not the mask's, changed, or
    without such a key.
    """

    KEPT = 16  # shards whose keys stay in memory: as many as a shuffle buffer in front of this mixes

    def __init__(self, folder: str | Path, verify: bool = True):
        self.saved, self.verify = SavedMask(folder), verify
        self.verified: set[str] = set()
        self.keys: dict[str, dict[str, bool]] = {}

    def __call__(self, sample: dict) -> bool:
        url = sample["__url__"]
        if url not in self.keys:
            if len(self.keys) >= self.KEPT:
                del self.keys[next(iter(self.keys))]
            self.keys[url] = self.open(url, sample.get("__local_path__", url))
        key = key_text(sample["__key__"])
        try:
            return self.keys[url][key]
        except KeyError:
            raise UserError(
                f"shard {url}: sample {key!r} is not in mask {self.saved.folder}; use the shards that it was made with"
            ) from None

    def open(self, url: str, path: str | Path) -> dict[str, bool]:
        """{key: safe} of the shard `url`, whose content lies at `path`."""
        shard = self.saved.find(url)
        path = str(path).removeprefix("file:")
        if self.verify and path not in self.verified:
            if path.startswith("pipe:") or "://" in path:
                raise UserError(
                    f"shard {url}: not a local file, so its fingerprint cannot be compared with mask "
                    f"{self.saved.folder}; copy or cache it, or trust its name with IsSafe(..., verify=False)"
                )
            require_same(path, fingerprint(path), self.saved.shards[shard]["fingerprint"])
            self.verified.add(path)
        safe: dict[str, bool] = {}
        keys = self.saved.table(shard, ("key",))["key"].to_pylist()
        for key, flag in zip(keys, self.saved.mask.shard_flags(shard).tolist()):
            safe[key] = flag and safe.get(key, True)  # a key that comes twice: both must be safe
        return safe
