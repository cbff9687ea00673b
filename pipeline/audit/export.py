"""A mask in the formats of others. One shard at a time is in memory, and a file is whole or absent."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.audit.files import find_shards, members, output
from pipeline.safety.mixture import Mixture
from pipeline.safety.selection import RANGES
from shards.errors import UserError
from shards.order.safe_mask import SavedMask

MAX_JSON = 1 << 20  # bytes of a .json member; more is not read
COLUMNS = pa.schema(
    [
        ("shard", pa.string()),
        ("position", pa.int64()),
        ("key", pa.string()),
        ("cosine", pa.float32()),
        ("posterior", pa.float64()),
        ("safe", pa.bool_()),
        ("score", pa.float32()),
    ]
)


def export_mask(folder: Path | str, form: str, out: Path | str, patterns: Sequence[str | Path] = ()) -> int:
    """Write the mask in `folder` to the file `out` in a format of FORMATS; returns the number of its rows.

    `patterns`: the shards, which only "datacomp" reads. Raises UserError.
    """
    saved = SavedMask(folder)
    if patterns and form != "datacomp":
        raise UserError(f"--shards: only --format datacomp reads the shards, not {form}; leave it out")
    if form == "datacomp":
        return datacomp(saved, out, patterns)
    return FORMATS[form](saved, out)


def rows(saved: SavedMask) -> Iterator[pa.Table]:
    """Yield a Table of COLUMNS for each shard. cosine, score and posterior are null where a pair could not be read.

    The score is what the pairs are ranked by: the cosine, or the rank of a filter. It and the posterior are null also
    where a guard excluded a pair. The posterior is that of the higher component, which is not monotone in the score.
    """
    mixture = Mixture.from_dict(saved.meta["mixture"]) if saved.meta["mixture"] else None
    for number, shard in enumerate(saved.shards):
        table = saved.table(number, ("key", "cosine", "score"))
        cos_N, score_N = table["cosine"].to_numpy(), table["score"].to_numpy()
        posterior_N = mixture.posterior(score_N) if mixture else np.full(len(cos_N), np.nan)
        columns = [
            pa.array([shard["name"]] * len(cos_N), pa.string()),
            np.arange(len(cos_N)),
            table["key"],
            pa.array(cos_N, from_pandas=True),  # NaN becomes null
            pa.array(posterior_N, from_pandas=True),
            saved.mask.shard_flags(number),
            pa.array(score_N, from_pandas=True),
        ]
        yield pa.table(columns, COLUMNS)


def parquet(
    saved: SavedMask, out: Path | str, tables: Iterable[pa.Table] | None = None, schema: pa.Schema = COLUMNS
) -> int:
    """All pairs, typed; the file's metadata says of which mask they are."""
    about = {key: saved.meta[key] for key in ("fingerprint", "epoch", "step", "threshold", "fraction", "config")}
    written = 0
    with output(out) as file:
        with pq.ParquetWriter(file, schema.with_metadata({"safeclip_mask": json.dumps(about)})) as writer:
            for table in rows(saved) if tables is None else tables:
                writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
                written += len(table)
    return written


def cleanlab(saved: SavedMask, out: Path | str) -> int:
    """Parquet with the columns of a cleanlab issue type: is_poison_issue, and poison_score in [0, 1], lower = worse.

    poison_score is the score's place in its range (of a cosine (1 + cosine) / 2): it orders the pairs as the threshold
    does, which the posterior would not. A pair without a score, which could not be read or was excluded by a guard, is
    an issue with score 0. Convention: cleanlab's Datalab, docs.cleanlab.ai (issue types).
    """
    low, high = RANGES[saved.meta.get("score", "cosine")]
    fields = [("is_poison_issue", pa.bool_()), ("poison_score", pa.float64())]
    schema = pa.schema(fields + [(name, COLUMNS.field(name).type) for name in ("shard", "position", "key")])

    def tables() -> Iterator[pa.Table]:
        for table in rows(saved):
            score_N = np.clip((table["score"].to_numpy().astype(np.float64) - low) / (high - low), 0, 1)
            columns = [pc.invert(table["safe"]), np.nan_to_num(score_N, nan=0.0)]
            yield pa.table(columns + [table[name] for name in ("shard", "position", "key")], schema)

    return parquet(saved, out, tables(), schema)


def csv(saved: SavedMask, out: Path | str) -> int:
    """All pairs as CSV; see `write_csv` for the names in it."""
    return write_csv(out, rows(saved), COLUMNS)


def write_csv(out: Path | str, tables: Iterable[pa.Table], schema: pa.Schema) -> int:
    """Write Tables as CSV (RFC 4180, UTF-8), strings quoted, null as nothing; returns the number of rows.

    A spreadsheet runs what begins with = + - @ or a control character, quoted or not. Such a name gets an apostrophe
    before it, and so does a name that begins with an apostrophe: taking one leading apostrophe off gives every name
    back.
    """
    written = 0
    with output(out) as file, pa.csv.CSVWriter(file, schema) as writer:
        for table in tables:
            for place, field in enumerate(schema):
                if field.type == pa.string():
                    table = table.set_column(place, field, guarded(table[field.name]))
            writer.write_table(table)
            written += len(table)
    return written


def guarded(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Arrow strings with an apostrophe before each that a spreadsheet might run (also the full-width signs), or that
    has one."""
    live = pc.match_substring_regex(names, r"^['=+\-@＝＋－＠\x00-\x1f]")
    return pc.if_else(live, pc.binary_join_element_wise("'", names, ""), names)


def keys(saved: SavedMask, out: Path | str) -> int:
    """The safe pairs, a line each: shard, TAB, key, for keys may repeat in another shard. Backslash, TAB and line ends
    in a name are written \\\\, \\t, \\n and \\r."""
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    written = 0
    with output(out) as file:
        for table in rows(saved):
            safe = table.filter(table["safe"])
            for shard, key in zip(safe["shard"].to_pylist(), safe["key"].to_pylist()):
                file.write(f"{shard.translate(escapes)}\t{key.translate(escapes)}\n".encode())
            written += len(safe)
    return written


def datacomp(saved: SavedMask, out: Path | str, patterns: Sequence[str | Path]) -> int:
    """DataComp's subset file: a sorted .npy of dtype "u8,u8" with the two halves of the safe pairs' 128-bit uids, each
    once.

    The uid stands in the sample's .json member, for which the shards in `patterns` are read, or the key is one (32 hex
    digits). A uid that a risky pair has too is left out, for DataComp's resharder would take both. 16 bytes a pair are
    in memory. Format: resharder.py and README of github.com/mlfoundations/datacomp. Raises UserError.
    """
    if patterns:
        paths = find_shards(saved, patterns)
        lacking = next(
            (s["name"] for n, s in enumerate(saved.shards) if saved.mask.counts_S[n] and n not in paths), None
        )
        if lacking:
            raise UserError(f"--shards: lacks {lacking}; a subset file is of all shards of the mask, name them all")
        jobs = [
            (str(p), saved.shards[n]["fingerprint"], saved.table(n, ("key",))["key"].to_pylist())
            for n, p in paths.items()
        ]
        with ProcessPoolExecutor(min(os.cpu_count(), len(jobs))) as pool:
            uids_S = dict(zip(paths, pool.map(read_uids, *zip(*jobs))))
    else:
        found = ((n, saved.table(n, ("key",))["key"].to_pylist()) for n in range(len(saved.shards)))
        uids_S = {n: as_array([uid_of_key(key) for key in names]) for n, names in found}
    safe, risky = [np.zeros(0, "S16")], [np.zeros(0, "S16")]
    for number, (uid_N, there_N) in uids_S.items():
        safe_N = saved.mask.shard_flags(number)
        without = np.flatnonzero(safe_N & ~there_N)
        if len(without):
            key = saved.table(number, ("key",))["key"][int(without[0])].as_py()
            mend = "such shards have no subset file" if patterns else "if the .json members have a uid, add --shards"
            raise UserError(
                f"--format datacomp: sample {key!r} of shard {saved.shards[number]['name']} has no uid, "
                f'expected 32 hex digits as "uid" in its .json member or as its key; {mend}'
            )
        safe.append(uid_N[safe_N])
        risky.append(uid_N[~safe_N & there_N])
    uids = np.setdiff1d(np.concatenate(safe), np.concatenate(risky))  # sorted, each once
    halves = np.frombuffer(uids.tobytes(), ">u8").reshape(-1, 2)
    subset = np.empty(len(halves), np.dtype("u8,u8"))
    subset["f0"], subset["f1"] = halves.T
    with output(out) as file:
        np.save(file, subset, allow_pickle=False)
    return len(subset)


def read_uids(path: Path | str, fingerprint: str, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`as_array` of one shard's uids, from the .json members, or else the keys `names`. Raises UserError."""
    uids = [uid_of_key(key) for key in names]
    found = members(path, fingerprint)
    with open(path, "rb") as file:
        for member in found:
            if member.extension == "json" and member.length <= MAX_JSON:
                file.seek(member.offset)
                try:
                    uid = json.loads(file.read(member.length))["uid"]
                    if re.fullmatch("[0-9a-fA-F]{1,32}", uid):
                        uids[member.position] = bytes.fromhex(uid.zfill(32))
                except (ValueError, KeyError, TypeError, RecursionError):
                    pass  # no uid in there
    return as_array(uids)


def uid_of_key(key: str) -> bytes | None:
    """16 bytes of a key that is a uid, or None."""
    base = key.rpartition("/")[2]
    return bytes.fromhex(base) if re.fullmatch("[0-9a-fA-F]{32}", base) else None


def as_array(uids: list[bytes | None]) -> tuple[np.ndarray, np.ndarray]:
    """(S16 (N,) uids in the order of their numbers, bool (N,) whether there is one) of a list of 16 bytes or None."""
    return np.array([uid or b"" for uid in uids], "S16"), np.array([uid is not None for uid in uids], bool)


FORMATS: dict[str, Callable[..., int]] = {
    "parquet": parquet,
    "csv": csv,
    "datacomp": datacomp,
    "cleanlab": cleanlab,
    "keys": keys,
}
