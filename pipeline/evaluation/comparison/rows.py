"""The rows of a comparison that its tables and pictures count, by set, group and defence, and whether they are of one
kind."""

from collections.abc import Iterable

import numpy as np

from pipeline.evaluation.comparison.cells import place_of
from pipeline.evaluation.comparison.defences import DEFENCES
from pipeline.evaluation.comparison.protocol import CHOSEN_SEEDS, TOOK, may_be_chosen_on
from pipeline.evaluation.comparison.sets import RATE

NEVER = "never poisoned"  # plain CLIP on data without poison


class GroupRows:
    """The rows of one set and attack group, `rows` being `counted`.

    blocks: [(defence, chosen)]: the defences in their order, seeds that rules may be chosen on apart from others.
    attacks: names.
    """

    def __init__(self, name: str, group: str, rows: list[dict]):
        self.name, self.group = name, group
        rows = [row for row in rows if (row["set"], row["group"]) == (name, group)]
        self.poisoned = [row for row in rows if row["poisoned"]]
        self.controls = [row for row in rows if not row["poisoned"]]
        self.attacks = list(dict.fromkeys(attack for row in self.poisoned for attack in row["attacks"]))
        self.blocks = [(name, chosen) for name in DEFENCES for chosen in (True, False) if self.of(name, chosen)]

    def of(self, defence: str, chosen: bool | None = None, controls: bool = False) -> list[dict]:
        """Rows of a defence, of seeds that rules may be chosen on or of the others (None: of all)."""
        return [
            row
            for row in (self.controls if controls else self.poisoned)
            if row["defence"] == defence and chosen in (None, row["seed"] in CHOSEN_SEEDS)
        ]

    def void(self, attack: str, rows: Iterable[dict] = ()) -> bool | None:
        """Whether the attack did not take on plain CLIP of the seeds of `rows`, so that it shows nothing; on that of
        all seeds where these were not run; None where none was run."""
        seeds = {row["seed"] for row in rows}
        success = rate_of([row for row in self.of("none") if row["seed"] in seeds] or self.of("none"), attack)
        return None if success is None else success < TOOK

    def unpoisoned(self, attack: str, rows: list[dict], key: str = "success") -> float | None:
        """Mean rate of plain CLIP that never saw poison, of the seeds of `rows`: triggers and targets differ by seed.
        None where one was not run."""
        seeds = {row["seed"] for row in rows}
        found = [row for row in self.of("none", controls=True) if row["seed"] in seeds]
        return rate_of(found, attack, key) if len(found) == len(seeds) else None

    def title(self, attack: str) -> str:
        """The attack's name, with a mark where rules may be chosen on it."""
        seeds = {*CHOSEN_SEEDS, *(row["seed"] for row in self.poisoned)}
        return attack + "†" * any(may_be_chosen_on(self.name, attack, seed) for seed in seeds)


def counted(rows: list[dict]) -> list[dict]:
    """The rows that the tables count: of each cell the last, of defences that there are."""
    last = {place_of(row): row for row in rows if row["defence"] in DEFENCES}
    return list(last.values())


def groups_of(rows: list[dict]) -> list[GroupRows]:
    """The groups of the sets, in their order, that stand in no rate curve."""
    names = dict.fromkeys(row["set"] for row in rows)
    groups = sorted({row["group"] for row in rows if not RATE.fullmatch(row["group"])})
    found = [GroupRows(name, group, rows) for name in names for group in groups]
    return [one for one in found if one.poisoned]


def rate_rows(name: str, rows: list[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """{(attack, defence or NEVER, number of pairs): rows} of a set's rate curves, attacks and defences in their order.
    `rows`: `counted`."""
    curves = [row for row in rows if row["set"] == name and RATE.fullmatch(row["group"])]
    groups = {row["group"] for row in curves if row["poisoned"]}
    by = [(row["defence"] if row["poisoned"] else NEVER, row) for row in curves if row["group"] in groups]
    by = [(defence, row) for defence, row in by if row["poisoned"] or row["defence"] == "none"]
    found: dict[tuple[str, str, int], list[dict]] = {}
    for attack in dict.fromkeys(attack for _, row in by for attack in row["attacks"]):
        for wanted in [*DEFENCES, NEVER]:
            for defence, row in by:
                if defence == wanted and attack in row["attacks"]:
                    count = int(RATE.fullmatch(row["group"])[1])
                    found.setdefault((attack, defence, count), []).append(row)
    return found


def mixtures(rows: list[dict]) -> list[str]:
    """A folded list of runs of one set that should be of one kind and are not (Cell.origin), or nothing; rows without a
    digest fit with all."""
    kinds = {
        "setup": ("configs, data or attack configs", lambda row: f"group {row['group']}"),
        "attack": ("poisons", lambda row: f"group {row['group']}, seed {row['seed']}"),
        "recipe": ("configs", lambda row: row["defence"]),
    }
    lines = []
    for key, (what, scope) in kinds.items():
        found: dict[str, dict[str, list[dict]]] = {}
        for row in rows:
            if row.get(key):
                found.setdefault(scope(row), {}).setdefault(row[key], []).append(row)
        for where, by_digest in found.items():
            if len(by_digest) > 1:
                text = "; ".join(f"{digest} ({named(of_one)})" for digest, of_one in by_digest.items())
                lines.append(f"- {where}: different {what}: {text}")
    if not lines:
        return []
    title = f"Not comparable: rows of different configs, data or poison ({len(lines)})"
    return [f"<details><summary>{title}</summary>\n", "\n".join(lines), "\n</details>\n"]


def named(rows: list[dict]) -> str:
    """ "a dao 0 1, unpoisoned none 1, commit 1234567890"."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        name = f"{row['group'] if row['poisoned'] else 'unpoisoned'} {row['defence']}"
        seeds.setdefault(name, set()).add(row["seed"])
    names = [" ".join([name, *map(str, sorted(some))]) for name, some in seeds.items()]
    return ", ".join(dict.fromkeys([*names, *(f"commit {row['commit']}" for row in rows)]))


def rate_of(rows: list[dict], attack: str, key: str = "success") -> float | None:
    return mean([row["attacks"][attack][key] for row in rows if attack in row["attacks"]])


def mean(values: Iterable[float | None]) -> float | None:
    """None where no value is known."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None
