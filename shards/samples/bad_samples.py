"""RUN/bad_samples.jsonl: one line for each sample that cannot be used and each reason, without repetitions."""

import json
import re
from collections import Counter
from pathlib import Path


class BadSamplesFile:
    """Appends {"shard", "position", "key", "reason"} to a file of JSON lines, which may exist already."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.seen: set[tuple[int, int, str]] = set()
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]  # the last line may be incomplete after a failure
            if len(whole) != len(lines):
                self.path.write_bytes(b"".join(whole))
            for line in whole:
                row = json.loads(line)
                self.seen.add((row["shard"], row["position"], row["reason"]))

    def add(self, shard: int, position: int, key: str, reason: str) -> None:
        """Record that a sample could not be used."""
        if (shard, position, reason) in self.seen:
            return
        self.seen.add((shard, position, reason))
        with open(self.path, "a") as file:
            file.write(json.dumps({"shard": shard, "position": position, "key": key, "reason": reason}) + "\n")

    def reasons(self) -> Counter[str]:
        """How often each reason comes; those that differ only in their numbers are one."""
        return Counter(re.sub(r"(?<![-\w])\d+", "N", reason) for _, _, reason in self.seen)

    def summary(self, limit: int = 8) -> str:
        """One line: the reasons by count, the most frequent ones first."""
        counts = self.reasons().most_common()
        rest = f", {len(counts) - limit} other reasons" if len(counts) > limit else ""
        return ", ".join(f"{reason} {count:,}" for reason, count in counts[:limit]) + rest
