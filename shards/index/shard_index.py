"""The index: what each shard holds, and where, so that any sample can be read without its neighbours.

A sample IS (shard, position in shard); its row over all shards is offsets[shard] + position. On disk:
DIR/tables/*.parquet, one for each shard (key, and byte offset, size and CRC-32 of picture and text;
shards/index/scan.py), and DIR/index.json, written last.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ChangedShard, UserError
from shards.index.names import named
from shards.index.scan import MEMBER, PICTURES, Finding, fingerprint_of, saved, scan_shard, table_name
from shards.index.tar import NO_TAR
from shards.progress import progress
from shards.storage import remote
from shards.storage.cache import is_same
from shards.storage.captions import sources
from shards.storage.files import write_bytes, write_json

VERSION = 3
SHOWN = 3  # shards that a message names
MEMBERS = r"[a-z0-9][a-z0-9_.-]*(,[a-z0-9][a-z0-9_.-]*)*"  # names behind the key
OWN_TABLE = re.compile(r"[0-9a-f]{32}\.parquet")  # names of tables; other files in their folder are the user's
KEPT = 24 * 60 * 60  # seconds that a table stays which no index names any more: who has the old one open reads it
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


@contextlib.contextmanager
def turn(out: Path) -> Iterator[None]:
    """Only one process at a time is in the block of the folder `out`; others wait."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    while True:
        with open(path, "ab") as file:
            # Of this process alone: workers that outlive it do not hold the lock, as they would that of flock().
            fcntl.lockf(file, fcntl.LOCK_EX)
            if not is_same(file.fileno(), path):  # who held it has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def remove_old_tables(folder: Path, used: set[str], before: set[str]) -> None:
    """Remove the tables in `folder` that are not in `used` and that no index has named for a while. `before`: tables of
    the index that was just replaced."""
    for path in folder.iterdir():
        if not OWN_TABLE.fullmatch(path.name) or path.name in used:
            continue
        if path.name in before:
            os.utime(path)
        elif time.time() - path.stat().st_mtime > KEPT:
            path.unlink()


def build_index(
    paths: Sequence[str],
    out: str | Path,
    text: str = "txt",
    workers: int | None = None,
    report: str | Path | None = None,
    timeout: float = remote.TIMEOUT,
    allow_pipe: bool = False,
    image: str = "",
) -> ShardIndex:
    """Index tars (`paths`: as shards.index.names; local ones or URLs) into the folder `out`; returns the
    ShardIndex.

    `text` is what a sample's text is: the extension of a member ("txt" for captions, "cls" for labels), or
    "json:FIELD", a field of its .json member (captions.json_texts); `image` what its picture is, "" for any of
    scan.PICTURES. Both may be names behind the key, joined by commas ("input.png,png"), of which the first that a
    sample has is read. Sources of text joined by + each give captions of the sample.

    One pass over each shard, shards in parallel; a shard that `out` holds already and that has not changed is not read
    again (scan.scan_shard). A sample without picture or text keeps its position. Raises UserError naming the first
    damaged shard; with `report`, a file, all that was found is listed there and what is intact is indexed.

    Another process that indexes into `out` is waited for.
    """
    if not str(out):
        raise UserError("--out: got an empty path, expected a folder for the index")
    if not all(re.fullmatch(f"{MEMBERS}|json:.+", part) for part in text.split("+")):
        raise UserError(
            f"--text: got {text!r}, expected names of members behind the key, in lower case and joined by commas "
            "(txt, cls, outputs.txt), or json:FIELD; several of these joined by + are captions of one picture"
        )
    of_text = {name for source in sources(text) for name in source.members}
    if not re.fullmatch(f"({MEMBERS})?", image) or of_text.intersection(image.split(",")):
        raise UserError(
            f"--image: got {image!r}, expected other names of members behind the key than those of --text, in lower "
            "case and joined by commas (input.png)"
        )
    urls = expand(paths)
    with turn(Path(out)):
        return scan_all(urls, paths, Path(out), text, workers, report, timeout, allow_pipe, image)


def scan_all(
    urls: list[str],
    paths: Sequence[str],
    out: Path,
    text: str,
    workers: int | None,
    report: str | Path | None,
    timeout: float,
    allow_pipe: bool,
    image: str,
) -> ShardIndex:
    """`build_index` of the shards `urls`, which `paths` name, while nobody else writes to `out`."""
    shards, findings = [], []
    scan = partial(scan_shard, text=text, image=image, tables=out / "tables", timeout=timeout, allow_pipe=allow_pipe)
    workers = min(workers or os.cpu_count(), len(urls))
    with ProcessPoolExecutor(workers) if workers > 1 else ThreadPoolExecutor(1) as pool:
        for entry, found in progress(pool.map(scan, urls), len(urls), "shards indexed"):
            shards.append(Shard(**entry, text=text, image=image))
            findings += found
    if report:
        write_bytes(report, "".join(json.dumps(asdict(finding)) + "\n" for finding in findings).encode())
    damage = [finding for finding in findings if finding.damage]
    if damage and not report:
        others = f" (and {len(damage) - 1} more of the kind)" if len(damage) > 1 else ""
        where, mend = f", at byte {damage[0].byte}", "fetch or write it again, "
        if damage[0].reason.startswith(NO_TAR):  # it says itself how to mend it
            where = mend = ""
        raise UserError(
            f"shard {damage[0].shard}: {damage[0].reason}{where}{others}; "
            f"{mend}leave it out, or let --report FILE list all damage and index what is intact"
        )
    unusable = {(finding.shard, finding.position): finding for finding in findings if finding.unusable}
    if sum(shard.samples for shard in shards) == len(unusable):
        kinds = Counter(finding.kind for finding in unusable.values())
        most = next((finding for finding in unusable.values() if finding.kind == kinds.most_common(1)[0][0]), None)
        why = f" (most often, {kinds[most.kind]:,} times: sample {most.key!r}: {most.reason})" if most else ""
        picture = image or ",".join(PICTURES)
        caption = ",".join(dict.fromkeys(name for source in sources(text) for name in source.members))
        raise UserError(
            f"shards {' '.join(map(str, paths[:SHOWN]))}{' ...' if len(paths) > SHOWN else ''}: none of "
            f"{len(unusable):,} samples in them has both, a picture and a usable text{why}; expected "
            f"members KEY.({picture.replace(',', '|')}) and KEY.({caption.replace(',', '|')}), the key without a dot"
        )
    entries = [{key: value for key, value in asdict(shard).items() if key not in ("text", "image")} for shard in shards]
    before: set[str] = set()
    with contextlib.suppress(UserError):
        before = {Path(shard.table).name for shard in ShardIndex.load(out).shards}
    write_json(out / "index.json", {"version": VERSION, "text": text, "image": image, "shards": entries})
    remove_old_tables(out / "tables", {shard.table for shard in shards}, before)
    index = ShardIndex.load(out)
    index.findings = findings
    return index


def expand(patterns: Iterable[str]) -> list[str]:
    """The absolute paths and URLs that `patterns` name. Raises UserError for one that is named twice."""
    urls = [path if remote.is_remote(path) else os.path.abspath(path) for path in named(patterns)]
    twice = next((url for url, times in Counter(urls).items() if times > 1), None)
    if twice:
        raise UserError(f"shard {twice}: named twice; name each shard once")
    return urls
