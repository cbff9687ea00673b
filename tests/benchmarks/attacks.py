"""What the guards of the preset default exclude of attacks: one epoch of training, many seeds, weaker attacks too.

python -m tests.benchmarks.attacks CONFIG ATTACK --seeds 100 101 ... [--change attacks.badnets.pairs=16 ...]

CONFIG, ATTACK: e.g. configs/quickstart.yaml configs/attack_shapes.yaml, on data that are there (launch/reproduce.sh).
Adds to tests/benchmarks/attacks.json an object for each attack config, change and seed: the triggers found, and of each
guard the fractions of honest pairs and of each kind of poison that it excludes. Prints for each guard and kind the
mean, the least, and the number of seeds on which it is excluded whole.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from pipeline.attacks.manifest import make_attack
from pipeline.config.data import open_index, open_samples
from pipeline.config.load import load_config, override, read_yaml
from pipeline.evaluation.selection_quality import honest_pairs, poison_rows
from pipeline.guards.excluded import guards_folder
from pipeline.training.run import train
from shards.index.shard_index import ShardIndex, build_index
from shards.order.safe_mask import SafeMask
from shards.storage.files import write_json

FILE = Path(__file__).with_suffix(".json")


def first_shards(folder, pairs, out):
    """Index in `out` of the first shards of the index in `folder` that have `pairs` samples together."""
    index = ShardIndex.load(folder)
    count = int(np.searchsorted(np.cumsum(index.counts), pairs)) + 1
    build_index([shard.path for shard in index.shards[:count]], out, index.shards[0].text)
    return str(out)


def excluded(config, attack, seed, changes, pairs):
    """The object of one attack. pairs: of the data, the first so many; None: all."""
    with tempfile.TemporaryDirectory() as folder:
        values = read_yaml(attack)
        override(values, [*changes, f"seed={seed}", f"out={folder}/attack"])
        if pairs:
            values |= {key: first_shards(values[key], pairs, Path(folder, key)) for key in ("index", "labels")}
        make_attack(values)
        words = [f"data.overlay={folder}/attack", f"run.dir={folder}/run", f"run.seed={seed}", "evaluation.test=null"]
        config = load_config(config, ["preset=default", f"data.index={values['index']}", *words])
        config.train.epochs = 1  # guards run once, in the first epoch
        train(config)
        first = json.loads(next(Path(folder, "run", "masks").glob("epoch_*/mask.json")).read_text())
        index = open_index(config.data)
        overlay = open_samples(config.data, index).overlay
        masks = {path.parent.name: path for path in sorted(guards_folder(config.run.dir).glob("*/mask.json"))}
        about = json.loads(masks["trigger_clusters"].read_text())
        flags = {guard: ~SafeMask.load(path.parent)[0].flags() for guard, path in masks.items()}
    rows = {kind: poison_rows(overlay, index, kind) for kind in overlay.kinds}
    rows["honest"] = np.flatnonzero(honest_pairs(overlay, index))
    fractions = {
        guard: {kind: float(flag_N[row].mean()) for kind, row in rows.items()} for guard, flag_N in flags.items()
    }
    found = {"attack": Path(attack).stem, "seed": seed, "changes": changes, "pairs": index.samples}
    found |= {"steps": first["step"], "controls": first["diagnosis"]["negative_controls"], "triggers": about["triggers"]}
    return {**found, "excluded": fractions}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("attack")
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="of the attack's config")
    parser.add_argument("--pairs", type=int, help="of the first shards that have so many pairs (default: all)")
    args = parser.parse_args()
    found = []
    for seed in args.seeds:
        found.append(excluded(args.config, args.attack, seed, args.change, args.pairs))
        print(json.dumps(found[-1]), flush=True)
    known = json.loads(FILE.read_text()) if FILE.exists() else []
    every = {(run["attack"], *run["changes"], run["pairs"], run["seed"]): run for run in [*known, *found]}
    write_json(FILE, [every[key] for key in sorted(every, key=str)])
    for guard, kinds in found[0]["excluded"].items():
        for kind in kinds:
            fractions = [run["excluded"][guard][kind] for run in found]
            whole = sum(fraction == 1 for fraction in fractions)
            print(
                f"{guard}, {kind}: {np.mean(fractions):.1%}, least {min(fractions):.1%}, "
                f"whole on {whole} of {len(fractions)}"
            )


if __name__ == "__main__":
    main()
