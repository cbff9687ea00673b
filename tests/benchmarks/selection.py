"""Rules of selection against each other: every variant trained and judged as a user would, on each set and seed.

python -m tests.benchmarks.selection [--sets emoji] [--seeds 0 1 2] [--variants oracle no-copies ...] [--jobs 2]

The data and attacks are those of launch/reproduce.sh, which also trains plain CLIP and the presets: run it first. A run whose config has
been run is used again. Writes tests/benchmarks/selection/now/SET/seedN/VARIANT.json (the fields of eval.json, and the overrides)
and, from all that is there, the presets' results (tests/benchmarks/reproduce) and what was tried at earlier commits (the folders beside `now`, whose about.json
says what they were; rules that lost are in the code of 2df2b05 and, with those tried on emoji alone, of 304d2ee): tests/benchmarks/selection.md,
canaries.png (canaries that pass beside poison that passes) and selection.json, the presets' results, an object each.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.configfile import load_config
from shards.storage import write_bytes, write_json

CONFIGS = {
    "shapes": "configs/quickstart.yaml",
    "shapes_small": "configs/shapes_small.yaml",
    "emoji": "configs/emoji.yaml",
    "shapes_small_wander": "configs/shapes_small.yaml",
}
RESULTS = Path(__file__).parent / "selection"
# What a variant changes in the preset `default` of the set's config.
VARIANTS = {
    "again": [],
    "oracle": [],
    "marks-alone": [],
    "no-marks": [],
    "no-textures": [],
    "no-suspicion": ["selection.suspicion=0"],
    "no-mixing": ["data.clip_mix=0", "data.clip_paste=0"],
    "no-views": ["selection.coarse=1", "selection.crop=1", "selection.mirror=false"],
    "no-copies": ["selection.copies=null"],
    "no-refill": ["selection.refill=false"],
    "unimodal-on-risky": ["selection.risky=unimodal"],
    "live-canaries": ["selection.live_canaries=40"],
    "cap-0.95": ["selection.cap=0.95"],
    "every-2": ["selection.every=2"],
    "every-4": ["selection.every=4"],
    "slow-epochs-2": ["train.slow_epochs=2"],
}
# Those that no setting makes (tests/benchmarks/altered.py).
ALTERED = {
    "oracle": "the split knows the poison: what no rule can better",
    "marks-alone": "no groups learnt from scores, only marks",
    "no-marks": "groups learnt from scores alone",
    "no-textures": "marks of pixels alone",
}
GROUPS = (
    "of_f8a6917",
    "of_d2ebb9c",
    "of_6889942",
    "of_2df2b05",
    "of_f284d1d",
    "of_ca7211b",
    "of_2a43d62",
    "of_4e94843",
    "of_1b085b7",
    "of_304d2ee",
    "of_94c4da4",
    "of_efc6e35",
    "before_efc6e35",
    "of_5de40d9",
)  # the newest first


def judged(name, seed, variant):
    """Train and evaluate one run unless that is done, and keep its result."""
    changed = VARIANTS[variant]
    words = [*changed, f"run.seed={seed}", f"data.overlay=data/{name}_attack_seed{seed}"]
    words += ["preset=default", "evaluation.every=0", "data.workers=0"]
    config = load_config(CONFIGS[name], words)
    run = Path("runs/selection") / name / f"seed{seed}" / f"{variant}-{config.hash()}"
    if not (run / "eval.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}

        def command(*parts):
            run.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{run}.log", "a") as log:
                subprocess.run([sys.executable, "-m", *parts], env=environment, stdout=log, stderr=log, check=True)

        program = ["tests.benchmarks.altered", variant] if variant in ALTERED else ["pipeline.cli"]
        command(*program, "train", CONFIGS[name], f"run.dir={run}", *words)
        known = (
            "--baseline",
            f"runs/reproduce/{name}/seed{seed}/clip",
            "--unpoisoned",
            *(f"runs/reproduce/{name.removesuffix('_wander')}/unpoisoned/seed{n}" for n in range(3)),
        )
        command("pipeline.cli", "evaluate", str(run), *known)
    found = json.loads((run / "eval.json").read_text())
    about = {"set": name, "seed": seed, "variant": variant, "overrides": changed, "config": config.hash()}
    write_json(RESULTS / "now" / name / f"seed{seed}" / f"{variant}.json", about | found)
    print(f"{name} seed {seed} {variant}: clean {found['clean_top1']:.1%}", flush=True)


def results(group):
    """The runs of a group, by set, variant and seed; of `now` also the presets' `default`."""
    found = [json.loads(path.read_text()) for path in (RESULTS / group).glob("*/seed*/*.json")]
    if group == "now":
        found += [{**run, "variant": "default", "overrides": []} for run in presets() if run["preset"] == "default"]
    return sorted(found, key=lambda run: (run["set"], run["variant"], run["seed"]))


def presets():
    """The results of launch/reproduce.sh that are recorded, an object each."""
    found = []
    for path in sorted(RESULTS.with_name("reproduce").glob("*/seed*/*/eval.json")):
        name, seed, preset = path.parts[-4:-1]
        found.append({**json.loads(path.read_text()), "set": name, "seed": int(seed[4:]), "preset": preset})
    return found


def table(found):
    """Markdown: a row for each result; AUROC and passed are those of the first, the third and the last split."""
    lines = [
        "| data | variant | seed | clean top-1 | kind | success (base) | AUROC at splits 1, 3, last | passed | seconds |",
        "|---" * 9 + "|",
    ]
    for run in found:
        head = f"| {run['set']} | {run['variant']} | {run['seed']} | {run['clean_top1']:.1%} "
        for kind, attack in run["attacks"].items():
            auroc, passed = attack["auroc"], attack["share_in_safe_set"]
            lines.append(
                f"{head}| {kind} | {attack['success']:.1%} ({attack['base']:.1%}) "
                f"| {auroc[0]:.3f} {auroc[2]:.3f} {auroc[-1]:.3f} | {passed[0]:.1%} {passed[2]:.1%} {passed[-1]:.1%} | {run['seconds']:.0f} |"
            )
            head = "| | | | "
    return "\n".join(lines) + "\n"


def section(group):
    """Markdown: what an earlier group was, what its variants changed, and its table."""
    about, found = json.loads((RESULTS / group / "about.json").read_text()), results(group)
    besides = "; ".join(f"{name}: {' '.join(words)}" for name, words in about["besides"].items())
    changed = {}
    for run in found:
        words = [word for word in run["overrides"] if word not in about["besides"].get(run["set"], ())]
        changed[run["variant"]] = "; ".join(filter(None, (about["rules"].get(run["variant"]), " ".join(words))))
    return (
        f"## {about['title']}\n\n{about['text']}{f' All rows have besides: {besides}.' if besides else ''}\n\n"
        f"{described(changed)}\n\n{table(found)}"
    )


def described(changed):
    """Markdown: a line for each variant of {name: what it changes}."""
    return "\n".join(f"- {name}: {what or 'as it is'}" for name, what in sorted(changed.items()))


def plot():
    """One point a split of every result: above, canaries and the poison that passes; below, live canaries and poison of their kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = [run for group in ("now", *GROUPS) for run in results(group) if "canaries" in run]
    by_set = {name: [run for run in found if run["set"].removesuffix("_5.9") == name] for name in CONFIGS}
    rows = 2 if any(any(run.get("live_canaries") or ()) for found in by_set.values() for run in found) else 1
    figure, axes = plt.subplots(
        rows, len(CONFIGS), figsize=(5.5 * len(CONFIGS), 4.5 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    looks = {"targeted": ("s", "#2a9d8f"), "patch": ("o", "#e76f51"), "blended": ("^", "#6a4c93")}
    for column, name in enumerate(CONFIGS):
        found = by_set[name]
        with_live = [run for run in found if any(run.get("live_canaries") or ())]
        for kind, (marker, colour) in looks.items():
            points = [(split["share"], run, at) for run in found for at, split in enumerate(run["canaries"])]
            live = [
                (split[kind]["share"], run, at)
                for run in with_live
                for at, split in enumerate(run["live_canaries"])
                if kind in split
            ]
            for axis, these in zip(axes[:, column], (points, live)):
                passed = [100 * run["attacks"][kind]["share_in_safe_set"][at] for _, run, at in these]
                shares = [100 * share for share, _, _ in these]
                if these:
                    axis.scatter(shares, passed, s=18, alpha=0.5, marker=marker, color=colour, label=kind)
        for axis, runs, whose in zip(axes[:, column], (found, with_live), ("canaries", "live canaries of the kind")):
            axis.set_visible(bool(runs))
            axis.axline((0, 0), slope=1, color="#888888", lw=1, ls="--", label="as many as canaries")
            axis.set(
                title=f"{name}, {len(runs)} run{'s' * (len(runs) != 1)}, all splits",
                xlabel=f"{whose} that would pass, %",
                ylim=(-3, 103),
            )
            axis.grid(alpha=0.25)
    for axis in axes.flat:  # the first of a row may be empty
        axis.set_ylabel("poison in the safe set, % of its kind")
        axis.tick_params(labelleft=True)
    axes[0, 0].legend(loc="center right")
    figure.savefig(RESULTS.with_name("canaries.png"), dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=CONFIGS, default=["emoji"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    todo = [(name, seed, variant) for name in args.sets for variant in args.variants for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda one: judged(*one), todo))
    now = results("now")
    there = {run["variant"]: " ".join(run["overrides"]) for run in now}
    there |= {name: what for name, what in ALTERED.items() if name in there}
    text = (
        "# Rules of selection\n\nMade by `python -m tests.benchmarks.selection` (its text says how). Each variant is the preset `default` of the set's config with:\n\n"
        f"{described(there)}\n\n{table(now)}\n" + "\n".join(map(section, GROUPS))
    )
    write_bytes(RESULTS.with_suffix(".md"), text.encode())
    write_json(RESULTS.with_suffix(".json"), presets())
    plot()


if __name__ == "__main__":
    main()
