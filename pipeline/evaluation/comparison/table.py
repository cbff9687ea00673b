"""The tables of a comparison, as Markdown, from the rows of its results file. Percentages; means over runs."""

import numpy as np
from scipy import stats
from scipy.stats import binomtest

from pipeline.evaluation.comparison.cells import place_of
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.protocol import CHOSEN_SEEDS, TOOK, may_be_chosen_on

ANCHOR = "| *CASCADE (2026), on CC3M, as published* | | | 100.0 | 5.8 | 0.987 | 5.8 | |"


class SetRows:
    """The rows of one set, of poisoned sets that stand in no rate curve; of each cell the last.

    blocks: [(defence, seeds)]: the defences in their order, seeds that rules may be chosen on apart from others. attacks: [(group, name)].
    """

    def __init__(self, name, rows):
        self.name = name
        last = {place_of(row): row for row in rows if row["set"] == name}
        rows = [row for row in last.values() if not row["group"].startswith("rate")]
        self.poisoned = [row for row in rows if row["poisoned"]]
        self.controls = [row for row in rows if not row["poisoned"]]
        self.attacks = sorted(
            {(r["group"], attack) for r in self.poisoned for attack in r["attacks"]}, key=lambda a: a[0]
        )
        order = {a: n for n, a in enumerate((r["group"], name) for r in self.poisoned for name in r["attacks"])}
        self.attacks.sort(key=lambda a: (a[0], order[a]))
        self.blocks = [
            (defence, seeds) for defence in DEFENCES for seeds in (True, False) if self.of(defence, chosen=seeds)
        ]

    def of(self, defence, group=None, chosen=None, controls=False):
        """Rows of a defence, of one group, of seeds that rules may be chosen on or of the others (None: of all)."""
        return [
            row
            for row in (self.controls if controls else self.poisoned)
            if row["defence"] == defence
            and group in (None, row["group"])
            and chosen in (None, row["seed"] in CHOSEN_SEEDS)
        ]

    def undefended(self, attack):
        """Mean success of an attack, (group, name), on plain CLIP; None where that was not run."""
        return mean(
            [row["attacks"][attack[1]]["success"] for row in self.of("none", attack[0]) if attack[1] in row["attacks"]]
        )

    def void(self, attack):
        """Whether the attack did not take, so that it shows nothing; None where that is not known."""
        success = self.undefended(attack)
        return None if success is None else success < TOOK

    def unpoisoned(self, attack, key="success"):
        """Mean rate of plain CLIP that never saw poison; None where it was not run."""
        rows = self.of("none", attack[0], controls=True)
        return mean([row["attacks"][attack[1]][key] for row in rows if attack[1] in row["attacks"]])

    def title(self, attack):
        """The attack's name, with its group where two have it, and a mark where rules may be chosen on it."""
        twice = [name for _, name in self.attacks].count(attack[1]) > 1
        mark = "†" if may_be_chosen_on(self.name, attack[1], CHOSEN_SEEDS[0]) else ""
        return f"{attack[1]} ({attack[0]}){mark}" if twice else f"{attack[1]}{mark}"


def main_table(found):
    """Clean accuracy beside each attack's success: mean / worst run (models that never saw poison). `found`: SetRows."""
    head = ["defence", "seeds", "clean top-1", *(found.title(attack) for attack in found.attacks)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for defence, chosen in found.blocks:
        rows = found.of(defence, chosen=chosen)
        cells = [success_cell(found, attack, rows) for attack in found.attacks]
        lines.append(
            f"| {defence} | {seeds(rows, found.name)} | {by_seed(rows, 'clean_top1')} | " + " | ".join(cells) + " |"
        )
    for defence in dict.fromkeys(row["defence"] for row in found.controls):
        rows = found.of(defence, controls=True)
        cells = [f"({percent(rate_of(rows, attack))})" for attack in found.attacks]
        lines.append(
            f"| {defence}, no poison | {seeds(rows, found.name)} | {by_seed(rows, 'clean_top1')} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines)


def success_cell(found, attack, rows):
    """ "1.2 / 3.4 (5.6)", marked void where the attack does not take undefended; "" where it was not run."""
    values = [
        row["attacks"][attack[1]]["success"]
        for row in rows
        if row["group"] == attack[0] and attack[1] in row["attacks"]
    ]
    if not values:
        return ""
    text = f"{percent(mean(values))} / {percent(max(values))} ({percent(found.unpoisoned(attack))})"
    void = found.void(attack)
    return text if void is False else f"void: {text}" if void else f"{text}, undefended not run"


def rate_of(rows, attack):
    return mean(
        [
            row["attacks"][attack[1]]["success"]
            for row in rows
            if row["group"] == attack[0] and attack[1] in row["attacks"]
        ]
    )


def knowledge_table(found):
    """What the models know, and what they cost beside plain CLIP on the same poison."""
    recall = [
        (f"{short} R@{k}", (way, f"r{k}"))
        for short, way in (("I→T", "image_to_text"), ("T→I", "text_to_image"))
        for k in (1, 5, 10)
    ]
    head = [
        "defence",
        "seeds",
        "top-1",
        "top-5",
        "linear probe",
        *(name for name, _ in recall),
        "sample views",
        "time / none's",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for defence, chosen in found.blocks:
        rows = found.of(defence, chosen=chosen)
        cells = [by_seed(rows, key) for key in ("clean_top1", "clean_top5", "linear_probe")]
        for _, (way, k) in recall:
            values = [row["retrieval"][way][k] for row in rows if row["retrieval"]]
            cells.append(percent(mean(values)) if values else "")
        cells.append(f"{np.mean([row['sample_views'] for row in rows]):,.0f}")
        cells.append(times_none(found, rows))
        lines.append(f"| {defence} | {seeds(rows, found.name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def times_none(found, rows):
    """ "1.30": seconds of training, what comes before included, over those of plain CLIP on the same poison and seed."""
    plain = {(row["group"], row["seed"]): row["seconds"] for row in found.of("none")}
    ratios = [
        (r["seconds"] + r["seconds_before"]) / plain[r["group"], r["seed"]]
        for r in rows
        if (r["group"], r["seed"]) in plain
    ]
    return f"{np.mean(ratios):.2f}" if ratios else "?"


def selection_table(found):
    """How well each defence told poison from honest pairs at its last round, or by its mask."""
    head = ["defence", "seeds", "clean top-1", "poison recall, mean / worst", "false positives", "AUROC"]
    head += ["false positives at 100 % recall", "poison ever trained on, mean / worst"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for defence, chosen in found.blocks:
        rows = found.of(defence, chosen=chosen)
        last = {
            key: [row["rounds"][key][-1] for row in rows if row["rounds"] and row["rounds"].get(key)]
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
        lines.append(
            f"| {defence} | {seeds(rows, found.name)} | {by_seed(rows, 'clean_top1')} | " + " | ".join(cells) + " |"
        )
    return "\n".join([*lines, ANCHOR])


def attack_table(found):
    """Every attack under every defence: success with Wilson's interval over all runs' pictures, and what the pictures are read as otherwise."""
    head = ["attack", "defence", "seeds", "clean top-1", "success", "95 %", "without trigger", "never saw poison"]
    head += ["true class", "true class, never saw poison", "poison recall", "false positives at 100 % recall"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for attack in found.attacks:
        for defence, chosen in found.blocks:
            rows = [row for row in found.of(defence, attack[0], chosen) if attack[1] in row["attacks"]]
            if not rows:
                continue
            judged = [row["attacks"][attack[1]] for row in rows]
            count = sum(one["count"] for one in judged)
            interval = binomtest(round(sum(one["success"] * one["count"] for one in judged)), count).proportion_ci(
                method="wilson"
            )
            cells = [percent(mean([one["success"] for one in judged])) + (" void" if found.void(attack) else "")]
            cells.append(f"{percent(interval.low)} to {percent(interval.high)}")
            cells.append(percent(mean([one["base"] for one in judged])))
            cells += [percent(found.unpoisoned(attack)), percent(mean([one["true_class"] for one in judged]))]
            cells.append(percent(found.unpoisoned(attack, "true_class")))
            for key in ("recall", "fpr_at_full_recall"):
                last = [one["rounds"][key][-1] for one in judged if one.get("rounds") and one["rounds"].get(key)]
                cells.append(percent(mean(last)) if last else "")
            line = [found.title(attack), defence, seeds(rows, found.name), by_seed(rows, "clean_top1"), *cells]
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def rate_table(name, rows):
    """Attack success over the number of poisoned pairs, clean accuracy beside it: mean / worst run (models that never saw poison)."""
    found = rate_rows(name, rows)
    counts = sorted({count for _, _, count in found})
    head = ["attack", "defence", *(f"{count} pairs: clean top-1, success" for count in counts)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for attack, defence in dict.fromkeys((attack, defence) for attack, defence, _ in found):
        cells = []
        for count in counts:
            runs = found.get((attack, defence, count), [])
            values = [row["attacks"][attack]["success"] for row in runs]
            clean = mean([row["clean_top1"] for row in runs])
            cells.append(f"{percent(clean)}, {percent(mean(values))} / {percent(max(values))}" if runs else "")
        lines.append(f"| {attack} | {defence} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rate_rows(name, rows):
    """{(attack, defence, number of pairs): rows} of a set's rate curves, attacks and defences in their order."""
    last = {place_of(row): row for row in rows if row["set"] == name and row["poisoned"]}
    rows = [row for row in last.values() if row["group"].startswith("rate")]
    found = {}
    for attack in dict.fromkeys(attack for row in rows for attack in row["attacks"]):
        for defence in DEFENCES:
            for row in rows:
                if row["defence"] == defence and attack in row["attacks"]:
                    found.setdefault((attack, defence, int(row["group"].removeprefix("rate"))), []).append(row)
    return found


def by_seed(rows, key):
    """ "68.9 ± 0.4": mean over seeds, each the mean of its groups, and half of its 95 % interval (Student); "" where there is none."""
    found = {}
    for row in rows:
        if row[key] is not None:
            found.setdefault(row["seed"], []).append(row[key])
    means = 100 * np.array([np.mean(values) for values in found.values()])
    if len(means) < 2:
        return f"{means[0]:.1f}" if len(means) else ""
    half = stats.t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return f"{means.mean():.1f} ± {half:.1f}"


def seeds(rows, set_name):
    """ "0 1 2†": the seeds of rows, with a mark where rules may be chosen on them."""
    found = sorted({row["seed"] for row in rows})
    mark = "†" if may_be_chosen_on(set_name, "badnets", found[0]) else ""
    return " ".join(map(str, found)) + mark


def mean(values):
    """float, or None of nothing, and of values that are not known."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def percent(share):
    """ "12.3", "?" of None."""
    return "?" if share is None else f"{100 * share:.1f}"
