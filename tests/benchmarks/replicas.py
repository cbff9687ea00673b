"""What poison adds: runs with it beside runs of the same preset without it, several of each, since two runs that differ in rounding alone differ by points.

python -m tests.benchmarks.replicas shapes_small [--attacks 0 1 2 3 4 5] [--seeds 10 11 12] [--presets default] [--jobs 2] [--minutes 60]

Trains run.seed = each of SEEDS on every attack of launch/train_run.sh's `prepare`, and without poison, and asks every model with every
attack's triggers. What is finished is used again; after `--minutes` nothing new is begun. Writes tests/benchmarks/replicas/SET.json (an
object a model and attack) and, from all that are there and the runs in tests/benchmarks/reproduce, tests/benchmarks/replicas.md: the mean success
with poison less that without, and clean accuracy less plain CLIP's, with 95 % intervals (Welch 1947, over models).
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

from pipeline.evaluation.run import read_eval
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
    from pipeline.evaluation.evaluator import Evaluator
    from pipeline.evaluation.run import load_run
    from pipeline.evaluation.selection_quality import poison_shares
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
        found = Evaluator(config.evaluation, overlay)(towers, views, comm.device())
        shares = poison_shares(masks, overlay, index) if poisoned else []
        write_json(Path(run) / f"attack{attack}.json", found | {"poison_in_safe_set": shares})


def mean_of_groups(groups):
    """(mean over the groups of their means, its variance, degrees of freedom): the groups share one variance within (nan where none has two values)."""
    groups = [np.asarray(group, float) for group in groups]
    mean, freedom = np.mean([group.mean() for group in groups]), sum(len(group) - 1 for group in groups)
    if not freedom:
        return mean, float("nan"), 0
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom
    return mean, within * sum(1 / len(group) for group in groups) / len(groups) ** 2, freedom


def difference(groups, others):
    """(mean, half the width of its 95 % interval): the mean over `groups` of their means less that over `others` (Welch 1947); nan: unknown.

    `groups`, `others`: lists of lists of values, such as the runs of each attack.
    """
    (mean, variance, freedom), (other, other_variance, other_freedom) = map(mean_of_groups, (groups, others))
    both = variance + other_variance
    if not both > 0:  # nan, or no run differs from its like
        return mean - other, both
    freedom = both**2 / (variance**2 / freedom + other_variance**2 / other_freedom)
    return mean - other, stats.t.ppf(0.975, freedom) * both**0.5


def cell(groups, others):
    """The difference as text, with its interval where it is one over several groups: of a single attack's few runs it would say nothing."""
    mean, width = difference(groups, others)
    return f"{mean:+.1f}" + (f" ± {width:.1f}" if len(groups) > 1 and not np.isnan(width) else "")


def by_attack(rows, value):
    """{attack: [value(row), ...]} of runs with poison."""
    groups = {}
    for row in rows:
        if row["poisoned"]:
            groups.setdefault(row["attack"], []).append(value(row))
    return dict(sorted(groups.items()))


def each_and_all(attacks):
    """[(label, attacks)] of a table's rows: one for each attack, and one over all where there are several."""
    return [(attack, [attack]) for attack in attacks] + ([("all", attacks)] if len(attacks) > 1 else [])


def poison_table(found):
    """Markdown: a row for each set, preset and attack, and one over the attacks of a set, where models without poison are there to compare with."""
    lines = [
        "| data | preset | attack | runs with poison, without | clean top-1: with, without, difference | "
        + " | ".join(f"{kind}: with, without, difference" for kind in KINDS)
        + " |",
        "|---" * (5 + len(KINDS)) + "|",
    ]
    values = [lambda row: 100 * row["clean_top1"]]
    values += [lambda row, kind=kind: 100 * row["attacks"][kind]["success"] for kind in KINDS]
    for name, preset in sorted({(row["set"], row["preset"]) for row in found}):
        rows = [row for row in found if (row["set"], row["preset"]) == (name, preset)]
        # A model without poison was asked with every attack: over all of them it counts once.
        models = {}
        for row in rows:
            if not row["poisoned"]:
                models.setdefault(row["seed"], {})[row["attack"]] = row
        attacks = [attack for attack in by_attack(rows, values[0]) if all(attack in asked for asked in models.values())]
        if not models:
            continue
        for label, asked in each_and_all(attacks):
            cells = []
            for value in values:
                groups = [group for attack, group in by_attack(rows, value).items() if attack in asked]
                without = [np.mean([value(model[attack]) for attack in asked]) for model in models.values()]
                mean = np.mean([np.mean(group) for group in groups])
                cells.append(f"{mean:.1f}, {np.mean(without):.1f}, {cell(groups, [without])}")
            head = f"| {name} | {preset} | {label} | {sum(map(len, groups))}, {len(models)} | "
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cost_table(found):
    """Markdown: clean accuracy of each form of `default` beside plain CLIP's, on the same poisoned data, by set and attack and over a set's attacks."""
    lines = [
        "| data | preset | attack | its runs, clip's | clean top-1 | clip | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    forms = sorted({(row["set"], row["preset"]) for row in found if row["preset"].startswith("default")})
    for name, form in forms:
        ours, plain = (
            by_attack(
                [row for row in found if (row["set"], row["preset"]) == (name, preset)],
                lambda row: 100 * row["clean_top1"],
            )
            for preset in (form, "clip")
        )
        attacks = sorted(ours.keys() & plain.keys())
        for label, asked in each_and_all(attacks):
            both = [[groups[attack] for attack in asked] for groups in (ours, plain)]
            counts = ", ".join(str(sum(map(len, groups))) for groups in both)
            means = " | ".join(f"{mean_of_groups(groups)[0]:.1f}" for groups in both)
            lines.append(f"| {name} | {form} | {label} | {counts} | {means} | {cell(*both)} |")
    return "\n".join(lines) + "\n"


def recorded():
    """Rows of the runs that are recorded in reproduce/SET/seedN/PRESET/eval.json, which are replicas too: run.seed is the attack's."""
    rows = []
    for path in sorted((RESULTS.parent / "reproduce").glob("*/seed*/*/eval.json")):
        name, seed, preset = path.parts[-4:-1]
        number, found = int(seed.removeprefix("seed")), read_eval(path.parent)
        row = {"set": name, "preset": preset, "poisoned": True, "seed": number, "attack": number}
        rows.append(row | {key: found[key] for key in ("clean_top1", "attacks")})
    return rows


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
    every = recorded() + [row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())]
    text = (
        "# What poison adds, and what the defence costs\n\nMade by `python -m tests.benchmarks.replicas` (its text says how); percent, and points "
        f"with half of their 95 % interval.\n\n## Runs with poison beside runs of the same preset without\n\n{poison_table(every)}\n"
        f"## Clean accuracy beside plain CLIP's\n\n{cost_table(every)}"
    )
    write_bytes(RESULTS.with_suffix(".md"), text.encode())


if __name__ == "__main__":
    main()
