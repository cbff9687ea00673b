"""What poison adds: runs with it beside runs of the same preset without it, several of each, since two runs that differ in rounding alone differ by points.

python -m tests.benchmarks.replicas shapes_small [--attacks 0 1 2 3 4 5] [--seeds 10 11 12] [--presets default] [--jobs 2] [--minutes 60]

Trains run.seed = each of SEEDS on every attack of launch/train_run.sh's `prepare`, and without poison, and asks every model with every
attack's triggers. What is finished is used again; after `--minutes` nothing new is begun. Writes tests/benchmarks/replicas/SET.json (an
object a model and attack) and, from all that are there, tests/benchmarks/replicas.md: the mean success with poison less that without,
with its 95 % interval (Welch 1947, over models).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy import stats

from shards.storage import write_bytes, write_json
from tests.benchmarks.selection import CONFIGS

RESULTS = Path(__file__).parent / "replicas"
KINDS = "targeted", "patch", "blended"


def run_dir(name, preset, attack, seed):
    return (
        Path("runs/replicas") / name / preset / ("unpoisoned" if attack is None else f"attack{attack}") / f"seed{seed}"
    )


def make(name, preset, attack, seed, attacks):
    """Train one run and judge it, each unless that is done."""
    run = run_dir(name, preset, attack, seed)
    run.parent.mkdir(parents=True, exist_ok=True)
    asked = [attack] if attack is not None else [a for a in attacks if not (run / f"attack{a}.json").exists()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [f"preset={preset}", f"run.dir={run}", f"run.seed={seed}", "data.workers=0", "evaluation.every=0"]
    if attack is not None:
        words.append(f"data.overlay=data/{name}_attack_seed{attack}")
    with open(f"{run}.log", "a") as log:

        def python(*words):
            subprocess.run(
                [sys.executable, "-m", *map(str, words)], env=environment, stdout=log, stderr=log, check=True
            )

        if not (run / "trained").exists():
            python("pipeline.cli", "train", CONFIGS[name], *words)
            (run / "trained").touch()
        if asked and not (run / f"attack{asked[-1]}.json").exists():
            python("tests.benchmarks.replicas", "--judge", run, name, *asked)
    print(f"{run}: done", flush=True)


def judge(run, name, attacks):
    """Write RUN/attackN.json for each of the attacks: what their triggers do to the run's model."""
    from pipeline import comm
    from pipeline.data import open_index, open_overlay
    from pipeline.evaluation.evaluators import ZeroShot
    from pipeline.evaluation.report import load_run, poison_shares
    from pipeline.training.start import make_views
    from shards.masks import SafeMask

    config, _, towers = load_run(run)
    index, views = open_index(config.data), make_views(config)
    masks = [
        SafeMask.load(path.parent, index.fingerprint)[0] for path in sorted(Path(run).glob("masks/epoch_*/mask.json"))
    ]
    poisoned = bool(config.data.overlay)
    for attack in attacks:
        config.data.overlay = f"data/{name}_attack_seed{attack}"
        overlay = open_overlay(config.data, index)
        found = ZeroShot(config.evaluation, overlay)(towers, views, comm.device())
        shares = poison_shares(overlay, index, [(None, mask) for mask in masks]) if poisoned else []
        write_json(Path(run) / f"attack{attack}.json", found | {"poison_in_safe_set": shares})


def difference(with_poison, without):
    """(mean, half the width of its 95 % interval): the mean over groups of runs with poison less the mean without (Welch, over the parts).

    `with_poison`: list of the groups' values; `without`: values. The width is nan where a part has fewer than two.
    """
    parts = [*map(np.asarray, with_poison), np.asarray(without)]
    mean = np.mean([part.mean() for part in parts[:-1]]) - parts[-1].mean()
    if min(map(len, parts)) < 2:
        return mean, float("nan")
    share = np.array([1 / len(with_poison)] * len(with_poison) + [1])  # of each part's mean in the difference
    variance = share**2 * [part.var(ddof=1) / len(part) for part in parts]
    if not variance.sum():
        return mean, 0.0
    freedom = variance.sum() ** 2 / (variance**2 / [len(part) - 1 for part in parts]).sum()
    return mean, stats.t.ppf(0.975, freedom) * variance.sum() ** 0.5


def table(found):
    """Markdown: a row for each set, preset and attack, and one over the attacks of a set."""
    lines = [
        "| data | preset | attack | runs with poison, without | clean top-1 with, without: mean ± deviation | "
        + " | ".join(f"{kind}: with, without, what poison adds" for kind in KINDS)
        + " |",
        "|---" * (5 + len(KINDS)) + "|",
    ]
    for name, preset in sorted({(row["set"], row["preset"]) for row in found}):
        rows = [row for row in found if (row["set"], row["preset"]) == (name, preset)]
        groups = {attack: [r for r in rows if r["poisoned"] and r["attack"] == attack] for attack in range(99)}
        groups = {attack: group for attack, group in groups.items() if group}
        # A model without poison was asked with every attack: over all of them it counts once.
        models = {}
        for row in rows:
            if not row["poisoned"] and row["attack"] in groups:
                models.setdefault(row["seed"], {})[row["attack"]] = row
        if not models:
            continue
        clean = [np.mean([100 * row["clean_top1"] for row in asked.values()]) for asked in models.values()]
        for attacks in [*([attack] for attack in groups), list(groups)]:
            these = [groups[attack] for attack in attacks]
            cells = []
            poisoned = [100 * row["clean_top1"] for group in these for row in group]
            cells.append(", ".join(f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}" for x in (poisoned, clean)))
            for kind in KINDS:
                success = [[100 * row["attacks"][kind]["success"] for row in group] for group in these]
                without = [
                    np.mean([100 * asked[attack]["attacks"][kind]["success"] for attack in attacks])
                    for asked in models.values()
                ]
                more, width = difference(success, without)
                mean = np.mean([np.mean(group) for group in success])
                cells.append(f"{mean:.1f}, {np.mean(without):.1f}, {more:+.1f} ± {width:.1f}")
            label = "all" if len(attacks) > 1 else attacks[0]
            head = f"| {name} | {preset} | {label} | {sum(map(len, these))}, {len(models)} | "
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def collect(name):
    """Write the results of a set's runs that are there, beside those that were recorded before."""
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else []
    found = {(row["preset"], row["poisoned"], row["seed"], row["attack"]): row for row in known}
    for path_found in Path("runs/replicas").glob(f"{name}/*/*/seed*/attack*.json"):
        preset, where, seed = path_found.parts[-4:-1]
        key = preset, where != "unpoisoned", int(seed[4:]), int(path_found.stem[6:])
        row = dict(zip(("preset", "poisoned", "seed", "attack"), key), set=name)
        found[key] = row | json.loads(path_found.read_text())
    write_json(path, [found[key] for key in sorted(found)])


def main():
    if sys.argv[1] == "--judge":
        run, name, *attacks = sys.argv[2:]
        return judge(run, name, attacks)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=CONFIGS)
    parser.add_argument("--attacks", nargs="+", type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12])
    parser.add_argument("--presets", nargs="+", choices=["clip", "paper", "default"], default=["default"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"))
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    todo = [(p, a, seed) for seed in args.seeds for p in args.presets for a in [None, *args.attacks]]

    def one(preset, attack, seed):
        if time.monotonic() < until:
            try:
                make(args.set, preset, attack, seed, args.attacks)
            except subprocess.CalledProcessError as error:  # the others are worth having
                print(f"{run_dir(args.set, preset, attack, seed)}: failed ({error.returncode}), its .log says why")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: one(*job), todo))
    collect(args.set)
    every = [row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())]
    text = f"# What poison adds\n\nMade by `python -m tests.benchmarks.replicas` (its text says how); percent, and points.\n\n{table(every)}"
    write_bytes(RESULTS.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    main()
