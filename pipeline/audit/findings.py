"""Findings: what every detector says of every pair, in one table by (shard, position, key)."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import rankdata

from pipeline.audit.detectors import REGISTRY, Finding, lacking, lowest
from pipeline.audit.export import write_csv
from pipeline.audit.files import output
from shards.errors import UserError


def run_detectors(data, worst, names=None, say=print):
    """({name: Finding}, {name: {"seconds" | "skipped"}}) of all detectors in the registry, or of those named. Raises UserError."""
    unknown = next((name for name in names or () if name not in REGISTRY), None)
    if unknown:
        raise UserError(f"--detectors: got {unknown!r}, expected some of {', '.join(REGISTRY)}")
    found, about = {}, {}
    for name in names or REGISTRY:
        why = lacking(REGISTRY[name], data)
        if why:
            about[name] = {"skipped": why}
            say(f"  {name:18s} skipped: {why}")
            continue
        start = time.monotonic()
        found[name] = REGISTRY[name]().find(data, worst)
        about[name] = {"seconds": round(time.monotonic() - start, 3), "issues": int(found[name].issue_N.sum())}
        say(f"  {name:18s} {about[name]['issues']:,} pairs, {about[name]['seconds']:.1f} s")
    return found, about


def combined(found, worst):
    """Finding of all detectors that rank, together: for each pair the lowest of its ranks (Tippett 1931), as a share of the pairs.

    A pair that one detector puts at the very end is suspect, whatever the others say: they look for different things. Only ranks of
    flagged pairs can lead; ties share their mean rank.
    """
    ranks = [name for name in found if REGISTRY[name].ranks]
    if not ranks:
        return next(iter(found.values()))
    count = len(found[ranks[0]].score_N)
    best_N, mean_N = np.ones(count), np.zeros(count)
    for name in ranks:
        rank_N = rankdata(np.nan_to_num(found[name].score_N, nan=1.0)) / count
        best_N = np.minimum(best_N, np.where(found[name].issue_N, rank_N, 0.5 + rank_N / 2))
        mean_N += np.log(rank_N) / len(ranks)
    order = np.lexsort((mean_N, best_N))
    score_N = np.empty(count, np.float32)
    score_N[order] = np.arange(count) / count
    broken_N = np.isnan(next(iter(found[name] for name in ranks)).score_N)
    score_N[broken_N] = np.nan
    return Finding(score_N, lowest(score_N, worst))


def tables(data, found, suspect):
    """Yield a Table of all columns for each shard."""
    for shard, name in enumerate(data.saved.shards):
        rows = slice(int(data.offsets[shard]), int(data.offsets[shard + 1]))
        count = int(data.counts_S[shard])
        columns = {
            "shard": pa.array([name["name"]] * count, pa.string()),
            "position": pa.array(np.arange(count)),
            "key": data.saved.table(shard, ("key",))["key"],
            "cosine": pa.array(data.cos_N[rows], from_pandas=True),
            "is_suspect_issue": pa.array(suspect.issue_N[rows]),
            "suspect_score": pa.array(suspect.score_N[rows], from_pandas=True),
        }
        for kind, finding in found.items():
            columns[f"is_{kind}_issue"] = pa.array(finding.issue_N[rows])
            columns[f"{kind}_score"] = pa.array(finding.score_N[rows].astype(np.float32), from_pandas=True)
            for more, values in finding.more.items():
                columns[more] = pa.array(values[rows])
        yield pa.table(columns)


def write_findings(data, found, suspect, out):
    """OUT/findings.parquet and OUT/findings.csv; names in the CSV are guarded as in `safeclip mask export`."""
    first = next(tables(data, found, suspect))
    with output(out / "findings.parquet") as file, pq.ParquetWriter(file, first.schema) as writer:
        for table in tables(data, found, suspect):
            writer.write_table(table)
    write_csv(out / "findings.csv", tables(data, found, suspect), first.schema)
