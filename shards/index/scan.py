"""One pass over one shard: where the parts of its samples stand, the fingerprint of its content, and what is wrong with
it."""

import hashlib
import io
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import BadSample, UserError
from shards.index import tar
from shards.storage import remote
from shards.storage.captions import MAX_TEXT, Source, read_caption, sources, usable
from shards.storage.files import write_bytes

FORM = 3  # of the tables; another one makes all of them anew
PICTURES = ("jpg", "jpeg", "png", "webp")
SHOWN = 3  # members that a reason names
MISSING = -1  # size of a member that the sample does not have
MEMBER = {"offset": pa.int64(), "size": pa.int64(), "crc": pa.uint32()}  # crc: CRC-32 of the content


@dataclass(frozen=True)
class Finding:
    """Something wrong in a shard, at a byte; position and key of the sample where it is one. `damage`: it stops an
    index that has no report; `unusable`: the sample cannot be trained on."""

    shard: str
    byte: int
    position: int | None
    key: str | None
    reason: str
    damage: bool
    unusable: bool = False

    @property
    def kind(self) -> str:
        """The reason without its names and numbers, to be counted."""
        return re.sub(r"'.*'|(?<!UTF-)\b[0-9]+\b|[^ ]+\.parquet", "...", self.reason)


@dataclass(frozen=True)
class Findings:
    """All findings in the shards of an index, in order; read from their tables when they are asked for, for they may be
    too many to hold. counts: of each table that has some."""

    tables: Path
    counts: Mapping[str, int]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[Finding]:
        for name in self.counts:
            yield from (Finding(**finding) for finding in (saved(self.tables / name) or {"findings": ()})["findings"])

    def by_sample(self) -> Iterator[Finding]:
        """One finding for each sample that cannot be used."""
        for _, found in groupby(self, lambda finding: finding.shard):
            yield from {finding.position: finding for finding in found if finding.unusable}.values()


def scan_shard(
    path: str, text: str, image: str, tables: Path, timeout: float, allow_pipe: bool
) -> tuple[dict, list[Finding]]:
    """({"path", "size", "samples", "fingerprint", "table"}, [Finding]) of one tar, its table being in the folder
    `tables`.

    The table's name is made from the shard's path, size, time of change (behind a URL: its ETag, or what the server has
    instead), `text` and `image`: where it is there already the shard is not read. A shard without any such mark is
    always read. Raises UserError.
    """
    size, stamp = about(path, timeout)
    if stamp is not None:
        name = table_name(path, size, stamp, text, image)
        found = saved(tables / name)
        if found:
            return {**found["shard"], "table": name}, [Finding(**finding) for finding in found["findings"]]
    with remote.open_shard(path, size, timeout, allow_pipe) as file:
        stream = tar.Stream(file)
        rows, findings = read_samples(path, stream, size, text, image)
        while stream.read(1 << 20):  # what follows the end belongs to the fingerprint, not to the archive
            pass
    findings += lost_downloads(path, {row["key"] for row in rows})
    entry: dict = {"path": path, "size": stream.position, "samples": len(rows), "fingerprint": stream.fingerprint()}
    if stamp is None:
        name = table_name(path, size, entry["fingerprint"], text, image)
    for row in rows:
        row["key"] = tar.key_text(row["key"])
    about_it = {"scan": json.dumps({"shard": entry, "findings": [asdict(finding) for finding in findings]})}
    sink = io.BytesIO()
    kinds = ["image", *texts_of(text)]
    schema = [("key", pa.string())] + [(f"{kind}_{part}", MEMBER[part]) for kind in kinds for part in MEMBER]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema, metadata=about_it)), sink)
    write_bytes(tables / name, sink.getvalue())
    return {**entry, "table": name}, findings


def about(path: str, timeout: float) -> tuple[int | None, str | int | None]:
    """(bytes, mark that changes with the content), None where it is not known. Raises UserError where there is no such
    shard."""
    if remote.is_remote(path):
        return remote.about(path, timeout)
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            open(path, "rb").close()
    except OSError as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise UserError(f"shard {path}: {what} ({error.strerror}); check the path") from None
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"shard {path}: a folder; name the shards in it, such as '{path}/{{00000..00009}}.tar'")
    if not stat.S_ISREG(found.st_mode):  # a pipe that nobody writes to is waited for without end
        raise UserError(f"shard {path}: no regular file (a pipe, socket or device); name a tar")
    return found.st_size, found.st_mtime_ns


def table_name(*parts: str | int | None) -> str:
    name = json.dumps([FORM, *parts]).encode()
    return f"{hashlib.blake2b(name, digest_size=16).hexdigest()}.parquet"


def saved(path: Path) -> dict | None:
    """What `scan_shard` found when it wrote this table; None where there is none, or it is damaged."""
    try:
        about_it = pq.read_metadata(path)
        found = json.loads(about_it.metadata[b"scan"])
        return found if found["shard"]["samples"] == about_it.num_rows else None
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def read_samples(
    path: str, stream: tar.Stream, size: int | None, text: str, image: str
) -> tuple[list[dict], list[Finding]]:
    """(rows, [Finding]): the samples of a tar in order, as the columns of a table. A new key begins a new sample."""
    texts = texts_of(text)
    names = {"image": tuple(image.split(",")) if image else PICTURES}
    names |= {kind: source.members for kind, source in texts.items()}
    said = {kind: "caption" if kind in texts else "picture" for kind in names}
    kinds_of: dict[str, list[str]] = {}
    for kind in names:
        for name in names[kind]:
            kinds_of.setdefault(name, []).append(kind)
    rows: list[dict] = []
    findings: list[Finding] = []
    seen: set[str] = set()
    taken: dict[str, int] = {}  # by kind: rank of the member of the last sample
    wrong: dict[tuple[int, str], tuple[int, str]] = {}  # by position and kind: byte, and why it cannot be used
    dotted: dict[tuple[int, str], tar.Member] = {}  # by position and picture or caption
    others: dict[str, list[str]] = {}  # by key: members that are not read, and why

    def find(
        byte: int, key: str | None, reason: str, damage: bool, position: int | None = None, unusable: bool = False
    ) -> None:
        findings.append(Finding(path, byte, position, key and tar.key_text(key), reason, damage, unusable))

    def damaged(byte: int, name: str | None, what: str) -> None:
        find(byte, tar.sample_of(name)[0] if name else None, what, True)

    def skipped(byte: int, name: str, what: str) -> None:
        key, _ = tar.sample_of(name)
        if key is not None:
            others.setdefault(key, []).append(f"{name!r} is {what}")

    for member in tar.members(stream, size, damaged, skipped):
        key, extension = tar.sample_of(member.name)
        if key is None:
            continue
        if not rows or key != rows[-1]["key"]:
            if key in seen:
                reason = f"key {key!r} comes twice (the members of a sample must stand together: tar --sort=name)"
                find(member.offset, key, reason, True, len(rows))
            seen.add(key)
            absent = {"offset": 0, "size": MISSING, "crc": 0}
            taken = {}
            rows.append({"key": key} | {f"{kind}_{part}": absent[part] for kind in names for part in MEMBER})
        row, position, kinds = rows[-1], len(rows) - 1, []
        if extension not in kinds_of:
            last = kinds_of.get(extension.rpartition(".")[2])
            if last and "." in extension:
                dotted.setdefault((position, said[last[0]]), member)
            others.setdefault(key, []).append(f"{member.name!r} is not read")
            continue
        for kind in kinds_of[extension]:
            # Of two members the one that is named first is read; without names two pictures are a mistake.
            rank = names[kind].index(extension) if image or kind in texts else 0
            if rank < taken.get(kind, len(names[kind])):
                taken[kind] = rank
                kinds.append(kind)
            elif rank == taken[kind]:
                what = "text" if kind in texts else "image"
                find(member.offset, key, f"sample {key!r} has two {what} members", True, position)
        if not kinds:
            continue
        data = stream.read(min(member.length, MAX_TEXT + 1)) if texts.keys() & kinds else b""
        crc = checksum(stream, data, member.length)
        for kind in kinds:
            row |= {f"{kind}_offset": member.offset, f"{kind}_size": member.length, f"{kind}_crc": crc}
            wrong.pop((position, kind), None)
            try:
                if not member.length:
                    raise BadSample(f"empty {said[kind]}")
                if kind in texts:
                    usable(texts[kind].texts(data), read_caption)
            except BadSample as error:
                wrong[position, kind] = member.offset, str(error)
    for position, row in enumerate(rows):
        for what, kinds in (("picture", ["image"]), ("caption", list(texts))):
            there = [kind for kind in kinds if row[f"{kind}_size"] != MISSING]
            faults = [wrong[position, kind] for kind in there if (position, kind) in wrong]
            if len(faults) < len(there):
                continue
            if faults:
                byte, reason = faults[0]
                find(byte, row["key"], reason, False, position, True)
                continue
            other = dotted.get((position, what))
            if other:
                reason = (
                    f"sample {row['key']!r} has no {what}, but a member {other.name!r}: "
                    "a key ends at the first dot of the base name (--image and --text name what stands behind it)"
                )
                find(other.offset, row["key"], reason, True, position, True)
            else:
                reason = f"no {what}"
                if row["key"] in others:
                    expected = dict.fromkeys(name for kind in kinds for name in names[kind])
                    reason = "; ".join([reason, *others[row["key"]][:SHOWN], f"expected KEY.{', '.join(expected)}"])
                find(max(row[f"{kind}_offset"] for kind in names), row["key"], reason, False, position, True)
    return rows, findings


def texts_of(text: str) -> dict[str, Source]:
    """The sources that `--text` names, by the name of their columns in a table: text, text1, text2, ..."""
    return {f"text{number or ''}": source for number, source in enumerate(sources(text))}


def checksum(stream: tar.Stream, data: bytes, length: int) -> int:
    """CRC-32 of a member of `length` bytes, the first of which were read from the stream as `data`."""
    crc, left = zlib.crc32(data), length - len(data)
    while left and (block := stream.read(min(left, 1 << 20))):
        crc, left = zlib.crc32(block, crc), left - len(block)
    return crc


def fingerprint_of(path: str, size: int | None, timeout: float, allow_pipe: bool = False) -> str:
    """Fingerprint of all bytes of a shard. Raises UserError."""
    with remote.open_shard(path, size, timeout, allow_pipe) as file:
        stream = tar.Stream(file)
        stream.skip_to(sys.maxsize)
        return stream.fingerprint()


def lost_downloads(path: str, keys: set[str]) -> list[Finding]:
    """[Finding]: samples that img2dataset's table beside a local shard calls a success and that are not in it."""
    beside = os.path.splitext(path)[0] + ".parquet"
    if remote.is_remote(path) or not os.path.exists(beside):
        return []
    try:
        table = pq.read_table(beside, columns=["key", "status"])
        done = [row["key"] for row in table.to_pylist() if row["status"] == "success"]
    except (OSError, pa.ArrowException, KeyError):  # some other table
        return []
    reason = f"lost: {os.path.basename(beside)} says that it was downloaded, and it is not in the shard"
    return [Finding(path, os.path.getsize(path), None, key, reason, False) for key in done if key not in keys]
