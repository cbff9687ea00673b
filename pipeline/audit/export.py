"""A mask in the formats of others. One shard at a time is in memory, and a file is whole or absent.

Of several processes (shards.shares) each reads its share of the shards for "datacomp". The other formats are made of
the mask's own files, by the first process alone: most of the work is writing one file.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.audit.datacomp import datacomp, datacomp_of_shards
from pipeline.audit.files import output
from pipeline.safety.mixture import Mixture
from pipeline.safety.selection import RANGES
from shards.errors import UserError
from shards.order.safe_mask import SavedMask
from shards.shares import Share

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


def export_mask(
    folder: Path | str, form: str, out: Path | str, patterns: Sequence[str | Path] = (), share: Share = Share()
) -> int | None:
    """Write the mask in `folder` to the file `out` in a format of FORMATS; returns the number of its rows, or None
    where another process writes it.

    `patterns`: the shards, which only "datacomp" reads. Raises UserError.
    """
    saved = SavedMask(folder)
    if patterns and form != "datacomp":
        raise UserError(f"--shards: only --format datacomp reads the shards, not {form}; leave it out")
    if patterns:
        return datacomp_of_shards(saved, out, patterns, share)
    return None if share.rank else FORMATS[form](saved, out)


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
    if not math.isfinite(about["threshold"]):
        about["threshold"] = None
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


FORMATS: dict[str, Callable[..., int]] = {
    "parquet": parquet,
    "csv": csv,
    "datacomp": datacomp,
    "cleanlab": cleanlab,
    "keys": keys,
}
