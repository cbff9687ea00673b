"""Findings: what every detector says of every pair, in one table by (shard, position, key)."""

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import rankdata

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, Finding, chosen, lacking, lowest
from pipeline.audit.export import write_csv
from pipeline.audit.files import output
from pipeline.audit.unfinished import Unfinished

logger = logging.getLogger(__name__)

LEAD = 2  # families of detectors, the worst of which make the combined score


def run_detectors(
    data: AuditData, worst: float, names: Sequence[str] | None = None, kept: Unfinished | None = None
) -> tuple[dict[str, Finding], dict[str, dict]]:
    """({name: Finding}, {name: {"seconds" | "skipped"}}) of the detectors that `names` means (detectors.chosen). kept:
    where findings are put, and taken from when the audit was stopped. Raises UserError."""
    found: dict[str, Finding] = {}
    about: dict[str, dict] = {}
    for name in chosen(names):
        why = lacking(REGISTRY[name], data)
        if why:
            about[name] = {"skipped": why}
            logger.info("%-18s skipped: %s", name, why)
            continue
        if there := kept and kept.load(name):
            found[name], about[name] = there
            logger.info("%-18s %s pairs, found before the audit was stopped", name, f"{about[name]['issues']:,}")
            continue
        start = time.monotonic()
        found[name] = REGISTRY[name]().find(data, worst)
        about[name] = {"seconds": round(time.monotonic() - start, 3), "issues": int(found[name].issue_N.sum())}
        if kept:
            kept.save(name, found[name], about[name])
        logger.info("%-18s %s pairs, %.1f s", name, f"{about[name]['issues']:,}", about[name]["seconds"])
    return found, about


def combined(found: dict[str, Finding], worst: float) -> Finding:
    """Finding of all detectors that rank, together, by the rank truncated product (Dudbridge and Koeleman 2003) of the
    LEAD lowest.

    A detector's rank as a fraction of the pairs stands for a p-value; ties take the highest, so where a detector has
    nothing to say it says nothing. Those of a family are averaged first, for they look at the same thing. A pair is
    suspect that is bad in two ways, or very bad in one. The score is the rank of the product as a fraction of the
    pairs. Where no detector ranks, it is the fraction of the detectors that do not flag the pair, and any flag is an
    issue.
    """
    families: dict[str, list[np.ndarray]] = {}
    unread_N = None
    for name, finding in found.items():
        if REGISTRY[name].ranks:
            rank_N = rankdata(np.nan_to_num(finding.score_N, nan=1.0), method="max") / len(finding.score_N)
            families.setdefault(REGISTRY[name].family or name, []).append(np.log(rank_N).astype(np.float32))
            unread_N = np.isnan(finding.score_N) if unread_N is None else unread_N & np.isnan(finding.score_N)
    if not families:
        fine_N = 1 - np.stack([finding.issue_N for finding in found.values()]).mean(0, np.float32)
        return Finding(fine_N, fine_N < 1)
    log_FN = np.sort(np.stack([np.mean(one, 0) for one in families.values()]), 0)
    product_N = log_FN[:LEAD].sum(0)
    score_N = np.empty(len(product_N), np.float32)
    score_N[np.argsort(product_N, kind="stable")] = np.arange(len(product_N)) / len(product_N)
    score_N[unread_N] = np.nan
    return Finding(score_N, lowest(score_N, worst))


def tables(data: AuditData, found: dict[str, Finding], suspect: Finding) -> Iterator[pa.Table]:
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
            "reasons": pa.array(reasons(found, rows), pa.string()),
        }
        for kind, finding in found.items():
            columns[f"is_{kind}_issue"] = pa.array(finding.issue_N[rows])
            columns[f"{kind}_score"] = pa.array(finding.score_N[rows].astype(np.float32), from_pandas=True)
            for more, values in finding.more.items():
                columns[more] = pa.array(values[rows])
        yield pa.table(columns)


def reasons(found: dict[str, Finding], rows: slice) -> list[str]:
    """Of each pair the detectors that flag it, with their scores: "dark: score 0.12; blurry: score 0.20"."""
    lines: list[list[str]] = [[] for _ in range(rows.stop - rows.start)]
    for name, finding in found.items():
        for place in np.flatnonzero(finding.issue_N[rows]).tolist():
            lines[place].append(f"{name}: score {finding.score_N[rows.start + place]:.2f}")
    return ["; ".join(line) for line in lines]


def write_findings(data: AuditData, found: dict[str, Finding], suspect: Finding, out: Path) -> None:
    """OUT/findings.parquet and OUT/findings.csv; names in the CSV are guarded as in `safeclip mask export`."""
    first = next(tables(data, found, suspect))
    with output(out / "findings.parquet") as file, pq.ParquetWriter(file, first.schema) as writer:
        for table in tables(data, found, suspect):
            writer.write_table(table)
    write_csv(out / "findings.csv", tables(data, found, suspect), first.schema)
