"""The pictures of a comparison: attack success against clean accuracy, and over the number of poisoned pairs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from pipeline.evaluation.comparison.defences import DEFENCES  # noqa: E402
from pipeline.evaluation.comparison.rows import NEVER, GroupRows, mean, rate_of, rate_rows  # noqa: E402

# Undefended grey, filters blue, fine-tuning and other training pink and brown, SafeCLIP orange and red, the oracle
# green.
SHADES = (
    "#222222 #888888 #1f77b4 #9ecae1 #17becf #0b3d91 #e377c2 #8c564b #ff7f0e #ffbb78 #d62728 #8b0000 #9467bd #bcbd22 "
    "#2ca02c"
)
COLOURS = {**dict(zip(DEFENCES, SHADES.split(), strict=True)), NEVER: "#2ca02c"}
MARKERS = {**dict(zip(DEFENCES, "os^v<>DPX*hHp8d", strict=True)), NEVER: "x"}


def draw(groups: list[GroupRows], path: Path) -> None:
    """A line of panels for each set, a panel for each of its groups: of each defence the mean success of the attacks
    that take undefended, large, and each attack, small. Groups of which none takes are left out, or else all stay."""
    groups = [one for one in groups if not all(map(one.void, one.attacks))] or groups
    names = list(dict.fromkeys(one.name for one in groups))
    columns = max(sum(one.name == name for one in groups) for name in names)
    size = (4.4 * columns + 2, 4.2 * len(names))
    figure, axes = plt.subplots(len(names), columns, figsize=size, layout="constrained", squeeze=False, sharex="row")
    for line, name in zip(axes, names):
        of_set = [one for one in groups if one.name == name]
        for axis, found in zip(line, of_set):
            panel(axis, found)
        for axis in line[len(of_set) :]:
            axis.set_axis_off()
        line[0].set_ylabel("attack success (%): mean (large), each attack (small)")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        there = [name for name in DEFENCES if name in handles]
        figure.legend([handles[name] for name in there], there, loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def panel(axis: Axes, found: GroupRows) -> None:
    """Draw one group's defences."""
    took = [attack for attack in found.attacks if found.void(attack) is False]
    for defence in dict.fromkeys(defence for defence, _ in found.blocks):
        points = []
        for attack in took:
            rows = [row for row in found.of(defence) if attack in row["attacks"]]
            if rows:
                points.append((100 * mean([row["clean_top1"] for row in rows]), 100 * rate_of(rows, attack)))
        if points:
            style: dict = {"color": COLOURS[defence], "marker": MARKERS[defence]}
            x, y = zip(*points)
            axis.scatter(x, y, s=14, alpha=0.35, linewidths=0, **style)
            axis.scatter(mean(x), mean(y), s=90, edgecolors="black", linewidths=0.6, zorder=3, label=defence, **style)
    title = f"{found.name} {found.group}: {len(took)} of {len(found.attacks)} attacks take"
    if not found.of("none"):
        title = f"{found.name} {found.group}: undefended not run"
    axis.set(title=title, xlabel="clean top-1 (%)", ylim=(-3, 103))
    axis.grid(alpha=0.25)


def draw_rates(name: str, rows: list[dict], path: Path) -> None:
    """A panel for each attack of the set's rate curves: its success over the number of poisoned pairs, mean and range
    over runs."""
    found = rate_rows(name, rows)
    attacks = list(dict.fromkeys(attack for attack, _, _ in found))
    figure, axes = plt.subplots(1, len(attacks), figsize=(4.6 * len(attacks), 4.2), layout="constrained", squeeze=False)
    for axis, attack in zip(axes[0], attacks):
        for defence in dict.fromkeys(defence for of, defence, _ in found if of == attack):
            counts = sorted(count for of, by, count in found if (of, by) == (attack, defence))
            values = [[100 * row["attacks"][attack]["success"] for row in found[attack, defence, n]] for n in counts]
            clean = [mean([100 * row["clean_top1"] for row in found[attack, defence, n]]) for n in counts]
            label = f"{defence} (clean {min(clean):.1f} to {max(clean):.1f} %)"
            axis.plot(counts, [mean(v) for v in values], color=COLOURS[defence], marker=MARKERS[defence], label=label)
            axis.fill_between(
                counts, [min(v) for v in values], [max(v) for v in values], color=COLOURS[defence], alpha=0.15
            )
        axis.set(title=f"{name}: {attack}", xlabel="poisoned pairs", xscale="log", ylim=(-3, 103))
        ticks = sorted({count for of, _, count in found if of == attack})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("attack success (%)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
