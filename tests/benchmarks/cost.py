"""The cost of safety: seconds of a SafeCLIP epoch, scoring and split included, over those of plain CLIP on the same data.

python -m tests.benchmarks.cost CLIP_RUN SAFECLIP_RUN        both trained on this machine with nothing beside them

Reads config.yaml and metrics.jsonl. Last line: one JSON object; medians over the epochs, evaluation left out.
"""

import argparse
import json
import statistics
from pathlib import Path

import yaml

from pipeline.evaluation.report import read_metrics


def epochs(run):
    """({epoch: seconds of its steps}, {epoch: seconds of the split before it}, stages by epoch) of a run directory."""
    batch = yaml.safe_load((Path(run) / "config.yaml").read_text())["train"]["batch_size"]
    rows, steps, last, splits, stages = read_metrics(run), {}, {}, {}, {}
    for row in rows:
        if row["stage"] == "split":
            splits[row["epoch"]] = row["seconds"]
        elif "samples_per_s" in row:
            last[row["epoch"]], stages[row["epoch"]] = row, row["stage"]
    before = 0
    for epoch, row in sorted(last.items()):
        steps[epoch] = (row["step"] - before) * batch / row["samples_per_s"]
        before = row["step"]
    return steps, splits, stages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip_run")
    parser.add_argument("safeclip_run")
    args = parser.parse_args()
    clip, _, _ = epochs(args.clip_run)
    safe, splits, stages = epochs(args.safeclip_run)
    kept = [epoch for epoch in safe if stages[epoch] == "safeclip"]
    plain = statistics.median(clip.values())
    whole = statistics.median(safe[epoch] + splits.get(epoch, 0.0) for epoch in kept)
    figures = {
        "clip_epoch_s": round(plain, 2),
        "safeclip_epoch_s": round(whole, 2),
        "of_it_split_s": round(statistics.median(splits.get(epoch, 0.0) for epoch in kept), 2),
        "ratio": round(whole / plain, 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
