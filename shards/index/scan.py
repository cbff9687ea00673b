"""One pass over one shard: where the parts of its samples stand, the fingerprint of its content, and what is wrong with
it."""

import hashlib
import io
import json
import os
import stat
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError
from shards.index import tar
from shards.index.findings import Finding, saved
from shards.index.tar_samples import MEMBER, TarSamples
from shards.storage import remote
from shards.storage.files import write_bytes

FORM = 3  # of the tables; another one makes all of them anew


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
        samples = TarSamples(path, text, image)
        samples.read(stream, size)
        while stream.read(1 << 20):  # what follows the end belongs to the fingerprint, not to the archive
            pass
    rows, findings = samples.rows, samples.findings + lost_downloads(path, samples.seen)
    entry: dict = {"path": path, "size": stream.position, "samples": len(rows), "fingerprint": stream.fingerprint()}
    if stamp is None:
        name = table_name(path, size, entry["fingerprint"], text, image)
    for row in rows:
        row["key"] = tar.key_text(row["key"])
    about_it = {"scan": json.dumps({"shard": entry, "findings": [asdict(finding) for finding in findings]})}
    sink = io.BytesIO()
    schema = [("key", pa.string())] + [(f"{kind}_{part}", MEMBER[part]) for kind in samples.names for part in MEMBER]
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
