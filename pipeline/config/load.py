"""Loads a configuration: defaults, preset, YAML file and a.b=value arguments, in this order."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import yaml

from pipeline.config.presets import PRESETS
from pipeline.config.renamed import RENAMED
from pipeline.config.schema import Config
from pipeline.settings import read
from shards.errors import UserError

WHOLE = ("sources", "config")  # keys whose mappings replace those of a lower layer


class Loader(yaml.SafeLoader):
    """Reads 5e-4 as a number, as YAML 1.2 does, and refuses a key that stands twice, of which YAML takes the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                text = f"{key.value} stands twice in one mapping; keep one of them, with what both hold"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return node


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads: quotes a string like "5e4"."""


for one in (Loader, Dumper):
    one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
    )


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Config of the YAML file `path` with `overrides` ("a.b=value", YAML values). Raises UserError naming the key.

    A file may hold `presets: {NAME: {...}}`: settings for one preset, over the file's others; overrides are over all.
    """
    values, words = read_yaml(path), list(overrides)
    override(values, words)
    own = values.pop("presets", None) or {}
    values.pop("hash", None)  # in the config.yaml of a run directory
    if not isinstance(own, dict) or not all(isinstance(one, dict) for one in own.values()):
        raise UserError("presets: expected a mapping of settings for each preset: {NAME: {train: {lr: 0.001}}}")
    for name in own:
        if name not in PRESETS:
            raise UserError(
                f"presets.{name}: unknown, and its settings would be lost; known here: {', '.join(PRESETS)}"
            )
    values = merged(values, own.get(str(values.get("preset", "paper")), {}))
    override(values, [word for word in words if not word.startswith("presets.")])
    config = make_config(values)
    check(config)
    return config


def load_run_config(run_dir: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Config of a run, with `overrides`. Raises UserError."""
    path = Path(run_dir) / "config.yaml"
    if not path.exists():
        raise UserError(f"run {run_dir}: no config.yaml in it; give a directory that `safeclip train` wrote")
    return load_config(path, overrides)


def make_config(values: dict) -> Config:
    """Config of a preset with `values` over it. Raises UserError."""
    preset = values.get("preset", "paper")
    if preset not in list(PRESETS):
        read(Config, {"preset": preset})  # raises
    config = read(Config, merged(PRESETS[preset], values), renamed=RENAMED)
    if config.guards:
        from pipeline.guards import complete  # only now: it takes torch a second to load

        config.guards = complete(config.guards)
    return config


def merged(low: dict, high: dict) -> dict:
    """The mapping `high` over `low`, section by section."""
    both = {
        key: merged(low[key], high[key])
        for key in low.keys() & high.keys() - set(WHOLE)
        if isinstance(low[key], dict) and isinstance(high[key], dict)
    }
    return {**low, **high, **both}


def read_yaml(path: str | Path) -> dict:
    """The mapping in the YAML file `path`. Raises UserError."""
    try:
        values = yaml.load(Path(path).read_text(), Loader)
    except OSError as error:
        raise UserError(
            f"config {Path(path).absolute()}: {error.strerror or error}; give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such day
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: got {type(values).__name__}, expected a mapping of sections")
    return values


def to_yaml(values: dict) -> bytes:
    """YAML that `read_yaml` reads as `values`."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False).encode()


def override(values: dict, words: Iterable[str]) -> None:
    """Set values["a"]["b"] for every word "a.b=value" (values as in YAML), in place. Raises UserError."""
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"command line: got {word!r}, expected a.b=value")
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            found = section.get(parent, {})
            if not isinstance(found, dict):
                raise UserError(f"command line: {key}: {parent} is not a section")
            # A copy: with an anchor of YAML (`&mild`, `*mild`) several keys are the same mapping.
            section[parent] = section = dict(found)
        try:
            section[last] = yaml.load(value, Loader) if value else None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"command line: {word}: not YAML: {' '.join(str(error).split())}") from None


def check(config: Config) -> None:
    """Raise UserError for values that contradict each other."""
    method, data, model = config.train.method, config.data, config.model
    if method == "safeclip" and data.mask:
        raise UserError(
            f"data.mask: got {data.mask}, but train.method safeclip selects its own pairs; "
            "filter the shards with `safeclip mask apply`"
        )
    if method == "cleanclip" and not (model.pretrained and data.mask):
        raise UserError(
            "train.method: cleanclip fine-tunes a trained model on clean pairs; "
            "name them with model.pretrained=RUN data.mask=MASK"
        )
    if method == "safeclip" and config.guards and config.selection.scored_view == "augmented":
        raise UserError(
            f"guards: got {', '.join(config.guards)}, but they need pictures as they are, and a selection round reads "
            "random crops; set selection.scored_view=plain"
        )
    for key in ("lock_image", "lock_text"):
        if getattr(model, key) and not model.pretrained:
            raise UserError(f"model.{key}: freezes random weights; name trained ones with model.pretrained")
    if not data.index and not data.sources:
        raise UserError("data.index: missing; make one with `safeclip index SHARDS... --out DIR` and name DIR")
    if data.index and data.sources:
        raise UserError(
            "data: expected either data.index or data.sources, and not both; make the index one of the sources"
        )
    if (model.name is None) == (model.config is None):
        raise UserError("model: expected either model.name (an open_clip architecture) or model.config, and not both")
    if config.tensorboard.enabled and not find_spec("tensorboard"):
        raise UserError(
            "tensorboard.enabled: the package is not installed; run `pip install tensorboard`, or set it to false"
        )
    if config.train.batch_size % data.streams:
        raise UserError(
            f"data.streams: got {data.streams}, which does not divide train.batch_size "
            f"{config.train.batch_size}; take a divisor of it"
        )
