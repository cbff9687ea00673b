"""The pictures of a comparison: attack success against clean accuracy, and over the number of poisoned pairs."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from pipeline.evaluation.comparison.defences import DEFENCES  # noqa: E402
from pipeline.evaluation.comparison.table import mean, rate_rows  # noqa: E402

# Undefended grey, filters blue, fine-tuning and other training pink and brown, SafeCLIP orange and red, the oracle green.
SHADES = "#222222 #888888 #1f77b4 #9ecae1 #17becf #0b3d91 #e377c2 #8c564b #ff7f0e #ffbb78 #d62728 #2ca02c"
COLOURS = dict(zip(DEFENCES, SHADES.split()))
MARKERS = dict(zip(DEFENCES, "os^v<>DPX*hd"))


def draw(sets, path):
    """A panel for each of `sets` (table.SetRows): of each defence the mean success of the attacks that take, large, and each attack, small."""
    figure, axes = plt.subplots(1, len(sets), figsize=(6.4 * len(sets), 5.4), layout="constrained", squeeze=False)
    for axis, found in zip(axes[0], sets):
        took = [attack for attack in found.attacks if not found.void(attack)]
        for defence in dict.fromkeys(defence for defence, _ in found.blocks):
            points = []
            for group, name in took:
                rows = [row for row in found.of(defence, group) if name in row["attacks"]]
                if rows:
                    success = mean([row["attacks"][name]["success"] for row in rows])
                    points.append((100 * mean([row["clean_top1"] for row in rows]), 100 * success))
            if points:
                style = {"color": COLOURS[defence], "marker": MARKERS[defence]}
                axis.scatter(*zip(*points), s=14, alpha=0.35, linewidths=0, **style)
                x, y = (mean(values) for values in zip(*points))
                axis.scatter(x, y, s=110, edgecolors="black", linewidths=0.6, zorder=3, label=defence, **style)
        axis.set(title=f"{found.name}: {len(took)} attacks that take", xlabel="clean top-1 (%)", ylim=(-3, 103))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("attack success (%): mean (large), each attack (small)")
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_rates(name, rows, path):
    """A panel for each attack of the set's rate curves: its success over the number of poisoned pairs, mean and range over runs."""
    found = rate_rows(name, rows)
    attacks = list(dict.fromkeys(attack for attack, _, _ in found))
    figure, axes = plt.subplots(1, len(attacks), figsize=(4.6 * len(attacks), 4.2), layout="constrained", squeeze=False)
    for axis, attack in zip(axes[0], attacks):
        for defence in dict.fromkeys(defence for of, defence, _ in found if of == attack):
            counts = sorted(count for of, by, count in found if (of, by) == (attack, defence))
            values = [[100 * row["attacks"][attack]["success"] for row in found[attack, defence, n]] for n in counts]
            clean = mean([100 * row["clean_top1"] for n in counts for row in found[attack, defence, n]])
            label = f"{defence} (clean {clean:.1f} %)"
            axis.plot(counts, [mean(v) for v in values], color=COLOURS[defence], marker=MARKERS[defence], label=label)
            axis.fill_between(
                counts, [min(v) for v in values], [max(v) for v in values], color=COLOURS[defence], alpha=0.15
            )
        axis.set(title=f"{name}: {attack}", xlabel="poisoned pairs", xscale="log", ylim=(-3, 103))
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("attack success (%)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
