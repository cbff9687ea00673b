"""The report of a comparison: comparison.md and its pictures beside the results file."""

from pipeline.configfile import read_yaml
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.picture import draw, draw_rates
from pipeline.evaluation.comparison.protocol import SEEDS
from pipeline.evaluation.comparison.results import read_results
from pipeline.evaluation.comparison.table import (
    SetRows,
    attack_table,
    knowledge_table,
    main_table,
    rate_rows,
    rate_table,
    selection_table,
)
from shards.storage import write_bytes

HEAD = """# Defences of CLIP pre-training, compared

Written by `launch/reproduce.sh` from `{results}`; `launch/reproduce.sh --report-only` writes it again. Percentages.

Clean top-1: mean over seeds ± half of its 95 % interval. Attacks: success, mean / worst run, and in brackets the rate at which plain CLIP that
never saw poison reads the triggered pictures so (? = not run). void: undefended the attack succeeds in less than 80 % on average, so that its
column shows nothing. † marks attacks, and seeds of a set, that rules may be chosen on (README.md); a figure is evidence for a rule only where one of the
two bears no mark.

{defences}
"""


def write_report(results, definition):
    """Write comparison.md, comparison.png and, where there are rate curves, rates_SET.png beside the file `results`; returns a line. Raises UserError."""
    rows, folder = read_results(results), results.parent
    if not rows:
        return f"{results}: no finished cells yet"
    about = "\n".join(f"- **{name}**: {defence.about}" for name, defence in DEFENCES.items())
    parts = [HEAD.format(results=results.name, defences=about)]
    names = list(dict.fromkeys(row["set"] for row in rows))
    sets = [found for found in (SetRows(name, rows) for name in names) if found.poisoned]
    if sets:
        draw(sets, folder / "comparison.png")
        parts.append("![attack success against clean accuracy](comparison.png)\n")
    for found in sets:
        parts += [f"## {found.name}\n", main_table(found) + "\n"]
        parts += [
            "Poison told from honest pairs, at the last round of selection or by a filter's mask:\n",
            selection_table(found) + "\n",
        ]
        parts += [
            "What the models know, and what they cost (training, and what comes before it):\n",
            knowledge_table(found) + "\n",
        ]
        parts += [f"<details><summary>{found.name}: every attack</summary>\n", attack_table(found), "\n</details>\n"]
    for name in names:
        if rate_rows(name, rows):
            draw_rates(name, rows, folder / f"rates_{name}.png")
            parts += [f"## {name}: how many poisoned pairs it takes\n", "Clean top-1, and success, mean / worst run.\n"]
            parts += [
                rate_table(name, rows) + "\n",
                f"![success over the number of poisoned pairs](rates_{name}.png)\n",
            ]
    parts += ["## Not run\n", not_run(rows, definition) + "\n", f"Commits: {', '.join(commits(rows))}."]
    path = folder / "comparison.md"
    write_bytes(path, ("\n".join(parts) + "\n").encode())
    return f"{path}: {len(rows)} cells of {', '.join(names)}"


def commits(rows):
    return dict.fromkeys(str(row["commit"]) for row in rows)


def not_run(rows, definition):
    """Markdown list: of the whole comparison, every defence on every group, seeds 0 to 2, and the controls, what has no row."""
    there = {
        (row["set"], row["group"] if row["poisoned"] else "no poison", row["defence"], row["seed"]) for row in rows
    }
    lines = []
    for name, entry in read_yaml(definition).items():
        lacking = []
        for defence, rule in DEFENCES.items():
            groups = [*map(str, entry["attacks"]), *(["no poison"] if rule.control else [])]
            missing = {g: [s for s in SEEDS if (name, g, defence, s) not in there] for g in groups}
            if all(len(found) == len(SEEDS) for found in missing.values()):
                lacking.append(defence)
            elif any(missing.values()):
                text = "; ".join(f"{g}: seeds {' '.join(map(str, found))}" for g, found in missing.items() if found)
                lacking.append(f"{defence} ({text})")
        if lacking:
            lines.append(f"- {name}: {', '.join(lacking)}")
    return "\n".join(lines) or "Nothing: every defence stands on every group, seeds 0 to 2."
