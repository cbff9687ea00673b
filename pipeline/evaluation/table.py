"""The comparison of plain CLIP and SafeCLIP: tables, result.json and a picture."""

import sys
from pathlib import Path

from pipeline.evaluation.report import read_eval, read_metrics
from shards.storage import write_json

SEEDS = (
    (0, 2),
    (3, 5),
    (6, 8),
)  # those that settings were chosen on, those that they were not, those that nobody had looked at


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


def summary_table(root):
    """Markdown: a row for each set, preset and group of seeds: the mean, the worst seed, and the mean base rate."""
    runs, kinds = read_runs(root)
    lines = [
        "| data | preset | seeds | clean top-1, mean / worst | "
        + " | ".join(f"{k}, mean / worst (unpoisoned)" for k in kinds)
        + " |"
    ]
    lines.append("|---" * (4 + len(kinds)) + "|")
    for (name, preset), found in runs.items():
        for low, high in SEEDS:
            group = [run for seed, run in found if low <= seed <= high]
            if not group:
                continue
            mean, clean, cells = mean_of(group), [run["clean_top1"] for run in group], []
            for kind in kinds:
                attack, worst = mean["attacks"][kind], max(run["attacks"][kind]["success"] for run in group)
                void = "" if attack["took"] else " did not take"
                cells.append(f"{percent(attack['success'])} / {percent(worst)} ({percent(attack['unpoisoned'])}){void}")
            head = f"| {name} | {preset} | {low} to {high} | {percent(mean['clean_top1'])} / {percent(min(clean))} | "
            lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs_table(root):
    """Markdown: a row for each run."""
    runs, kinds = read_runs(root)
    attacks = " | ".join(f"{kind} success (base; unpoisoned), true class (unpoisoned)" for kind in kinds)
    lines = [f"| data | preset | seed | clean top-1 | {attacks} | poison in the last safe set | views |"]
    lines.append("|---" * (6 + len(kinds)) + "|")
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
            lines.append(head + " | ".join(cells) + f" | {poison} | {run['sample_views']:,} |")
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
    print(f"{summary_table(sys.argv[1])}\n\nEvery run:\n\n{runs_table(sys.argv[1])}")
