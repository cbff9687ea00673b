"""The sets that are compared on, as configs/comparison.yaml defines them, and their attack groups."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.config.load import load_config, override, read_yaml
from pipeline.config.schema import Config
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.storage.paths import expanded

RATE = re.compile(r"rate(\d+)")  # the name of a group of a rate curve: so many poisoned pairs
KEYS = ("config", "data", "attacks", "rates", "overrides")


@dataclass(frozen=True)
class Attack:
    """A poisoned set: an attack config and words that override it. Several attacks with different targets share it."""

    config: str
    overrides: tuple[str, ...] = ()

    @property
    def surrogates(self) -> set[str]:
        """The run directories on which triggers are optimised."""
        entries = read_yaml(self.config).get("attacks") or {}
        return {entry["surrogate"] for entry in entries.values() if isinstance(entry, dict) and entry.get("surrogate")}

    def digest(self, fingerprint: str, seed: int) -> str:
        """12 hex digits that change with what it poisons: its config but for paths, the data's fingerprint and the
        seed."""
        values = read_yaml(self.config)
        override(values, self.overrides)
        values = {
            key: value for key, value in values.items() if key not in ("out", "index", "labels", "test", "classnames")
        }
        return digest({**values, "seed": seed, "data": fingerprint})


@dataclass(frozen=True, eq=False)
class DataSet:
    """name; config: of the runs; data: words for `safeclip data` that make it, () for shards that are there; attacks:
    {group: Attack}; overrides: `a.b=value` for every run."""

    name: str
    config: str
    data: tuple[str, ...]
    attacks: dict[str, Attack]
    overrides: tuple[str, ...] = ()

    def load(self, words: Sequence[str] = ()) -> Config:
        """The config of a run with these words."""
        return load_config(self.config, [*self.overrides, *words])

    @cached_property
    def fingerprint(self) -> str:
        """Of the training data. Raises UserError where they are not there."""
        return ShardIndex.load(self.load().data.index).fingerprint

    def overlay(self, group: str, seed: int, work: Path) -> Path:
        """The folder of a group's attack below `work`, of a name that changes with what it poisons."""
        return work / self.name / "attacks" / f"{group}_seed{seed}_{self.attacks[group].digest(self.fingerprint, seed)}"

    def with_rates(self, rates: Sequence[int], config: str) -> "DataSet":
        """The set with a group "rateN" for each number of poisoned pairs N, of every attack in the attack config
        `config`."""
        names = read_yaml(config).get("attacks") or {}
        groups = {f"rate{n}": Attack(config, tuple(f"attacks.{name}.pairs={n}" for name in names)) for n in rates}
        return replace(self, attacks=groups)


def read_sets(path: str | Path, names: Sequence[str] | None, rates: Sequence[int] = ()) -> dict[str, DataSet]:
    """{name: DataSet} of the definition file, those that are named (None: all). With `rates` their groups are the rate
    curves'.

    Raises UserError.
    """
    found, values = {}, read_yaml(path)
    for name in names or [name for name in values if not rates or "rates" in values[name]]:
        if name not in values:
            raise UserError(f"--sets: got {name!r}, expected some of {', '.join(values)} ({path})")
        entry = values[name]
        unknown = set(entry) - set(KEYS)
        if unknown or not {"config", "attacks"} <= set(entry):
            raise UserError(
                f"{path}: {name} has {', '.join(entry)}; "
                "expected config, attacks, and of the rest data, rates, overrides"
            )
        attacks = {str(group): Attack(expanded(config)) for group, config in entry["attacks"].items()}
        for group in attacks:
            if RATE.fullmatch(group):
                raise UserError(
                    f"{path}: {name}: attacks: got a group {group}, the name of a rate curve's; name it otherwise"
                )
        words = [tuple(map(str, entry.get(key) or ())) for key in ("data", "overrides")]
        found[name] = DataSet(name, expanded(entry["config"]), words[0], attacks, words[1])
        if rates:
            if "rates" not in entry:
                raise UserError(f"--rates: {name} has no attack config for it; add `rates: FILE` to {path}")
            found[name] = found[name].with_rates(rates, expanded(entry["rates"]))
    return found


def digest(value: object) -> str:
    """12 hex digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def overlay_digest(folder: str | Path) -> str:
    """12 hex digits of an attack: its manifest but for where the data lie, and the pictures of optimised triggers
    beside it."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    manifest = {key: value for key, value in manifest.items() if key not in ("index", "source")}
    pictures = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).glob("*.png"))}
    return digest([manifest, pictures])
