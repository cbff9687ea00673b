"""A saved mask, and the samples of webdataset that are safe by it.

A mask's folder is an artefact of its own: with the shards and nothing else of the run, `SavedMask` reads it, and
`dataset.select(IsSafe(FOLDER))` trains on the safe pairs in webdataset without a copy of the data.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from shards.errors import UserError
from shards.index.tar import key_text
from shards.order.mask_bits import SafeMask, byte_starts
from shards.order.score_parts import ScoreParts
from shards.order.shard_names import NamedShards

__all__ = ["IsSafe", "SafeMask", "SavedMask", "byte_starts", "fingerprint", "require_same"]

FIELDS = ("fingerprint", "epoch", "step", "config", "fraction", "first_fraction", "threshold", "mixture", "note")


class SavedMask:
    """A mask's folder, {mask.json, columns, safe.npy, scores/}, read without the run and the index that it comes from.

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
        if self.meta["threshold"] is None:  # nothing is safe
            self.meta["threshold"] = math.inf
        try:
            self.shards = NamedShards(self.mask.columns)
        except ValueError:
            raise UserError(
                f"mask {folder}: the names of its shards do not fit it; "
                f"expected name, bytes and fingerprint of {len(self.mask.counts_S)} shards, "
                "the names different paths below one folder; it was changed or damaged"
            ) from None

    def __reduce__(self) -> tuple:
        return SavedMask, (self.folder,)

    @cached_property
    def parts(self) -> ScoreParts:
        """The score files."""
        return ScoreParts(self.folder / "scores", self.mask.counts_S)

    @property
    def has_scores(self) -> bool:
        """Whether its scores are there: a run keeps those of its newest rounds (run.keep)."""
        return (self.folder / "scores").is_dir()

    def find(self, url: str) -> int:
        """NamedShards.find. Raises UserError."""
        number = self.shards.find(url)
        if number is None:
            raise UserError(
                f"shard {url}: not one of the {len(self.shards)} shards of mask {self.folder}, the first of which is "
                f"{self.shards[0]['name']}; give the shards that it was made with, under their names"
            )
        return number

    def table(self, shard: int, columns: Sequence[str] = ("key", "cosine", "score", "reason")) -> pa.Table:
        """One shard's pairs by position: key (str), cosine and score (float, NaN = unreadable), reason
        (str or null), or other columns of pipeline.safety.score_files.ScoreFiles."""
        count = int(self.mask.counts_S[shard])
        if not count:  # an empty shard has no scores
            texts = ("key", "reason")
            return pa.table({name: pa.array([], pa.string() if name in texts else pa.float32()) for name in columns})
        if not self.has_scores:
            raise UserError(
                f"mask {self.folder}: has no scores/; a run keeps those of its last rounds (run.keep); "
                "take the last mask of the run, or bring the scores back"
            )
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
