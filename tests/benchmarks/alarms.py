"""Whether poison comes in in groups: the alarm of `rules.alarms`, at several levels, on the splits of runs on poisoned data.

python -m tests.benchmarks.alarms RUN...

A group is a cluster of pictures (8 x 8 pixels) and of captions (their words), or of one of them alone. For each run and grouping: splits at which the alarm rings,
pairs that it would hold back, and how many of them are poison, over all splits but the first. Recorded in tests/benchmarks/alarms.json.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipeline.data import open_index, open_samples
from pipeline.evaluation.report import load_run, poison_rows
from shards.masks import SafeMask
from shards.storage import write_json
from tests.benchmarks.rules import CLUSTERS, alarms, groups

LEVELS = 1e-6, 1e-4, 1e-3


def rung(run):
    """One object for the run."""
    config = load_run(run)[0]
    index = open_index(config.data)
    samples = open_samples(config.data, index)
    both_N = groups(SimpleNamespace(index=index, samples=samples))
    by = {"pictures and captions": both_N, "pictures": both_N // CLUSTERS, "captions": both_N % CLUSTERS}
    poisoned_N = np.isin(np.arange(index.samples), poison_rows(samples.overlay, index))
    folders = [path.parent for path in sorted(Path(run).glob("masks/epoch_*/mask.json"))]
    flags_M = [SafeMask.load(folder, index.fingerprint)[0].flags() for folder in folders]
    steps = list(zip(flags_M[1:], flags_M))
    found = {"came in": sum(int((now & ~before).sum()) for now, before in steps)}
    found["of it poison"] = sum(int((now & ~before & poisoned_N).sum()) for now, before in steps)
    for name, group_N in by.items():
        for level in LEVELS:
            rings = [alarms(now, before, group_N, level) for now, before in steps]
            found[f"{name}, {level:g}"] = {
                "splits": sum(bool(alarmed_N.any()) for alarmed_N in rings),
                "pairs": sum(int(alarmed_N.sum()) for alarmed_N in rings),
                "of them poison": sum(int((alarmed_N & poisoned_N).sum()) for alarmed_N in rings),
            }
    return found


if __name__ == "__main__":
    results = {"/".join(Path(run).parts[-3:]): rung(run) for run in sys.argv[1:]}
    write_json(Path(__file__).with_suffix(".json"), results)
    print(results)
