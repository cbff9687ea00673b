"""What the guards of the preset default exclude of attacks at the first round: many seeds, weak attacks, less data.

python -m tests.benchmarks.attacks CONFIG ATTACK --seeds 100 101 ... [--pairs 10000] [--change attacks.badnets.pairs=16]
python -m tests.benchmarks.attacks                                              only the table and the picture

CONFIG, ATTACK: e.g. configs/quickstart.yaml configs/attack_shapes.yaml, on data that are there (launch/reproduce.sh).
Adds to tests/benchmarks/attacks.json an object for each attack config, change, number of pairs and seed: the triggers
found, the negative controls of the first round, and of each guard the fractions of honest pairs and of each kind of
poison that it excludes. Prints a table of all objects and draws attacks.png.
"""

import argparse
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from pipeline import logs
from pipeline.attacks.manifest import make_attack
from pipeline.config.data import open_index, open_samples
from pipeline.config.load import load_config, override, read_yaml
from pipeline.evaluation.selection_quality import honest_pairs, poison_rows
from pipeline.guards.excluded import guards_folder
from pipeline.safety.diagnosis import LEAST_PAIRS
from pipeline.training.run import train
from pipeline.training.signals import Preempted, StopSignal
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.order.safe_mask import SafeMask
from shards.storage.files import write_json

PAIRS = (5_000, 10_000, 20_000, 50_000)  # marks of the axis
FILE = Path(__file__).with_suffix(".json")
OUT_OF_REACH = ("class_to_class", "label_consistent")  # captions that fit: no guard aims at them


class AfterFirstRound(StopSignal):
    """Asks a run to stop when its first mask is there: guards look once, at the first selection round."""

    def __init__(self, run_dir):
        self.masks = Path(run_dir, "masks")

    @property
    def received(self):
        return any(self.masks.glob("epoch_*/mask.json"))


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
        with suppress(Preempted):
            train(config, stop=AfterFirstRound(config.run.dir))
        first = json.loads(next(Path(config.run.dir, "masks").glob("epoch_*/mask.json")).read_text())
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
    found |= {
        "steps": first["step"],
        "controls": first["diagnosis"]["negative_controls"],
        "triggers": about["triggers"],
    }
    return {**found, "excluded": fractions}


def held(run):
    """Smallest fraction of an attack's pairs that a guard excludes, of the attacks that guards aim at."""
    guards = run["excluded"].values()
    kinds = set(next(iter(guards))) - {"honest", *OUT_OF_REACH}
    return min(max(found[kind] for found in guards) for kind in kinds)


def draw(runs, path):
    """What the guards excluded against the number of pairs, and against the negative controls that pass."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    sets = sorted({run["attack"].split("_")[1] for run in runs})
    for name in sets:
        chosen = [run for run in runs if run["attack"].split("_")[1] == name]
        held_R = [100 * held(run) for run in chosen]
        passing = [100 * run["controls"]["fraction"] for run in chosen]
        axes[0].scatter([run["pairs"] for run in chosen], held_R, alpha=0.6, label=name)
        axes[1].scatter(passing, held_R, alpha=0.6)
    axes[0].axvline(LEAST_PAIRS, color="grey", linestyle=":", label="a run warns below")
    axes[0].set(xscale="log", xlabel="pairs", ylabel="least excluded of an attack, %")
    axes[0].set_xticks(PAIRS, [f"{pairs:,}" for pairs in PAIRS])
    axes[0].minorticks_off()
    axes[1].set(xlabel="negative controls that pass at the first round, %")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def table(runs):
    """Markdown: for each set and number of pairs how many runs held, and what was excluded."""
    lines = ["| set | pairs | runs | all attacks excluded by 99 % | least excluded of an attack | honest pairs, most |"]
    lines.append("|---|---|---|---|---|---|")
    for name, pairs in sorted({(run["attack"].split("_")[1], run["pairs"]) for run in runs}):
        chosen = [run for run in runs if (run["attack"].split("_")[1], run["pairs"]) == (name, pairs)]
        least = [held(run) for run in chosen]
        honest = max(run["excluded"]["trigger_clusters"]["honest"] for run in chosen)
        whole = sum(fraction >= 0.99 for fraction in least)
        lines.append(f"| {name} | {pairs:,} | {len(chosen)} | {whole} | {min(least):.1%} | {honest:.2%} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("attack", nargs="?")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], help="default: none, only the table and the picture"
    )
    parser.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="of the attack's config")
    parser.add_argument("--pairs", type=int, help="of the first shards that have so many pairs (default: all)")
    args = parser.parse_args()
    logs.set_up()
    runs = json.loads(FILE.read_text()) if FILE.exists() else []
    for seed in args.seeds:
        run = excluded(args.config, args.attack, seed, args.change, args.pairs)
        print(json.dumps(run), flush=True)
        every = {(run["attack"], *run["changes"], run["pairs"], run["seed"]): run for run in [*runs, run]}
        runs = [every[key] for key in sorted(every, key=str)]
        write_json(FILE, runs)
    print(table(runs))
    draw(runs, FILE.with_suffix(".png"))


if __name__ == "__main__":
    main()
