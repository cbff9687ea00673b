"""Findings: what every detector says of every pair, in one table by (shard, position, key)."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.audit.blocks import blocks, order_fractions, places
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import REGISTRY, Finding, chosen, lacking, lowest
from pipeline.audit.export import write_csv
from pipeline.audit.files import output
from pipeline.audit.unfinished import Unfinished

logger = logging.getLogger(__name__)

LEAD = 2  # families of detectors, the worst of which make the combined score
ROW_GROUP = 1 << 17  # rows of findings.parquet that are written at once


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
    for name, finding in found.items():
        if REGISTRY[name].ranks:
            families.setdefault(REGISTRY[name].family or name, []).append(finding.score_N)
    if not families:
        flags_N = np.zeros(len(next(iter(found.values())).score_N), np.uint8)
        for finding in found.values():
            flags_N += finding.issue_N
        fine_N = 1 - flags_N / np.float32(len(found))
        return Finding(fine_N, fine_N < 1)
    product_N = lowest_sum(mean_log_rank(scores) for scores in families.values())
    score_N = order_fractions(product_N)
    del product_N
    unread_N = np.ones(len(score_N), bool)
    for one_N in (one for scores in families.values() for one in scores):
        unread_N &= np.isnan(one_N)
    score_N[unread_N] = np.nan
    return Finding(score_N, lowest(score_N, worst))


def mean_log_rank(scores: list[np.ndarray]) -> np.ndarray:
    """float32 (N,): mean over some scores (N,) of the logarithm of each pair's rank as a fraction of the pairs; of
    equal scores the highest rank, NaN as 1."""
    total_N = np.zeros(len(scores[0]), np.float32)
    for score_N in scores:
        ordered_N = np.nan_to_num(score_N, nan=1.0)
        ordered_N.sort()
        for part in blocks(len(score_N)):
            rank_B = places(ordered_N, np.nan_to_num(score_N[part], nan=1.0), "right") / len(score_N)
            total_N[part] += np.log(rank_B).astype(np.float32)
    total_N /= np.float32(len(scores))
    return total_N


def lowest_sum(values: Iterable[np.ndarray]) -> np.ndarray:
    """float32 (N,): the sum of the LEAD lowest of some values of each pair, one array of which is made at a time."""
    lowest_: list[np.ndarray] = []  # ascending
    for value_N in values:
        for place, low_N in enumerate(lowest_):
            lowest_[place], value_N = np.minimum(low_N, value_N), np.maximum(low_N, value_N)
        lowest_ = [*lowest_, value_N][:LEAD]
    total_N = lowest_[0]
    for low_N in lowest_[1:]:
        total_N += low_N
    return total_N


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


def row_groups(shards: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the tables of shards put together to ROW_GROUP rows or more: a file's footer, which its reader and writer
    hold, grows with its row groups."""
    some: list[pa.Table] = []
    for table in shards:
        some.append(table)
        if sum(map(len, some)) >= ROW_GROUP:
            yield pa.concat_tables(some)
            some = []
    if some:
        yield pa.concat_tables(some)


def write_findings(data: AuditData, found: dict[str, Finding], suspect: Finding, out: Path) -> None:
    """OUT/findings.parquet and OUT/findings.csv; names in the CSV are guarded as in `safeclip mask export`."""
    first = next(tables(data, found, suspect))
    with output(out / "findings.parquet") as file, pq.ParquetWriter(file, first.schema) as writer:
        for table in row_groups(tables(data, found, suspect)):
            writer.write_table(table)
    write_csv(out / "findings.csv", tables(data, found, suspect), first.schema)
