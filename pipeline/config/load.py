"""Loads a configuration: defaults, preset, YAML file and a.b=value arguments, in this order. Unknown keys are
errors."""

import copy
import difflib
import functools
from dataclasses import fields, is_dataclass
from pathlib import Path

import yaml

from pipeline.config.renamed import RENAMED
from pipeline.config.schema import PRESETS, Config
from shards.errors import UserError

CHOICES = {
    "data.augment_on": ("worker", "device"),
    "data.eda_synonyms": ("wordnet", "table"),
    "train.method": ("safeclip", "clip", "roclip", "cleanclip"),
    "train.clip_views": (1, 2),
    "train.schedule": ("per_loss", "run"),
    "train.precision": ("fp32", "bf16"),
    "train.zero_stage": (0, 1, 2, 3),
    "train.on_nan": ("stop", "skip"),
    "selection.risky": ("unimodal", "skip"),
    "selection.mixture": ("sklearn", "converged"),
    "selection.rank_by": ("posterior", "score"),
    "selection.scored_view": ("augmented", "plain"),
    "wandb.mode": ("disabled", "offline", "online"),
}
AT_LEAST_ONE = (
    "train.epochs",
    "train.batch_size",
    "train.support_queue",
    "train.match_every",
    "data.streams",
    "data.window",
    "data.limits.max_bytes",
    "data.limits.max_pixels",
    "data.limits.max_caption",
    "run.keep",
    "selection.every",
    "selection.batch_size",
)
FRACTIONS = (
    "selection.posterior",
    "selection.first_fraction",
    "selection.least_fraction",
    "selection.growth",
    "selection.max_fraction",
    "data.clip_eda",
    "data.unimodal_eda",
    "data.max_bad_fraction",
)


def load_config(path, overrides=()):
    """Config of the YAML file `path` with `overrides` ("a.b=value", YAML values). Raises UserError naming the key.

    A file may hold `presets: {NAME: {...}}`: its own settings for a preset, merged into the built-in ones.
    """
    values = read_yaml(path)
    override(values, overrides)
    own = values.pop("presets", None) or {}
    values.pop("hash", None)  # in the config.yaml of a run directory
    preset = values.get("preset", "paper")
    if preset not in PRESETS:
        raise UserError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
    config = Config()
    for layer in (PRESETS[preset], own.get(preset) or {}, values):
        merge(config, layer, "")
    if config.guards:
        from pipeline.guards import complete  # only now: it takes torch a second to load

        config.guards = complete(config.guards)
    check(config)
    return config


def read_yaml(path):
    """The mapping in the YAML file `path`. Raises UserError."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror or error}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: got {type(values).__name__}, expected a mapping of sections")
    return values


def override(values, words):
    """Set values["a"]["b"] for every word "a.b=value" (values as in YAML), in place. Raises UserError."""
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"command line: got {word!r}, expected a.b=value")
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"command line: {key}: {parent} is not a section")
        section[last] = yaml.safe_load(value) if value else None


def merge(target, values, prefix):
    """Merge the mapping `values` into the dataclass `target`, in place."""
    known = {f.name: f for f in fields(target)}
    for key, value in (values or {}).items():
        name = f"{prefix}{key}"
        if key not in known:
            close = [f"{prefix}{one}" for one in difflib.get_close_matches(str(key), known, 1)]
            close = [RENAMED[name]] if name in RENAMED else close
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
            raise UserError(f"config key {name}: unknown; {hint}")
        current = getattr(target, key)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"config key {name}: got {value!r}, expected a section")
            merge(current, value, name + ".")
        elif name == "guards":
            setattr(target, key, merged_guards(current, convert(name, value or {}, dict)))
        else:
            setattr(target, key, convert(name, value, known[key].type))


def merged_guards(guards, values):
    """The guards of a config with `values` merged into them, setting by setting; NAME: null switches a guard off."""
    guards = copy.deepcopy(guards)
    for name, given in values.items():
        both = isinstance(given, dict) and isinstance(guards.get(name), dict)
        guards[name] = {**guards[name], **given} if both else given
    return guards


def convert(name, value, kind):
    """`value` as the annotated type `kind` (bool, int, float, str, dict, each perhaps | None). Raises UserError."""
    kinds = getattr(kind, "__args__", (kind,))
    if value is None and type(None) in kinds:
        return None
    for one in kinds:
        if one is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML reads 5e-4 as a string
            except ValueError:
                continue
        if one is not type(None) and isinstance(value, one) and not (one is int and isinstance(value, bool)):
            return value
    expected = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
    raise UserError(f"config key {name}: got {value!r}, expected {expected}")


def check(config):
    """Raise UserError for values that are out of range or contradict each other."""

    def value(key):
        return functools.reduce(getattr, key.split("."), config)

    for key, choices in CHOICES.items():
        if value(key) not in choices:
            raise UserError(f"{key}: got {value(key)!r}, expected one of {', '.join(map(str, choices))}")
    for key in AT_LEAST_ONE:
        if value(key) is not None and value(key) < 1:
            raise UserError(f"{key}: got {value(key)}, expected 1 or more")
    if config.selection.negative_controls < 0:
        raise UserError(
            f"selection.negative_controls: got {config.selection.negative_controls}, expected 0 (none) or more"
        )
    for key in FRACTIONS:
        if value(key) is not None and not 0 <= value(key) <= 1:
            raise UserError(f"{key}: got {value(key)}, expected a fraction from 0 to 1")
    check_method(config)
    if not config.data.index and not config.data.sources:
        raise UserError("data.index: missing; make one with `safeclip index SHARDS... --out DIR` and name DIR")
    check_sources(config.data)
    for key in ("data.cache_gb", "data.remote_timeout"):
        if not value(key) > 0:
            raise UserError(f"{key}: got {value(key)}, expected more than 0")
    if (config.model.name is None) == (config.model.config is None):
        raise UserError("model: expected either model.name (an open_clip architecture) or model.config, and not both")
    if config.train.batch_size % config.data.streams:
        raise UserError(
            f"data.streams: got {config.data.streams}, which does not divide train.batch_size "
            f"{config.train.batch_size}; take a divisor of it"
        )


def check_method(config):
    """Raise UserError for settings that do not go with train.method."""
    method, data = config.train.method, config.data
    if method == "safeclip" and data.mask:
        raise UserError(
            f"data.mask: got {data.mask}, but train.method safeclip selects its own pairs; "
            "filter the shards with `safeclip mask apply`"
        )
    if method == "cleanclip" and not (config.model.pretrained and data.mask):
        raise UserError(
            "train.method: cleanclip fine-tunes a trained model on clean pairs; "
            "name them with model.pretrained=RUN data.mask=MASK"
        )


def check_sources(data):
    """Raise UserError unless data.sources is None or {name: {"index": folder, "weight": int}}; a weight of 1 is filled
    in."""
    if data.sources and data.index:
        raise UserError(
            "data: expected either data.index or data.sources, and not both; make the index one of the sources"
        )
    for name, source in (data.sources or {}).items():
        where = f"data.sources.{name}"
        if (
            not isinstance(source, dict)
            or not isinstance(source.get("index"), str)
            or set(source) - {"index", "weight"}
        ):
            raise UserError(f"{where}: got {source!r}, expected {{index: FOLDER, weight: 1}}")
        weight = source.setdefault("weight", 1)
        if type(weight) is not int or weight < 1:
            raise UserError(
                f"{where}.weight: got {weight!r}, expected a whole number of 1 or more: "
                "how often a sample is seen in an epoch"
            )
