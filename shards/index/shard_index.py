"""The index: what each shard holds, and where, so that any sample can be read without its neighbours.

A sample IS (shard, position in shard); its row over all shards is offsets[shard] + position. On disk:
DIR/tables/*.parquet, one for each shard (key, and byte offset, size and CRC-32 of picture and text;
shards/index/scan.py), and DIR/index.json, written last.
"""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.index.names import named
from shards.index.scan import PICTURES, Finding, fingerprint_of, saved, scan_shard, table_name
from shards.index.tar import NO_TAR
from shards.progress import progress
from shards.storage import remote
from shards.storage.files import write_bytes, write_json

VERSION = 3
SHOWN = 3  # shards that a message names
MEMBERS = r"[a-z0-9][a-z0-9_.-]*(,[a-z0-9][a-z0-9_.-]*)*"  # names behind the key
REMOTE_TRIED = 32  # shards behind URLs of which `verify` asks the size


@dataclass(frozen=True)
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

    @cached_property
    def remote(self) -> bool:
        """Whether it lies behind a URL."""
        return remote.is_remote(self.path)


@dataclass(frozen=True)
class ShardTable:
    """The samples of one shard, in order: names, int64 (N,) byte offsets and sizes (MISSING = has none), and uint32
    (N,) CRC-32 of the content."""

    keys: list[str]
    image_offset: np.ndarray
    image_size: np.ndarray
    image_crc: np.ndarray
    text_offset: np.ndarray
    text_size: np.ndarray
    text_crc: np.ndarray


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
        names = (s.fingerprint + (s.text if re.search("[:,.]", s.text) else "") + s.image for s in shards)
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
        """ShardTable of shard number `shard`; the last few are kept in memory."""
        return read_table(self.shards[shard].table)

    def verify(self, timeout: float = remote.TIMEOUT) -> None:
        """Raise UserError if a shard is missing or does not hold what was indexed.

        Size and time of change of local shards are compared. Where only the time differs the shard is read, and its
        fingerprint decides; the result is kept beside the index if that can be written. Of shards behind URLs the sizes
        of some are compared, from all over the index.
        """
        local = [shard for shard in self.shards if not shard.remote]
        far = [shard for shard in self.shards if shard.remote and not shard.path.startswith("pipe:")]
        tried = far[:: -(-len(far) // REMOTE_TRIED) or 1]
        with ThreadPoolExecutor(8) as pool:
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


@lru_cache(maxsize=64)
def read_table(path: str) -> ShardTable:
    columns = pq.read_table(path)
    return ShardTable(
        columns["key"].to_pylist(),
        *(columns[f"{kind}_{part}"].to_numpy() for kind in ("image", "text") for part in ("offset", "size", "crc")),
    )


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
    "json:FIELD", a field of its .json member; `image` what its picture is, "" for any of scan.PICTURES. Both may be
    names behind the key, joined by commas ("input.png,png"), of which the first that a sample has is read.

    One pass over each shard, shards in parallel; a shard that `out` holds already and that has not changed is not read
    again (scan.scan_shard). A sample without picture or text keeps its position. Raises UserError naming the first
    damaged shard; with `report`, a file, all that was found is listed there and what is intact is indexed.
    """
    if not re.fullmatch(f"{MEMBERS}|json:.+", text):
        raise UserError(
            f"--text: got {text!r}, expected names of members behind the key, in lower case and joined by commas "
            "(txt, cls, outputs.txt), or json:FIELD"
        )
    if not re.fullmatch(f"({MEMBERS})?", image) or set(image.split(",")) & set(text.split(",")):
        raise UserError(
            f"--image: got {image!r}, expected other names of members behind the key than those of --text, in lower "
            "case and joined by commas (input.png)"
        )
    out, shards, findings = Path(out), [], []
    urls = expand(paths)
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
        picture, caption = image or ",".join(PICTURES), "json" if text.startswith("json:") else text
        raise UserError(
            f"shards {' '.join(map(str, paths[:SHOWN]))}{' ...' if len(paths) > SHOWN else ''}: none of "
            f"{len(unusable):,} samples in them has both, a picture and a usable text{why}; expected "
            f"members KEY.({picture.replace(',', '|')}) and KEY.({caption.replace(',', '|')}), the key without a dot"
        )
    entries = [{key: value for key, value in asdict(shard).items() if key not in ("text", "image")} for shard in shards]
    write_json(out / "index.json", {"version": VERSION, "text": text, "image": image, "shards": entries})
    used = {shard.table for shard in shards}
    for path in (out / "tables").glob("*.parquet"):
        if path.name not in used:  # of a shard that has changed, or is not named any more
            path.unlink()
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
