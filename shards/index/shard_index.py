"""The index: what each shard holds, and where, so that any sample can be read without its neighbours.

A sample IS (shard, position in shard); its row over all shards is offsets[shard] + position. On disk:
DIR/tables/*.parquet, one for each shard (key, and byte offset and size of picture and text; shards/index/scan.py), and
DIR/index.json, written last.
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.index.scan import LACKS, Finding, scan_shard
from shards.storage import remote
from shards.storage.files import write_bytes, write_json
from shards.storage.paths import braces

VERSION = 2
REMOTE_TRIED = 32  # shards behind URLs of which `verify` asks the size


@dataclass(frozen=True)
class Shard:
    """One tar: absolute path or URL, bytes, samples, BLAKE2b-128 of its content in hex, its table's file, and what is
    its text."""

    path: str
    size: int
    samples: int
    fingerprint: str
    table: str
    text: str = "txt"

    @cached_property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return remote.is_remote(self.path)


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard, in order: names, and int64 (N,) byte offsets and sizes (MISSING = has none)."""

    keys: list[str]
    image_offset: np.ndarray
    image_size: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray


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
        # The bytes say it all, but for the field of a .json that is taken for the caption.
        names = (s.fingerprint + (s.text if s.text.startswith("json:") else "") for s in shards)
        self.fingerprint = hashlib.blake2b("".join(names).encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """The index in `folder`. Raises UserError when there is none, or it cannot be used."""
        path = Path(folder) / "index.json"
        try:
            found = json.loads(path.read_text())
            if found["version"] not in (1, VERSION):
                raise UserError(f"index {path}: version {found['version']}, expected {VERSION}; index the shards again")
            shards = []
            for number, entry in enumerate(found["shards"]):
                name = entry.pop("table", f"{number:05d}.parquet")  # version 1 numbered the tables
                shards.append(Shard(**entry, table=str(path.absolute().parent / "tables" / name), text=found["text"]))
            return cls(shards)
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
        """ShardTable of shard number `shard`; the last few are kept in memory."""
        return read_table(self.shards[shard].table)

    def verify(self, timeout: float = remote.TIMEOUT) -> None:
        """Raise UserError if a shard is missing or is not the size that was indexed; behind URLs some are tried, from
        all over the index."""
        local = [shard for shard in self.shards if not shard.remote]
        far = [shard for shard in self.shards if shard.remote and not shard.path.startswith("pipe:")]
        tried = far[:: -(-len(far) // REMOTE_TRIED) or 1]
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(lambda shard: remote.about(shard.path, timeout)[0], tried))
        wrong = []
        for shard, size in [(shard, local_size(shard.path)) for shard in local] + list(zip(tried, sizes)):
            if size is None:
                wrong.append(f"shard {shard.path}: missing")
            elif size != shard.size:
                wrong.append(f"shard {shard.path}: {size} bytes, but {shard.size} were indexed")
        if wrong:
            more = f" (and {len(wrong) - 1} more such shards)" if len(wrong) > 1 else ""
            raise UserError(f"{wrong[0]}{more}; bring it back, or index the shards again")


def local_size(path: str) -> int | None:
    """Bytes of a file, or None where there is none."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=64)
def read_table(path: str) -> ShardTable:
    columns = pq.read_table(path)
    return ShardTable(
        columns["key"].to_pylist(),
        *(columns[name].to_numpy() for name in ("image_offset", "image_size", "text_offset", "text_size")),
    )


def build_index(
    paths: Sequence[str],
    out: str | Path,
    text: str = "txt",
    workers: int | None = None,
    report: str | Path | None = None,
    timeout: float = remote.TIMEOUT,
    allow_pipe: bool = False,
) -> ShardIndex:
    """Index tars (`paths`: brace-expanded; local ones or URLs) into the folder `out`; returns the
    ShardIndex.

    `text` is what a sample's text is: the extension of a member ("txt" for captions, "cls" for labels), or
    "json:FIELD", a field of its .json member. One pass over each shard, shards in parallel; a shard that `out` holds
    already and that has not changed is not read again (scan.scan_shard). A sample without picture or text keeps its
    position. Raises UserError naming the first damaged shard; with `report`, a file, all that was found is listed there
    and what is intact is indexed.
    """
    if not re.fullmatch("[a-z0-9]+|json:.+", text):
        raise UserError(f"--text: got {text!r}, expected a member's extension in lower case (txt, cls) or json:FIELD")
    out, shards, findings = Path(out), [], []
    urls = expand(paths)
    scan = partial(scan_shard, text=text, tables=out / "tables", timeout=timeout, allow_pipe=allow_pipe)
    workers = min(workers or os.cpu_count(), len(urls))
    with ProcessPoolExecutor(workers) if workers > 1 else ThreadPoolExecutor(1) as pool:
        for entry, found in pool.map(scan, urls):
            shards.append(Shard(**entry, text=text))
            findings += found
            if sys.stderr.isatty():
                end = "\n" if len(shards) == len(urls) else ""
                print(f"\r{len(shards):,} of {len(urls):,} shards indexed", end=end, file=sys.stderr, flush=True)
    if report:
        write_bytes(report, "".join(json.dumps(asdict(finding)) + "\n" for finding in findings).encode())
    damage = [finding for finding in findings if finding.damage]
    if damage and not report:
        others = f" (and {len(damage) - 1} more of the kind)" if len(damage) > 1 else ""
        raise UserError(
            f"shard {damage[0].shard}: {damage[0].reason}, at byte {damage[0].byte}{others}; "
            "fetch or write it again, leave it out, or let --report FILE list all damage and index what is intact"
        )
    lacking = {(finding.shard, finding.position) for finding in findings if finding.reason in LACKS}
    if sum(shard.samples for shard in shards) == len(lacking):
        member = "json" if text.startswith("json:") else text
        raise UserError(
            f"shards {' '.join(map(str, paths))}: no samples in them that have both, a picture and a text; "
            f"expected members KEY.jpg (or jpeg, png, webp) and KEY.{member}, the key without a dot"
        )
    entries = [{key: value for key, value in asdict(shard).items() if key != "text"} for shard in shards]
    write_json(out / "index.json", {"version": VERSION, "text": text, "shards": entries})
    used = {shard.table for shard in shards}
    for path in (out / "tables").glob("*.parquet"):
        if path.name not in used:  # of a shard that has changed, or is not named any more
            path.unlink()
    index = ShardIndex.load(out)
    index.findings = findings
    return index


def expand(patterns: Iterable[str]) -> list[str]:
    """The absolute paths and URLs that brace-expanded `patterns` name. Raises UserError for one that is named twice."""
    named = [path for pattern in patterns for path in braces(str(pattern))]
    urls = [path if remote.is_remote(path) else os.path.abspath(path) for path in named]
    twice = next((url for url, times in Counter(urls).items() if times > 1), None)
    if twice:
        raise UserError(f"shard {twice}: named twice; name each shard once")
    return urls
