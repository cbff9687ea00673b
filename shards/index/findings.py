"""What is wrong in shards, as a scan found it."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


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
            yield from findings_of(self.tables / name)

    def by_sample(self) -> Iterator[Finding]:
        """One finding for each sample that cannot be used."""
        for _, found in groupby(self, lambda finding: finding.shard):
            yield from {finding.position: finding for finding in found if finding.unusable}.values()


def findings_of(table: Path) -> list[Finding]:
    """Those of one shard; none where its table is missing or damaged."""
    return [Finding(**finding) for finding in (saved(table) or {"findings": ()})["findings"]]


def saved(table: Path) -> dict | None:
    """{"shard": entry of the index, "findings": [dict]}: what `scan_shard` found when it wrote this table; None where
    there is none, or it is damaged."""
    try:
        about_it = pq.read_metadata(table)
        found = json.loads(about_it.metadata[b"scan"])
        return found if found["shard"]["samples"] == about_it.num_rows else None
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
