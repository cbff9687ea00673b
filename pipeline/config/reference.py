"""Reference of every config key, made from the code: `python -m pipeline.config.reference > configs/README.md`."""

import functools
import inspect
import itertools
import json
import operator
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.presets import PRESETS
from pipeline.config.schema import Config
from pipeline.guards import REGISTRY
from pipeline.settings import Key, keys

HEADER = ("key", "default", "allowed", "meaning")
CONFIGS = Path(__file__).parents[2] / "configs"
HEAD = """\
# Configuration

This file is made by `python -m pipeline.config.reference > configs/README.md`;
change `pipeline/config/schema.py` instead.

A configuration is made of four layers, each over the one before it: the defaults below, the preset, the YAML file, and
`a.b=value` words behind it on the command line (values as in YAML). An unknown key, a value of the wrong type and one
out of bounds are errors that name the key. `presets: {NAME: {...}}` in a file holds settings for that preset only, over
the file's others.

    preset: default
    data: {index: /data/cc3m/index}
    model: {name: RN50}
    train: {batch_size: 1024, precision: bf16}
    guards: {duplicates: {max_pairs: 2}, trigger_clusters: null}

In a path a leading `~` or `~USER`, `$NAME` and `${NAME}` are replaced when it is read, also in `a.b=value` words and in
the options and arguments of commands; a variable that is not set is an error, and `$$` is a dollar sign. URLs and
`pipe:` commands stay as they are. `run.dir: ~` alone is YAML's null; write `"~"`.

The last line of the example sets a guard and switches another one off. `RUN/config.yaml` has the value of every key of
a run."""


def document() -> str:
    """Markdown: files of configs/, presets, and a table of the keys of each section."""
    parts = [HEAD, "## Files\n\n" + table(("file", "what"), files()), "## Presets\n\n" + presets()]
    for section, found in itertools.groupby(keys(Config), lambda key: key.name.rpartition(".")[0].partition(".")[0]):
        parts.append(f"## {section or 'Top level'}\n\n" + table(HEADER, [row(key) for key in found]))
    for name, guard in REGISTRY.items():
        about = " ".join(inspect.getmodule(guard).__doc__.partition("\n\n")[0].split())
        rows = [row(key) for key in keys(guard.Settings, f"guards.{name}.")]
        parts.append(f"## guards.{name}\n\n{about}\n\n" + table(HEADER, rows))
    return "\n\n".join(parts) + "\n"


def row(key: Key) -> tuple:
    return f"`{key.name}`", f"`{shown(key.default)}`", key.allowed, key.about


def listing(config: Config) -> str:
    """Every key of a config: its value, and below it what it means, its default and the values that it takes."""
    values, lines = config.model_dump(), []
    found = [key for key in keys(Config) if key.name != "guards"]
    for name, guard in REGISTRY.items():
        found += keys(guard.Settings, f"guards.{name}.")
        values["guards"].setdefault(name, dict.fromkeys(guard.Settings.model_fields, "off"))
    for key in found:
        value = functools.reduce(operator.getitem, key.name.split("."), values)
        about = f"{key.about} Default {shown(key.default)}, allowed: {key.allowed}."
        lines += [f"{key.name}: {shown(value)}", textwrap.indent(textwrap.fill(about, 116), "    ")]
    return "\n".join(lines)


def shown(value: object) -> str:
    """The YAML text of a value."""
    if isinstance(value, float):
        return f"{value:.15g}"
    return value if value and isinstance(value, str) else json.dumps(value)


def presets() -> str:
    """Table: what each preset sets beyond the defaults."""
    flat = {name: dict(flattened(values)) for name, values in PRESETS.items()}
    names = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = [(f"`{key}`", *(f"`{flat[name][key]}`" if key in flat[name] else "" for name in flat)) for key in names]
    return "An empty cell is the default below.\n\n" + table(("key", *flat), rows)


def flattened(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, value as YAML) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, shown(value)


def files() -> list[tuple]:
    """(file, first sentence of the comment at its head)."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        head = re.match(r"(?:#.*\n)*", path.read_text())[0].replace("\n#", "").removeprefix("#")
        found.append((f"`{path.name}`", re.split(r"(?<=\.) ", head.strip())[0]))
    return found


def table(head: tuple, rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    print(document(), end="")
