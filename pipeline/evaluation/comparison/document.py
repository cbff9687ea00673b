"""The report of a comparison: comparison.md and its pictures beside the results file."""

import textwrap
from pathlib import Path

from pipeline.config.load import read_yaml
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.picture import draw, draw_rates
from pipeline.evaluation.comparison.protocol import SEEDS
from pipeline.evaluation.comparison.results import read_results
from pipeline.evaluation.comparison.rows import GroupRows, counted, groups_of, mixtures, named, rate_rows
from pipeline.evaluation.comparison.sets import RATE
from pipeline.evaluation.comparison.table import (
    attack_table,
    excess_table,
    knowledge_table,
    main_table,
    rate_table,
    selection_table,
    summary_table,
)
from shards.storage.files import write_bytes

HEAD = """# Defences of CLIP pre-training, compared

Written by `launch/reproduce.sh` from `{results}`; `launch/reproduce.sh --report-only` writes it again. Percentages.

A table for each set and attack group: the attacks of a group share a poisoned set. Each line counts its own seeds,
`runs` of them. Clean top-1: mean over seeds ± half of its 95 % interval. Attacks: success, mean / worst run, and in
brackets the rate at which plain CLIP that never saw poison reads the triggered pictures so (? = not run). void: on
plain CLIP of the same seeds (of all seeds where these were not run) the attack succeeds in less than 80 % on average,
so that the cell shows nothing. † marks attacks, and seeds of a set, that rules may be chosen on (README.md); a figure
is evidence for a rule only where one of the two bears no mark.

{defences}
"""


def write_report(results: Path, definition: str | Path) -> str:
    """Write comparison.md, comparison.png and, where there are rate curves, rates_SET.png beside the file `results`;
    returns a line. Raises UserError."""
    found, folder = read_results(results), results.parent
    if not found:
        return f"{results}: no finished cells yet"
    about = "\n".join(f"- **{name}**: {defence.about}" for name, defence in DEFENCES.items())
    parts, rows = [HEAD.format(results=results.name, defences=about)], counted(found)
    names, groups = list(dict.fromkeys(row["set"] for row in rows)), groups_of(rows)
    if groups:
        draw(groups, folder / "comparison.png")
        parts.append("![attack success against clean accuracy](comparison.png)\n")
    for name in names:
        parts += section(name, [one for one in groups if one.name == name])
        if rate_rows(name, rows):
            draw_rates(name, rows, folder / f"rates_{name}.png")
            parts += [
                f"## {name}: how many poisoned pairs it takes\n",
                "Runs, clean top-1, and success, mean / worst run.\n",
            ]
            parts += [rate_table(name, rows) + "\n"]
            parts += mixtures([row for row in rows if row["set"] == name and RATE.fullmatch(row["group"])])
            parts.append(f"![success over the number of poisoned pairs](rates_{name}.png)\n")
    parts += ["## Not run\n", not_run(rows, definition) + "\n", *not_shown(found, groups)]
    parts.append(f"Commits: {', '.join(commits(rows))}.")
    path = folder / "comparison.md"
    write_bytes(path, (wrapped("\n".join(parts)) + "\n").encode())
    return f"{path}: {len(rows)} cells of {', '.join(names)}"


def wrapped(text: str) -> str:
    """Markdown in lines of 120 columns, tables aside."""

    def lines(line: str) -> list[str]:
        if len(line) <= 120 or line.startswith(("|", "![", "<")):
            return [line]
        return textwrap.wrap(line, 120, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False)

    return "\n".join(part for line in text.split("\n") for part in lines(line))


def section(name: str, groups: list[GroupRows]) -> list[str]:
    """Parts about one set. groups: its own."""
    parts = [f"## {name}\n"] if groups else []
    parts += [table for chosen in (True, False) if (table := summary_table(groups, chosen))]
    if table := excess_table(groups):
        parts += [f"Success above that of models of the same seed that never saw poison:\n\n{table}\n"]
    parts += mixtures([row for one in groups for row in (*one.poisoned, *one.controls)])
    for one in groups:
        parts += [f"### {name}, group {one.group}\n", main_table(one) + "\n"]
        parts += ["Detection of poison at the last selection round, or by the mask of a filter:\n"]
        parts += [selection_table(one) + "\n"]
        parts += ["What the models know, and what they cost (training, and what comes before it):\n"]
        parts += [knowledge_table(one) + "\n"]
        parts += [f"<details><summary>{name}, group {one.group}: every attack</summary>\n", attack_table(one)]
        parts += ["\n</details>\n"]
    return parts


def not_shown(found: list[dict], groups: list[GroupRows]) -> list[str]:
    """Parts about rows that stand in no table: of defences that there are no more, and of models that never saw poison
    alone."""
    tables = {(one.name, one.group) for one in groups}
    lines = []
    for row in found:
        why = "" if row["defence"] in DEFENCES else "no such defence"
        if not (row["poisoned"] or (row["set"], row["group"]) in tables or why):
            why = "no run on the poison of its group yet"
        if why:
            lines.append(f"- {row['set']}, group {row['group']}: {named([row])}: {why}")
    return ["## Not shown\n", "\n".join(lines) + "\n"] if lines else []


def commits(rows: list[dict]) -> dict[str, None]:
    return dict.fromkeys(str(row["commit"]) for row in rows)


def not_run(rows: list[dict], definition: str | Path) -> str:
    """Markdown list: of the whole comparison, every defence on every group, seeds 0 to 2, and the controls, what has no
    row."""
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
