"""The tables of a comparison, as Markdown, from the rows of its results file. Percentages; means over the runs that a
line counts."""

import numpy as np
from scipy import stats
from scipy.stats import binomtest

from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.protocol import may_be_chosen_on
from pipeline.evaluation.comparison.rows import GroupRows, mean, rate_of, rate_rows

ANCHOR = "| *CASCADE (2026), on CC3M, as published* | | | | 100.0 | 5.8 | 0.987 | 5.8 | |"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table of lists of cells."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def main_table(found: GroupRows) -> str:
    """Clean accuracy beside each attack's success: mean / worst run (models that never saw poison)."""
    head = ["defence", "seeds", "runs", "clean top-1", *map(found.title, found.attacks)]
    lines = []
    for defence, chosen in found.blocks:
        rows = found.of(defence, chosen)
        lines.append([defence, *runs(rows), *(success_cell(found, attack, rows) for attack in found.attacks)])
    for defence in DEFENCES:
        if rows := found.of(defence, controls=True):
            rates = [f"({percent(rate_of(rows, attack))})" for attack in found.attacks]
            lines.append([f"{defence}, no poison", *runs(rows), *rates])
    return markdown(head, lines)


def success_cell(found: GroupRows, attack: str, rows: list[dict]) -> str:
    """ "1.2 / 3.4 (5.6)", marked void where the attack does not take undefended; "" where it was not run."""
    values = [row["attacks"][attack]["success"] for row in rows if attack in row["attacks"]]
    if not values:
        return ""
    text = f"{percent(mean(values))} / {percent(max(values))} ({percent(found.unpoisoned(attack, rows))})"
    void = found.void(attack, rows)
    return text if void is False else f"void: {text}" if void else f"{text}, undefended not run"


def summary_table(groups: list[GroupRows], chosen: bool) -> str:
    """All groups of a set together, of seeds that rules may be chosen on, or of the others: over the runs that all its
    lines have. Lines: the defences with at least half as many runs as the one with most.

    groups: of the set. "" where such runs are of fewer than two groups, or no attack takes in them.
    """
    there = {name: {(one.group, row["seed"]) for one in groups for row in one.of(name, chosen)} for name in DEFENCES}
    most = max(map(len, there.values()))
    names = [name for name, found in there.items() if found and len(found) >= most / 2]
    shared = set.intersection(*(there[name] for name in names)) if len(names) > 1 else set()
    of_shared = {one: [r for r in one.poisoned if (r["group"], r["seed"]) in shared] for one in groups}
    took = [(one, attack) for one in groups for attack in one.attacks if one.void(attack, of_shared[one]) is False]
    took = [(one, attack) for one, attack in took if of_shared[one]]
    if len({group for group, _ in shared}) < 2 or not took:
        return ""
    head = ["defence", "seeds", "runs", "clean top-1", f"{len(took)} attacks that take, mean / worst attack"]
    lines = []
    for name in names:
        rows = {one: [r for r in one.of(name, chosen) if (r["group"], r["seed"]) in shared] for one in groups}
        rates = [rate for one, attack in took if (rate := rate_of(rows[one], attack)) is not None]
        text = f"{percent(mean(rates))} / {percent(max(rates))}" if rates else ""
        lines.append([name, *runs([row for found in rows.values() for row in found]), text])
    where = "; ".join(
        f"{group}: seeds {' '.join(str(s) for g, s in sorted(shared) if g == group)}"
        for group in sorted({group for group, _ in shared})
    )
    return f"Groups together, over the runs that all these defences have ({where}):\n\n{markdown(head, lines)}\n"


def excess_table(groups: list[GroupRows]) -> str:
    """Success above the rate of plain CLIP of the same seed that never saw poison, over the attacks that take: mean
    over attacks and seeds, the largest means of an attack, and the worst run. groups: of one set."""
    head = ["defence", "seeds", "attacks", "mean", "three worst attacks", "worst run"]
    lines = []
    for defence, chosen in ((name, chosen) for name in DEFENCES for chosen in (True, False)):
        rows = [(one, row) for one in groups for row in one.of(defence, chosen)]
        above: dict[str, dict[int, float]] = {}  # {attack: {seed: fraction}}
        for one, row in rows:
            block = one.of(defence, chosen)
            for attack in (name for name in row["attacks"] if one.void(name, block) is False):
                never = one.unpoisoned(attack, [row])
                if never is not None:
                    success = row["attacks"][attack]["success"]
                    above.setdefault(f"{one.group} {one.title(attack)}", {})[row["seed"]] = success - never
        if above:
            seeds = {seed for found in above.values() for seed in found}
            by_seed = [mean(found.get(seed) for found in above.values()) for seed in seeds]
            by_attack = sorted(((mean(found.values()), name) for name, found in above.items()), reverse=True)
            worst = max(
                (value, f"{name}, seed {seed}") for name, found in above.items() for seed, value in found.items()
            )
            cells = [runs([row for _, row in rows if row["seed"] in seeds])[0], str(len(above)), with_interval(by_seed)]
            cells += [
                "; ".join(f"{percent(value)} {name}" for value, name in several) for several in (by_attack[:3], [worst])
            ]
            lines.append([defence, *cells])
    return markdown(head, lines) if lines else ""


def knowledge_table(found: GroupRows) -> str:
    """What the models know, and what they cost beside plain CLIP on the same poison."""
    recall = [
        (f"{short} R@{k}", (way, f"r{k}"))
        for short, way in (("I→T", "image_to_text"), ("T→I", "text_to_image"))
        for k in (1, 5, 10)
    ]
    head = ["defence", "seeds", "runs", "top-1", "top-5", "linear probe", *(name for name, _ in recall)]
    head += ["sample views", "time / none's"]
    lines = []
    for defence, chosen in found.blocks:
        rows = found.of(defence, chosen)
        cells = [*runs(rows), *(with_interval([row[key] for row in rows]) for key in ("clean_top5", "linear_probe"))]
        for _, (way, k) in recall:
            values = [row["retrieval"][way][k] for row in rows if row["retrieval"]]
            cells.append(percent(mean(values)) if values else "")
        cells.append(f"{np.mean([row['sample_views'] for row in rows]):,.0f}")
        lines.append([defence, *cells, times_none(found, rows)])
    return markdown(head, lines)


def times_none(found: GroupRows, rows: list[dict]) -> str:
    """ "1.30": seconds of training, what comes before included, over those of plain CLIP on the same poison and
    seed."""
    plain = {row["seed"]: row["seconds"] for row in found.of("none") if row["seconds"] > 0}
    ratios = [(r["seconds"] + r["seconds_before"]) / plain[r["seed"]] for r in rows if r["seed"] in plain]
    return f"{np.mean(ratios):.2f}" if ratios else "?"


def selection_table(found: GroupRows) -> str:
    """Detection quality of each defence at its last selection round, or of its mask."""
    head = ["defence", "seeds", "runs", "clean top-1", "poison recall, mean / worst", "false positives", "AUROC"]
    head += ["false positives at 100 % recall", "poison trained on after the first round, mean / worst"]
    lines = []
    for defence, chosen in found.blocks:
        rows = found.of(defence, chosen)
        last = {
            key: [row["rounds"][key][-1] for row in rows if row["rounds"] and row["rounds"][key]]
            for key in ("recall", "false_positives", "auroc", "fpr_at_full_recall")
        }
        recall = last["recall"]
        cells = [f"{percent(mean(recall))} / {percent(min(recall))}" if recall else "no selection"]
        cells.append(percent(mean(last["false_positives"])) if recall else "")
        auroc = mean(last["auroc"])
        cells.append("" if auroc is None else f"{auroc:.3f}")
        cells.append(percent(mean(last["fpr_at_full_recall"])) if auroc is not None else "")
        seen = [row["poison_trained_on"] for row in rows if row["poison_trained_on"] is not None]
        cells.append(f"{percent(mean(seen))} / {percent(max(seen))}" if seen else "?")
        lines.append([defence, *runs(rows), *cells])
    return f"{markdown(head, lines)}\n{ANCHOR}"


def attack_table(found: GroupRows) -> str:
    """Every attack under every defence: success with Wilson's interval over all runs' pictures, and what the pictures
    are read as otherwise."""
    head = ["attack", "defence", "seeds", "runs", "clean top-1", "success", "95 %", "without trigger"]
    head += ["never saw poison", "true class", "true class, never saw poison", "poison recall"]
    head += ["false positives at 100 % recall"]
    lines = []
    for attack in found.attacks:
        for defence, chosen in found.blocks:
            rows = [row for row in found.of(defence, chosen) if attack in row["attacks"]]
            if not rows:
                continue
            judged = [row["attacks"][attack] for row in rows]
            cells = [percent(rate_of(rows, attack)) + (" void" if found.void(attack, rows) else ""), interval(judged)]
            cells.append(percent(rate_of(rows, attack, "base")))
            cells += [percent(found.unpoisoned(attack, rows)), percent(rate_of(rows, attack, "true_class"))]
            cells.append(percent(found.unpoisoned(attack, rows, "true_class")))
            for key in ("recall", "fpr_at_full_recall"):
                last = [one["rounds"][key][-1] for one in judged if one.get("rounds") and one["rounds"].get(key)]
                cells.append(percent(mean(last)) if last else "")
            lines.append([found.title(attack), defence, *runs(rows), *cells])
    return markdown(head, lines)


def interval(judged: list[dict]) -> str:
    """ "1.2 to 3.4": Wilson's 95 % interval of the success over all pictures of the runs."""
    count, hits = (sum(one["count"] for one in judged), sum(one["success"] * one["count"] for one in judged))
    found = binomtest(round(hits), count).proportion_ci(method="wilson")
    return f"{percent(found.low)} to {percent(found.high)}"


def rate_table(name: str, rows: list[dict]) -> str:
    """Attack success over the number of poisoned pairs, clean accuracy beside it: mean / worst run. `rows`:
    `counted`."""
    found = rate_rows(name, rows)
    counts = sorted({count for _, _, count in found})
    head = ["attack", "defence", *(f"{count} pairs: runs, clean top-1, success" for count in counts)]
    lines = []
    for attack, defence in dict.fromkeys((attack, defence) for attack, defence, _ in found):
        cells = []
        for count in counts:
            rows = found.get((attack, defence, count), [])
            values = [row["attacks"][attack]["success"] for row in rows]
            clean = percent(mean([row["clean_top1"] for row in rows]))
            cells.append(f"{len(rows)}, {clean}, {percent(mean(values))} / {percent(max(values))}" if rows else "")
        lines.append([attack, defence, *cells])
    return markdown(head, lines)


def runs(rows: list[dict]) -> list[str]:
    """["0 1 2†", "3", "68.9 ± 0.4"]: cells of the seeds, with a mark where rules may be chosen on them, the runs,
    and clean top-1."""
    found = sorted({row["seed"] for row in rows})
    mark = "†" if may_be_chosen_on(rows[0]["set"], "badnets", found[0]) else ""
    by_seed = [mean([row["clean_top1"] for row in rows if row["seed"] == seed]) for seed in found]
    return [" ".join(map(str, found)) + mark, str(len(rows)), with_interval(by_seed)]


def with_interval(values: list[float | None]) -> str:
    """ "68.9 ± 0.4": mean over seeds, and half of its 95 % interval (Student); "" where there is none."""
    known = 100 * np.array([value for value in values if value is not None])
    if len(known) < 2:
        return f"{known[0]:.1f}" if len(known) else ""
    half = stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5
    return f"{percent(known.mean() / 100)} ± {half:.1f}"


def percent(fraction: float | None) -> str:
    """ "12.3", "?" of None."""
    return "?" if fraction is None else f"{round(100 * fraction, 1) + 0.0:.1f}"  # no -0.0
