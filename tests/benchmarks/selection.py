"""Rules of selection against each other: every variant trained and judged as a user would, on each set and seed.

python -m tests.benchmarks.selection [--sets emoji] [--seeds 0 1 2] [--variants no-posterise cosine ...] [--jobs 2]

The data and attacks are those of launch/reproduce.sh, which also trains plain CLIP: run it first (PRESETS=clip). A run whose config has
been run is used again. Writes tests/benchmarks/selection/SET/seedN/VARIANT.json (the fields of eval.json, and the overrides)
and, from all that is there and what earlier rules gave (tests/benchmarks/selection/earlier), tests/benchmarks/selection.md and canaries.png
(canaries that pass beside poison that passes);
selection.json holds the presets' results of tests/benchmarks/reproduce, an object each.
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
from tests.benchmarks.rules import RULES

CONFIGS = {
    "shapes": "configs/quickstart.yaml",
    "shapes_small": "configs/shapes_small.yaml",
    "emoji": "configs/emoji.yaml",
}
RESULTS = Path(__file__).parent / "selection"
AUGMENT = "data.clip_augment"
MIXING = "data.clip_mix=0", "data.clip_paste=0"
VIEWS = (
    "selection.mirror=false",
    "selection.coarse=0.1875",
    "selection.crop=0.6",
)  # what the built-in default has, for sets that have not
COSINE = "selection.score=cosine"
# What a variant changes in the preset `default` of the set's config. Two groups were tried while that had:
BEFORE = {
    "shapes": [],
    "shapes_small": ["selection.growth=0.05", "selection.voters=4096"],
    "emoji": [],
    "emoji_5.9": ["selection.growth=0.05", "selection.voters=4096", f"{AUGMENT}.crop_min=0.65"],
}
# Emoji under a former attack, of which results alone are left.
FORMER = (
    "emoji_5.9: emoji under the attack of before, of fainter triggers in more pairs, 5.9 % in all, which took on some seeds only, and "
    "under the presets of then (configs/attack_emoji.yaml and configs/emoji.yaml of commit efc6e35). All rows but emoji's have the "
    "suspicion of that commit, which looked once, at the lowest scores, and not before the second split; suspicion-by-groups is the default with that "
    "of commit 94c4da4, and marks, as emoji's default, with today's"
)
# Tried with suspicion, and with that.
TRIED_SINCE = {
    "former": [],
    "slow-epochs-1": ["train.slow_epochs=1"],
    "no-posterise": [f"{AUGMENT}.posterise=0", f"{AUGMENT}.crop_min=0.8"],
    "posterise-early": [],
    "plain-last": [],
    "continuous-rate": [],
}
# And with the presets as they are.
TRIED_NOW = {
    "default": [],
    "suspicion-by-groups": [],  # the small set's default with the suspicion of commit 94c4da4; what is called default there had that of FORMER
    "marks": [],  # the same with today's, which has marks
    "voters-4096": ["selection.voters=4096"],
    "growth-0.2": ["selection.growth=0.2"],
    "crop-0.65": [f"{AUGMENT}.crop_min=0.65"],
    "crop-0.65-posterise-0.5": [f"{AUGMENT}.crop_min=0.65", f"{AUGMENT}.posterise=0.5"],
    "no-views": ["selection.coarse=1", "selection.crop=1"],
    "no-copies": ["selection.copies=null"],
    "one-caption": ["selection.copies=null"],
}
# What was changed in emoji's preset of commit 94c4da4, run there: all but the first two on one H100, and those but `again` with train.zero_stage=0.
OF_94C4DA4 = {
    "growth-0.1-cap-0.85": ["selection.growth=0.1", "selection.cap=0.85"],
    "fresh-start": ["train.zero_stage=0"],
    "again": [],
    "no-unimodal": ["train.unimodal_epochs=0"],
    "plain-views": [f"{AUGMENT}.posterise=0", "selection.cap=0.95"],
    "plain-views-no-unimodal": [f"{AUGMENT}.posterise=0", "selection.cap=0.95", "train.unimodal_epochs=0"],
    "plain-views-first-0.7": [
        f"{AUGMENT}.posterise=0",
        "selection.cap=0.95",
        "train.unimodal_epochs=0",
        "selection.first_share=0.7",
    ],
    "plain-views-cap-0.97": [
        f"{AUGMENT}.posterise=0",
        "selection.cap=0.97",
        "train.unimodal_epochs=0",
        "selection.first_share=0.7",
        "selection.growth=0.27",
    ],
    "posterise-early-cap-0.95": ["selection.cap=0.95"],
    "posterise-early-no-unimodal": ["selection.cap=0.95", "train.unimodal_epochs=0"],
    "oracle-0.97": [f"{AUGMENT}.posterise=0", "selection.cap=0.97", "selection.first_share=0.97"],
    "oracle-0.97-no-unimodal": [
        f"{AUGMENT}.posterise=0",
        "selection.cap=0.97",
        "selection.first_share=0.97",
        "train.unimodal_epochs=0",
    ],
}
# Variants of a rule that has another name.
RULED = {
    "posterise-early-cap-0.95": "posterise-early",
    "posterise-early-no-unimodal": "posterise-early",
    "oracle-0.97": "oracle",
    "oracle-0.97-no-unimodal": "oracle",
}
# Tried with that but without suspicion, before there was any or beside it.
TRIED = {
    "no-suspicion": [],
    "no-mixing": [*MIXING],
    "mixing-0.5-copies": ["data.clip_mix=0.5", "data.clip_paste=0.5", "selection.copies=null"],
    "views": [*VIEWS],
    "views-mixing-0.5": [*VIEWS, "data.clip_mix=0.5", "data.clip_paste=0.5"],
    "views-paste-0.5": [*VIEWS, "data.clip_paste=0.5"],
    "paste-0.1": ["data.clip_paste=0.1"],
    "paste-0.2": ["data.clip_paste=0.2"],
    "cosine": [COSINE],
    "cosine-cap-0.9": [COSINE, "selection.cap=0.9"],
    "cosine-paste-0.2": [COSINE, "data.clip_paste=0.2"],
    "cosine-mixing-0.15": [COSINE, "data.clip_mix=0.15", "data.clip_paste=0.15"],
    "views-cosine-mixing-0.15": [*VIEWS, COSINE, "data.clip_mix=0.15", "data.clip_paste=0.15"],
    "agreement": ["selection.score=agreement"],
    "unimodal-on-risky": ["selection.risky=unimodal"],
    "no-refill": ["selection.refill=false"],
    "slow-rate-halved": ["train.slow_lr=3e-4"],
    "live-canaries": ["selection.live_canaries=40"],
    "every-2": ["selection.every=2"],
    "every-4": ["selection.every=4"],
    # Rules that are no setting of a config, with the settings that they need.
    **{rule: [] for rule in RULES if rule not in TRIED_SINCE | TRIED_NOW | OF_94C4DA4},
    "nce": ["selection.score=agreement"],
    "frozen": ["selection.score=agreement"],
    "live-canary-brake": ["selection.live_canaries=40"],
}
VARIANTS = TRIED | TRIED_SINCE | TRIED_NOW
# The preset `default` of a commit, with today's data and attacks; run there.
OF_COMMITS = {"of-efc6e35": [], "of-94c4da4": []}
OF_COMMITS |= OF_94C4DA4
VARIANTS |= OF_COMMITS
EARLIER = "5de40d9"  # the last commit whose built-in default had neither views nor mixing


def overrides(name, variant):
    """What a variant changes in the preset `default` of the set's config."""
    if variant in TRIED_NOW | OF_COMMITS:
        return VARIANTS[variant]
    return [*BEFORE[name], *([] if variant in TRIED_SINCE else ["selection.suspicion=0"]), *VARIANTS[variant]]


def rule_of(variant):
    """The name of a variant's rule of tests.benchmarks.rules, or None."""
    rule = RULED.get(variant, variant)
    return rule if rule in RULES else None


def judged(name, seed, variant):
    """Train and evaluate one run unless that is done, and keep its result."""
    changed = overrides(name, variant)
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

        rule = rule_of(variant)
        program = ["tests.benchmarks.rules", rule] if rule else ["pipeline.cli"]
        command(*program, "train", CONFIGS[name], f"run.dir={run}", *words)
        known = (
            "--baseline",
            f"runs/reproduce/{name}/seed{seed}/clip",
            "--unpoisoned",
            *(f"runs/reproduce/{name}/unpoisoned/seed{n}" for n in range(3)),
        )
        command("pipeline.cli", "evaluate", str(run), *known)
    found = json.loads((run / "eval.json").read_text())
    about = {"set": name, "seed": seed, "variant": variant, "overrides": changed, "config": config.hash()}
    write_json(RESULTS / name / f"seed{seed}" / f"{variant}.json", about | found)
    print(f"{name} seed {seed} {variant}: clean {found['clean_top1']:.1%}", flush=True)


def results(folder, pattern="*/seed*/*.json"):
    """The runs of a folder of results, by set, variant and seed."""
    paths = sorted(folder.glob(pattern), key=lambda path: (path.parts[-3], path.stem, path.parts[-2]))
    return [json.loads(path.read_text()) for path in paths]


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


def described(variants):
    """Markdown: a line for each variant of {name: overrides}."""
    ruled = {name: RULES[rule].__doc__ if (rule := rule_of(name)) else "" for name in variants}
    return "\n".join(
        f"- {name}: {'; '.join(filter(None, (ruled[name], ' '.join(words)))) or 'as it is'}"
        for name, words in sorted(variants.items())
    )


def groups(found):
    """Markdown: what the variants that have results change, by what else differed when they were tried."""
    there = {run["variant"] for run in found}
    then = "; ".join(f"{name}: {' '.join(words)}" for name, words in BEFORE.items() if words)
    heads = (
        ("As the presets are:", TRIED_NOW),
        (f"Before, with suspicion ({then}):", TRIED_SINCE),
        ("Before, with selection.suspicion=0 besides:", TRIED),
        ("The presets of those commits:", {name: OF_COMMITS[name] for name in OF_COMMITS.keys() - OF_94C4DA4}),
        ("Emoji, beside of-94c4da4:", OF_94C4DA4),
    )
    return "\n\n".join(
        f"{head}\n\n{described({name: words for name, words in group.items() if name in there})}"
        for head, group in heads
    )


def plot():
    """One point a split of every result: above, canaries and the poison that passes; below, live canaries and poison of their kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_set = {
        name: [
            run
            for folder in (RESULTS, RESULTS / "earlier")
            for data in (name, f"{name}_5.9")
            for run in results(folder, f"{data}/seed*/*.json")
            if "canaries" in run
        ]
        for name in CONFIGS
    }
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
    parser.add_argument("--variants", nargs="+", choices=VARIANTS.keys() - OF_COMMITS, default=["default"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    todo = [(name, seed, variant) for name in args.sets for variant in args.variants for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda one: judged(*one), todo))
    now, earlier = results(RESULTS), results(RESULTS / "earlier")
    text = (
        "# Rules of selection\n\nMade by `python -m tests.benchmarks.selection` (its text says how). Each variant is the preset `default` of the set's config with:\n\n"
        f"{groups(now)}\n\n{FORMER}.\n\n{table(now)}\n## Earlier\n\nThe same of commit {EARLIER}, whose built-in preset scored one view and mixed no "
        f"pictures, and whose agreement looked at mirrored pictures, as emoji's still does; there was no suspicion either:\n\n{described({run['variant']: run['overrides'] for run in earlier})}\n\n{table(earlier)}"
    )
    write_bytes(RESULTS.with_suffix(".md"), text.encode())
    presets = []
    for path in sorted(RESULTS.with_name("reproduce").glob("*/seed*/*/eval.json")):
        name, seed, preset = path.parts[-4:-1]
        presets.append({**json.loads(path.read_text()), "set": name, "seed": int(seed[4:]), "preset": preset})
    write_json(RESULTS.with_suffix(".json"), presets)
    plot()


if __name__ == "__main__":
    main()
