"""What marks find of attacks that nobody has looked at: many seeds of a set's attack, weaker ones too, without training.

python -m tests.benchmarks.attacks shapes|shapes_small|emoji --seeds 100 101 ... [--change attacks.badnets.pairs=16 attacks.blended.alpha=0.2 ...]

On the data of launch/reproduce.sh. Adds to tests/benchmarks/attacks.json an object for each set, change and seed: groups that are marks, and
the shares of honest pairs and of each kind of poison that are marked. Prints for each kind the mean, the least, and the seeds on which it is marked whole.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipeline.attacks.manifest import make_attack
from pipeline.configfile import load_config, override, read_yaml
from pipeline.data import open_index, open_samples
from pipeline.evaluation.selection_quality import poison_rows
from pipeline.safety.marks import find_marks
from pipeline.safety.sample import sample_of_run
from pipeline.training.start import make_views
from shards.storage import write_json
from tests.benchmarks.selection import CONFIGS

FILE = Path(__file__).with_suffix(".json")


def marked(name, seed, changes):
    """The object of one attack."""
    with tempfile.TemporaryDirectory() as folder:
        attack = read_yaml(f"configs/attack_{name}.yaml")
        override(attack, [*changes, f"seed={seed}", f"out={folder}/attack"])
        make_attack(attack)
        config = load_config(CONFIGS[name], ["preset=default", f"data.overlay={folder}/attack"])
        index = open_index(config.data)
        samples = open_samples(config.data, index)
        sample = sample_of_run(folder, samples, make_views(config), 512, 0, seed)
    marks = find_marks(sample)
    flags = np.zeros(index.samples, bool)
    flags[sample.row_S] = (marks.lowered_by_looks(torch.from_numpy(sample.row_S), sample.looks()) > 0).numpy()
    rows = {kind: poison_rows(samples.overlay, index, kind) for kind in samples.overlay.kinds}
    rows["honest"] = np.setdiff1d(np.arange(index.samples), poison_rows(samples.overlay, index))
    shares = {kind: float(flags[row].mean()) for kind, row in rows.items() if len(row)}
    return {"set": name, "seed": seed, "changes": changes, "marks": marks.marks, "marked": shares}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=CONFIGS)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="of the attack's config")
    args = parser.parse_args()
    found = []
    for seed in args.seeds:
        found.append(marked(args.set, seed, args.change))
        print(json.dumps(found[-1]), flush=True)
    known = json.loads(FILE.read_text()) if FILE.exists() else []
    every = {(run["set"], *run["changes"], run["seed"]): run for run in [*known, *found]}
    write_json(FILE, [every[key] for key in sorted(every, key=str)])
    for kind in found[0]["marked"]:
        shares = [run["marked"][kind] for run in found]
        print(
            f"{kind}: {np.mean(shares):.1%}, least {min(shares):.1%}, whole on {sum(s == 1 for s in shares)} of {len(shares)}"
        )


if __name__ == "__main__":
    main()
