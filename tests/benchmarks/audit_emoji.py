"""What an audit of emoji finds: of the poison, and wrong with the real data.

python -m tests.benchmarks.audit_emoji runs/audit        after launch/audit.sh, which calls it
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples


def poisoned(folder):
    found = json.loads((folder / "audit.json").read_text())
    for name in ("combined", "common_patch", "mismatch", "history"):
        one = found["truth"]["detectors"][name]
        auroc = ", ".join(f"{kind} {figures['auroc']:.3f}" for kind, figures in one["attacks"].items())
        print(f"poisoned, {name}: AUROC {auroc}; of the worst 1 % {one['precision']['0.01']:.0%} are poison")
    last = found["truth"]["masks"][-1]
    print(
        f"poisoned, last mask: {last['recall']:.1%} of the poison is risky, "
        f"{last['precision']:.1%} of what is risky is poison"
    )


def clean(folder):
    samples = Samples(ShardIndex.load("data/emoji/index"))
    table = pq.read_table(folder / "findings.parquet")
    offsets = samples.index.offsets
    places = [(s, p) for s in range(len(offsets) - 1) for p in range(int(offsets[s + 1] - offsets[s]))]
    classes = Path("data/emoji/classnames.txt").read_text().splitlines()
    kinds = {form.format(c) for c in classes for form in ("{}", "a {} emoji", "an icon of the kind {}")}
    bare_N = np.array([samples.caption(*place) in kinds for place in places])
    suspect_N = table["is_suspect_issue"].to_numpy()
    print(
        f"clean: {bare_N[suspect_N].sum()} of {suspect_N.sum()} suspects have a caption that names their kind only, "
        f"{bare_N.mean():.0%} of all pairs do"
    )
    copies = defaultdict(list)
    for row, place in enumerate(places):
        copies[samples.image(*place).tobytes()].append(row)
    same = [rows for rows in copies.values() if len(rows) > 1]
    print(f"clean: {sum(map(len, same))} pairs have a picture that is another's, pixel for pixel, in {len(same)} sets:")
    for rows in sorted(same, key=len):
        print("   ", " = ".join(samples.caption(*places[row]) for row in rows))
    patches = table["is_common_patch_issue"].to_numpy()
    print(f"clean: {patches.sum()} pairs share a patch without being poisoned")


if __name__ == "__main__":
    poisoned(Path(sys.argv[1]) / "poisoned_audit")
    clean(Path(sys.argv[1]) / "clean_audit")
