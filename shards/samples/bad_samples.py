"""RUN/bad_samples/: one line for each sample that cannot be used and each reason, without repetitions.

Samples are shared out over PARTS files by their shard, whatever the number of processes; each process writes some of
the files and knows their lines only.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.storage.files import write_bytes

PARTS = 64  # files
SHOWN = 8  # reasons of a summary

Bad = tuple[int, int, str, str]  # shard, position, key, reason


def part_of(shard: int) -> int:
    """Number of the file that has the samples of a shard."""
    return shard % PARTS


class BadSamplesFiles:
    """FOLDER/00.jsonl ...: {"shard", "position", "key", "reason"} a line. Made when the first sample is recorded."""

    def __init__(self, folder: str | Path, parts: Iterable[int] = range(PARTS)):
        """`parts`: those that this process writes; no other process may."""
        self.folder = Path(folder)
        self.seen: dict[int, set[tuple[int, int, str]]] = {part: set() for part in parts}
        for part, seen in self.seen.items():
            path = self.path(part)
            if path.exists():
                lines = path.read_bytes().splitlines(keepends=True)
                whole = [line for line in lines if line.endswith(b"\n")]  # the last may be incomplete after a failure
                if len(whole) != len(lines):
                    write_bytes(path, b"".join(whole))
                seen.update((row["shard"], row["position"], row["reason"]) for row in map(json.loads, whole))

    def path(self, part: int) -> Path:
        return self.folder / f"{part:02d}.jsonl"

    def add(self, bad: Iterable[Bad]) -> int:
        """Record samples of this process's parts; returns how many are new."""
        new: dict[int, list[str]] = {}
        for shard, position, key, reason in sorted(set(bad)):
            seen = self.seen[part_of(shard)]
            if (shard, position, reason) not in seen:
                seen.add((shard, position, reason))
                line = json.dumps({"shard": shard, "position": position, "key": key, "reason": reason})
                new.setdefault(part_of(shard), []).append(f"{line}\n")
        for part, lines in new.items():
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path(part), "a") as file:
                file.writelines(lines)
        return sum(map(len, new.values()))

    def reasons(self) -> Counter[str]:
        """How often each reason comes in this process's parts; those that differ only in their numbers are one."""
        return Counter(re.sub(r"(?<![-\w])\d+", "N", reason) for seen in self.seen.values() for _, _, reason in seen)


def read_bad_samples(folder: str | Path) -> Iterator[dict]:
    """The whole lines of all files in a folder, which may be missing."""
    for path in sorted(Path(folder).glob("*.jsonl")):
        with open(path) as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def summary(reasons: Counter[str]) -> str:
    """One line: the reasons by count, the most frequent ones first."""
    counts = reasons.most_common()
    rest = f", {len(counts) - SHOWN} other reasons" if len(counts) > SHOWN else ""
    return ", ".join(f"{reason} {count:,}" for reason, count in counts[:SHOWN]) + rest
