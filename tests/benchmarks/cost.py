"""The cost of safety: seconds of an epoch of one run, scoring and selection included, over those of another on the same
data.

python -m tests.benchmarks.cost BASE_RUN RUN        both trained on this machine with nothing beside them

The epochs are those of the CLIP loss at the full rate: all of plain CLIP's, SafeCLIP's after its warm-up. Reads
config.yaml, metrics.jsonl and the last checkpoint. Last line: one JSON object; medians over the epochs, evaluation left
out, and the whole runs (guards, saving and whatever else they did included).
"""

import argparse
import json
import statistics
from pathlib import Path

import yaml

from pipeline.evaluation.run import read_metrics
from pipeline.training import checkpoint


def epochs(run):
    """({epoch: seconds of its steps}, {epoch: seconds of the round before it}, stages by epoch) of a run directory."""
    batch = yaml.safe_load((Path(run) / "config.yaml").read_text())["train"]["batch_size"]
    rows, steps, last, rounds, stages = read_metrics(run), {}, {}, {}, {}
    for row in rows:
        if row["stage"] == "selection":
            rounds[row["epoch"]] = row["seconds"]
        elif "samples_per_s" in row:
            last[row["epoch"]], stages[row["epoch"]] = row, row["stage"]
    before = 0
    for epoch, row in sorted(last.items()):
        steps[epoch] = (row["step"] - before) * batch / row["samples_per_s"]
        before = row["step"]
    return steps, rounds, stages


def median_epoch(run):
    """(seconds of an epoch with its selection round, seconds of the selection)"""
    steps, rounds, stages = epochs(run)
    kept = [epoch for epoch in steps if stages[epoch] in ("clip", "safeclip")]
    selection = [rounds.get(epoch, 0.0) for epoch in kept]
    return statistics.median(steps[epoch] + s for epoch, s in zip(kept, selection)), statistics.median(selection)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_run")
    parser.add_argument("run")
    args = parser.parse_args()
    figures = {}
    for name in ("base_run", "run"):
        whole, selection = median_epoch(getattr(args, name))
        state = checkpoint.load_state(checkpoint.newest_complete(getattr(args, name))[0])
        figures[name] = {
            "epoch_s": round(whole, 2),
            "of_it_selection_s": round(selection, 2),
            "run_s": round(state["seconds"]),
        }
    for ratio, of in (("ratio", "epoch_s"), ("ratio_of_runs", "run_s")):
        figures[ratio] = round(figures["run"][of] / figures["base_run"][of], 3)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
