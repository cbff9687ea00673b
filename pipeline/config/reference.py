"""Reference of every config key, made from the code: `python -m pipeline.config.reference > configs/README.md`."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path

from pipeline.config.load import AT_LEAST_ONE, CHOICES, FRACTIONS
from pipeline.config.schema import PRESETS, Config
from pipeline.guards import REGISTRY

# Fields that have no text of their own in the source.
OBVIOUS = {
    "brightness": "Strength of the change of brightness.",
    "contrast": "Strength of the change of contrast.",
    "saturation": "Strength of the change of saturation.",
    "hue": "Strength of the change of hue, in turns.",
    "lr": "Highest learning rate.",
    "warmup_steps": "Steps of linear warm-up to lr.",
    "weight_decay": "Of AdamW.",
    "beta1": "Of AdamW.",
    "beta2": "Of AdamW.",
    "eps": "Of AdamW.",
    "project": "Name of the project in Weights & Biases.",
}
CONFIGS = Path(__file__).parents[2] / "configs"
HEAD = """\
# Configuration

This file is made by `python -m pipeline.config.reference > configs/README.md`; \
change `pipeline/config/schema.py` instead.

A configuration is made of four layers, each over the one before it: the defaults below, the preset, the YAML file, and
`a.b=value` words behind it on the command line (values as in YAML). An unknown key, a value of the wrong type and one
out of bounds are errors that name the key. `presets: {NAME: {...}}` in a file holds settings for that preset only.

    preset: default
    data: {index: /data/cc3m/index}
    model: {name: RN50}
    train: {batch_size: 1024, precision: bf16}
    guards: {duplicates: {max_pairs: 2}, trigger_clusters: null}

The last line sets a guard and switches another one off. `RUN/config.yaml` has the value of every key of a run."""


def document() -> str:
    """Markdown: files of configs/, presets, and a table of the keys of each section."""
    sections = [HEAD, "## Files\n\n" + table(("file", "what"), files()), "## Presets\n\n" + presets()]
    top = [row("", field, docs(Config)) for field in fields(Config) if not is_dataclass(field.type)]
    sections.append("## Top level\n\n" + table(("key", "default", "meaning"), top))
    for field in fields(Config):
        if is_dataclass(field.type):
            sections.append(
                f"## {field.name}\n\n" + table(("key", "default", "meaning"), keys(field.type, f"{field.name}."))
            )
    for name, guard in REGISTRY.items():
        about = " ".join(inspect.getmodule(guard).__doc__.partition("\n\n")[0].split())
        rows = [row(f"guards.{name}.", field, docs(guard.Settings), guard.BOUNDS) for field in fields(guard.Settings)]
        sections.append(f"## guards.{name}\n\n{about}\n\n" + table(("key", "default", "meaning"), rows))
    return "\n\n".join(sections) + "\n"


def keys(kind: type, prefix: str) -> list[tuple]:
    """Rows of all keys of a dataclass, those of its sections after them."""
    own = [row(prefix, field, docs(kind)) for field in fields(kind) if not is_dataclass(field.type)]
    inner = [field for field in fields(kind) if is_dataclass(field.type)]
    return own + [one for field in inner for one in keys(field.type, f"{prefix}{field.name}.")]


def row(prefix: str, field: Field, texts: dict[str, str], bounds: dict | None = None) -> tuple:
    """(key, default, meaning) as Markdown; allowed values follow the meaning."""
    key = prefix + field.name
    default = field.default_factory() if field.default is MISSING else field.default
    meaning = f"{texts.get(field.name) or OBVIOUS[field.name]} {limits(key, bounds)}"
    return f"`{key}`", f"`{shown(default)}`", meaning.strip()


def limits(key: str, bounds: dict | None) -> str:
    """Allowed values, if the loader checks them."""
    if bounds is not None:
        low, high = bounds[key.rpartition(".")[2]]
        return f"({low} or more)" if high is None else f"({low} to {high})"
    if key in CHOICES:
        return f"({', '.join(map(str, CHOICES[key]))})"
    return "(1 or more)" if key in AT_LEAST_ONE else "(0 to 1)" if key in FRACTIONS else ""


def shown(value: object) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else '""' if value == "" else str(value)


def docs(kind: type) -> dict[str, str]:
    """{field: the string that stands under it in the source}, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    return {
        one.target.id: " ".join(ast.literal_eval(after.value).split())
        for one, after in zip(body, body[1:])
        if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


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
