"""The comparison of plain CLIP and SafeCLIP: tables, result.json and a picture."""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

from pipeline.evaluation.run import read_eval, read_metrics
from shards.storage import write_json

ALL = ((0, 8),)
# Seeds that settings were chosen on, those that they were not, those that nobody had looked at.
GROUPS = ((0, 2), (3, 5), (6, 8))
WITHIN = 3  # points: what clean accuracy may lose and an attack may gain


def compare(clip_run, safe_run, out):
    """Write OUT/result.json and OUT/result.png of two evaluated runs; returns the table as text. Raises UserError."""
    out = Path(out)
    result = {"clip": read_eval(clip_run), "safeclip": read_eval(safe_run)}
    write_json(out / "result.json", result)
    draw(result, read_metrics(clip_run), read_metrics(safe_run), out / "result.png")
    return table(result)


def table(result):
    """Markdown table, percentages: clean accuracy, and per attack its success, base rate and how often the truth is read."""
    lines = [
        "| | plain CLIP | SafeCLIP | base rate (SafeCLIP) | read as the true class (CLIP / SafeCLIP) |",
        "|---|---|---|---|---|",
        f"| clean zero-shot top-1 | {percent(result['clip']['clean_top1'])} | {percent(result['safeclip']['clean_top1'])} | | |",
    ]
    for kind, attack in result["clip"]["attacks"].items():
        defended = result["safeclip"]["attacks"][kind]
        note = "" if attack["took"] else " (attack did not take)"
        lines.append(
            f"| {kind} success{note} | {percent(attack['success'])} | {percent(defended['success'])} | "
            f"{percent(defended['base'])} | {percent(attack['true_class'])} / {percent(defended['true_class'])} |"
        )
    views = [f"{result[name]['sample_views']:,}" for name in ("clip", "safeclip")]
    seconds = [f"{result[name]['seconds']:.0f} s" for name in ("clip", "safeclip")]
    lines.append(f"| sample views | {views[0]} | {views[1]} | | |")
    lines.append(f"| training time | {seconds[0]} | {seconds[1]} | | |")
    return "\n".join(lines)


def percent(share):
    return "?" if share is None else f"{share:.1%}"


def draw(result, clip_metrics, safe_metrics, path):
    """Left: clean accuracy and attack success over epochs, of both runs. Right: safe share and poison share of the safe set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    kinds = list(result["clip"]["attacks"])
    colours = dict(zip(["clean", *kinds], ["#222222", "#d1495b", "#edae49", "#30638e", "#66a182"]))
    for axis, metrics, title in ((left, clip_metrics, "plain CLIP"), (middle, safe_metrics, "SafeCLIP")):
        lines = [line for line in metrics if "eval" in line]
        epochs = [line["epoch"] + 1 for line in lines]
        axis.plot(
            epochs,
            [100 * line["eval"]["clean_top1"] for line in lines],
            color=colours["clean"],
            lw=2.5,
            label="clean accuracy",
        )
        for kind in kinds:
            axis.plot(
                epochs,
                [100 * line["eval"]["attacks"][kind]["success"] for line in lines],
                color=colours[kind],
                lw=1.8,
                marker="o",
                ms=3,
                label=f"{kind} success",
            )
        axis.set(title=title, xlabel="epoch", ylabel="% of test pictures", ylim=(-3, 103))
        axis.grid(alpha=0.25)
    left.legend(loc="center right", fontsize=9)
    splits = [line for line in safe_metrics if line["stage"] == "split"]
    epochs = [line["epoch"] + 1 for line in splits]
    right.plot(
        epochs,
        [100 * line["share"] for line in splits],
        color=colours["clean"],
        lw=2.5,
        label="safe share of all pairs",
    )
    for kind in kinds:
        shares = result["safeclip"]["attacks"][kind]["share_in_safe_set"]
        right.plot(
            epochs,
            [100 * s for s in shares],
            color=colours[kind],
            lw=1.8,
            marker="o",
            ms=3,
            label=f"{kind} poison that is in the safe set",
        )
    right.plot(
        epochs,
        [100 * s for s in result["safeclip"]["poison_in_safe_set"]],
        color="#888888",
        ls="--",
        label="poison share in the safe set",
    )
    right.set(title="SafeCLIP's splits", xlabel="before epoch", ylabel="%", ylim=(-3, 103))
    right.grid(alpha=0.25)
    right.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_runs(root):
    """({(set, preset): [(seed, eval.json)]}, kinds of attack) of every ROOT/SET/seedN/PRESET/eval.json."""
    runs = {}
    for path in sorted(Path(root).glob("*/seed*/*/eval.json")):
        name, seed, preset = path.parts[-4:-1]
        runs.setdefault((name, preset), []).append((int(seed.removeprefix("seed")), read_eval(path.parent)))
    return dict(sorted(runs.items())), list(next(iter(runs.values()))[0][1]["attacks"]) if runs else []


def summary_table(root, groups=ALL):
    """Markdown: a row for each set, preset and group of seeds: mean and worst seed, beside attacks the mean of what models that never saw poison read
    as the target, the seeds on which all holds at once (held), and how much of the poison the CLIP loss ever saw."""
    runs, kinds = read_runs(root)
    lines = [
        "| data | preset | seeds | clean top-1, mean / worst | "
        + " | ".join(f"{k}, mean / worst (unpoisoned)" for k in kinds)
        + f" | seeds with all within {WITHIN} points | poison ever trained on, mean / worst |"
    ]
    lines.append("|---" * (6 + len(kinds)) + "|")
    for (name, preset), found in runs.items():
        plain = dict(runs.get((name, "clip"), ()))
        for low, high in groups:
            group = {seed: run for seed, run in found if low <= seed <= high}
            if not group:
                continue
            clean, cells = [run["clean_top1"] for run in group.values()], []
            for kind in kinds:
                attacks = [run["attacks"][kind] for run in group.values()]
                attack, worst = mean_of(attacks), max(attack["success"] for attack in attacks)
                void = "" if attack["took"] else " did not take"
                cells.append(f"{percent(attack['success'])} / {percent(worst)} ({percent(attack['unpoisoned'])}){void}")
            good = [str(seed) for seed, run in group.items() if seed in plain and held(run, plain[seed])]
            cells.append("" if preset == "clip" else ", ".join(good) or "none")
            cells.append(mean_and_worst([run.get("poison_trained_on") for run in group.values()]))
            seeds = f"{min(group)} to {max(group)}" if len(group) > 1 else f"{min(group)}"
            head = f"| {name} | {preset} | {seeds} | {percent(mean_of(clean))} / {percent(min(clean))} | "
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def held(run, clip):
    """Whether a run loses at most WITHIN points of clean accuracy to plain CLIP of its seed, and each attack gains at most as many over models
    that never saw poison; False where none were asked."""
    gains = [more(attack) for attack in run["attacks"].values()]
    return bool(all(gain <= WITHIN for gain in [100 * (clip["clean_top1"] - run["clean_top1"]), *gains]))


def difference_table(root):
    """Markdown: a row for each set and defended preset: what it costs and what it leaves of each attack, in points, over all seeds.

    Clean accuracy is held against plain CLIP's of the same seed, an attack's success against what models that never saw poison read as its target;
    mean difference and half of its 95 % interval (Student, over seeds).
    """
    runs, kinds = read_runs(root)
    lines = [
        "| data | preset | seeds | clean top-1 less plain CLIP's | "
        + " | ".join(f"{kind} less unpoisoned" for kind in kinds)
        + " |",
        "|---" * (4 + len(kinds)) + "|",
    ]
    for (name, preset), found in runs.items():
        plain = dict(runs.get((name, "clip"), ()))
        pairs = [(run, plain[seed]) for seed, run in found if seed in plain]
        if preset == "clip" or not pairs:
            continue
        clean_N = np.array([100 * (run["clean_top1"] - clip["clean_top1"]) for run, clip in pairs])
        more_KN = np.array([[more(run["attacks"][kind]) for run, _ in pairs] for kind in kinds])
        cells = [interval(values_N) for values_N in (clean_N, *more_KN)]
        lines.append(f"| {name} | {preset} | {len(pairs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_worst(shares):
    """ "0.1% / 0.4%"; "?" where one is not known, as of runs that were evaluated by an earlier version."""
    return "?" if None in shares else f"{percent(np.mean(shares))} / {percent(max(shares))}"


def more(attack):
    """Points by which an attack succeeds more often than on models that never saw poison; nan where none were asked."""
    return np.nan if attack["unpoisoned"] is None else 100 * (attack["success"] - attack["unpoisoned"])


def interval(values_N):
    """ "+1.2 ± 0.8": the mean and half of its 95 % interval (Student)."""
    if len(values_N) < 2 or np.isnan(values_N).any():
        return f"{values_N.mean():+.1f}"
    half = stats.t.ppf(0.975, len(values_N) - 1) * values_N.std(ddof=1) / len(values_N) ** 0.5
    return f"{values_N.mean():+.1f} ± {half:.1f}"


def runs_table(root):
    """Markdown: a row for each run."""
    runs, kinds = read_runs(root)
    attacks = " | ".join(f"{kind} success (base; unpoisoned), true class (unpoisoned)" for kind in kinds)
    lines = [
        f"| data | preset | seed | clean top-1 | {attacks} | poison in the last safe set | poison ever trained on | views |"
    ]
    lines.append("|---" * (7 + len(kinds)) + "|")
    for (name, preset), found in runs.items():
        for seed, run in found:
            cells = [
                f"{percent(a['success'])} ({percent(a['base'])}; {percent(a['unpoisoned'])}), "
                f"{percent(a['true_class'])} ({percent(a['unpoisoned_true_class'])})"
                + ("" if a["took"] else " did not take")
                for a in (run["attacks"][kind] for kind in kinds)
            ]
            poison = percent(run["poison_in_safe_set"][-1]) if run["poison_in_safe_set"] else ""
            head = f"| {name} | {preset} | {seed} | {percent(run['clean_top1'])} | "
            cells += [poison, percent(run.get("poison_trained_on")), f"{run['sample_views']:,}"]
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_of(values):
    """The mean of equal-shaped JSON values, number by number; True only where all are. None where they are no numbers."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_of([value[key] for value in values]) for key in first}
    if isinstance(first, bool):
        return all(values)
    return sum(values) / len(values) if all(isinstance(value, (int, float)) for value in values) else None


if __name__ == "__main__":
    root = sys.argv[1]
    print(
        f"{summary_table(root)}\n\nBy groups of seeds:\n\n{summary_table(root, GROUPS)}\n\n"
        f"Differences over all seeds, in points, with their 95 % intervals:\n\n{difference_table(root)}\n\nEvery run:\n\n{runs_table(root)}"
    )
