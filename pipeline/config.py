"""Configuration: dataclass defaults <- preset <- YAML file <- a.b=value from the command line. Unknown keys are errors."""

import difflib
import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from shards.augment import ImageAugment
from shards.decode import Limits
from shards.errors import UserError


@dataclass
class Run:
    dir: str = ""
    """Run directory: everything the run writes."""
    seed: int = 0
    """Of the weights, the order and the augmentation."""
    timeout: float = 600.0
    """Seconds after which a collective that waits for a dead rank gives up."""
    save_steps: int = 0
    """Save after every so many steps, and at every epoch's end; 0 = only there."""
    save_minutes: float = 0.0
    """Save also when the last save is so many minutes ago; 0 = never."""
    keep: int = 2
    """Newest complete checkpoints to keep."""
    keep_every: int = 0
    """Keep also the checkpoint at the end of every n-th epoch; 0 = none."""
    restart: bool = False
    """Delete the state of the run directory and start anew."""
    accept_changes: bool = False
    """Go on with a run although the config has changed."""


@dataclass
class Data:
    index: str = ""
    """Folder written by `safeclip index`."""
    sources: dict | None = None
    """Or several: {NAME: {index: FOLDER, weight: 2}, ...}. A weight of 2: each of its samples is seen twice an epoch. Default 1."""
    cache: str | None = None
    """Folder for copies of shards from behind URLs, on a disk of the host's own; null: one in the folder for temporary files."""
    cache_gb: float = 100.0
    """Its size in GB (1e9 bytes)."""
    remote_timeout: float = 120.0
    """Seconds after which a server of which nothing comes is an error; until then it is tried again and again."""
    allow_pipe: bool = False
    """Run the shell commands of shards that are named `pipe:COMMAND`."""
    overlay: str | None = None
    """Folder written by `safeclip attack`: poison applied while reading, or null."""
    workers: int = 2
    """Reading processes of each rank; 0 reads in the training process."""
    streams: int = 8
    """Parts of the data that a batch is drawn from. Must divide train.batch_size; not tied to the number of ranks."""
    window: int = 4096
    """Samples among which a stream is shuffled."""
    limits: Limits = field(default_factory=Limits)
    """What is more than this is a bad sample: max_bytes, max_pixels, max_caption."""
    max_bad_fraction: float = 0.01
    """The run stops when more than this share of the samples that it read could not be used; 1 = never."""
    clip_augment: ImageAugment = field(default_factory=ImageAugment)
    """Augmentation of the picture for the CLIP loss."""
    unimodal_augment: ImageAugment = field(default_factory=ImageAugment)
    """Augmentation of both views for the unimodal loss."""
    augment_on: str = "worker"
    """Where the colours of a view are changed: worker, where it is read; or device, the whole batch there. The same up to rounding."""
    clip_eda: float = 0.0
    """Share of a caption's words that EDA changes for the CLIP loss."""
    unimodal_eda: float = 0.1
    """The same for the unimodal loss."""


@dataclass
class Model:
    name: str | None = None
    """An open_clip architecture: RN50, ViT-B-32, ViT-B-16 ..."""
    config: dict | None = None
    """Or an open_clip model config: embed_dim, vision_cfg, text_cfg."""


@dataclass
class Train:
    method: str = "safeclip"
    """safeclip, or clip: plain CLIP on all pairs."""
    epochs: int = 32
    """All epochs, warm-up included."""
    unimodal_epochs: int = 5
    """Epochs of unimodal warm-up."""
    slow_epochs: int = 1
    """Epochs of the CLIP loss on all pairs at slow_lr."""
    batch_size: int = 512
    """Pairs of a global batch, over all ranks."""
    lr: float = 5e-4
    slow_lr: float = 5e-6
    warmup_steps: int = 10_000
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 0.0
    """Gradient norm above which gradients are clipped; 0 = off."""
    precision: str = "fp32"
    """fp32 or bf16."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage, 0 to 3."""
    on_nan: str = "stop"
    """When a gradient is infinite or no number: stop, or skip the step and count it."""
    pool: int = 4096
    """Past embeddings of each modality in which the nearest neighbour is searched."""

    @property
    def betas(self):
        return (self.beta1, self.beta2)


@dataclass
class Selection:
    posterior: float = 0.9
    """First safe set: pairs above the cosine where the mixture's higher component reaches this posterior."""
    first_share: float | None = None
    """First safe share of the pairs; null: by the posterior."""
    least_share: float = 0.05
    """The posterior rule may give almost nothing; the first share is at least this."""
    growth: float = 0.01
    """Share of the pairs by which the safe set grows with each later epoch."""
    cap: float = 0.85
    """The safe set grows no larger than this share."""
    score: str = "cosine"
    """What pairs are ranked by: cosine, or agreement, for which other pairs are asked too (pipeline/safety/agreement.py)."""
    copies: int | None = None
    """A pair whose picture stands in more pairs than this is never safe; null: it may be."""
    voters: int = 4096
    """Pairs that are asked: random ones, the same all the run."""
    canaries: int = 500
    """Mismatched pairs that are scored and never trained on: the share that passes is told at every split; 0 = none."""
    live_canaries: int = 0
    """So many pairs are given a patch, and as many a blended pattern, with a caption not theirs, and trained on if they pass; 0 = none."""
    every: int = 1
    """Split before every n-th SafeCLIP epoch; in between the last mask holds. The share grows by the epoch all the same."""
    risky: str = "unimodal"
    """What risky pairs are trained with: unimodal, or skip."""
    refill: bool = False
    """Go over the safe set again until the epoch has as many steps as one over all pairs."""
    batch_size: int = 512
    """Pairs that one rank scores at a time."""


@dataclass
class Evaluation:
    test: str | None = None
    """Folder with classnames.txt, zeroshot_classification_templates.txt and test/ (CLIP_benchmark layout), or null."""
    index: str | None = None
    """Index of its shards (text="cls")."""
    every: int = 1
    """Evaluate after every n-th epoch; 0 = only at the end."""


@dataclass
class Wandb:
    mode: str = "disabled"
    """disabled, offline or online."""
    project: str = "safeclip"


@dataclass
class Config:
    preset: str = "paper"
    """paper (as published), default (the best recipe known to us) or clip (plain CLIP); the keys below override it."""
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    selection: Selection = field(default_factory=Selection)
    evaluation: Evaluation = field(default_factory=Evaluation)
    wandb: Wandb = field(default_factory=Wandb)

    def hash(self):
        """12 hex digits that change with anything that changes what is learnt."""
        return hashlib.sha256(json.dumps(learnt(asdict(self)), sort_keys=True).encode()).hexdigest()[:12]


def learnt(values):
    """{"a.b": value}: of a Config's dict, what changes what is learnt."""
    flat = {
        f"{section}.{key}": value
        for section, part in values.items()
        if isinstance(part, dict)
        for key, value in part.items()
    }
    sources = flat.pop("data.sources", None)
    if sources:
        flat["data.weights"] = {name: source["weight"] for name, source in sources.items()}
    others = ("wandb.", "evaluation.", "run.", "data.workers", "data.max_bad_fraction")
    others += ("data.index", "data.cache", "data.remote", "data.allow_pipe")  # the data have a fingerprint of their own
    return {key: value for key, value in flat.items() if key == "run.seed" or not key.startswith(others)}


def differences(old, new):
    """[(field, old value, new value)] of two Config dicts, among what changes what is learnt."""
    old, new = learnt(old), learnt(new)
    return [(key, old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)]


# What a preset sets beyond the defaults above, which are the published ones.
PRESETS = {
    "paper": {},
    "clip": {"train": {"method": "clip", "unimodal_epochs": 0, "slow_epochs": 0}},
    "default": {
        "train": {"unimodal_epochs": 1},
        "selection": {"first_share": 0.6, "growth": 0.05, "cap": 0.9, "risky": "skip", "refill": True},
    },
}
CHOICES = {
    "data.augment_on": ("worker", "device"),
    "train.method": ("safeclip", "clip"),
    "train.precision": ("fp32", "bf16"),
    "train.zero_stage": (0, 1, 2, 3),
    "train.on_nan": ("stop", "skip"),
    "selection.risky": ("unimodal", "skip"),
    "selection.score": ("cosine", "agreement"),
    "wandb.mode": ("disabled", "offline", "online"),
}
AT_LEAST_ONE = (
    "train.epochs",
    "train.batch_size",
    "train.pool",
    "data.streams",
    "data.window",
    "data.limits.max_bytes",
    "data.limits.max_pixels",
    "data.limits.max_caption",
    "run.keep",
    "selection.every",
    "selection.voters",
    "selection.batch_size",
)
SHARES = (
    "selection.posterior",
    "selection.first_share",
    "selection.least_share",
    "selection.growth",
    "selection.cap",
    "data.clip_eda",
    "data.unimodal_eda",
    "data.max_bad_fraction",
)


def load_config(path, overrides=()):
    """Config of the YAML file `path` with `overrides` ("a.b=value", YAML values). Raises UserError naming the key.

    A file may hold `presets: {NAME: {...}}`: its own settings for a preset, laid over the built-in ones.
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
    """Lay the mapping `values` over the dataclass `target`, in place."""
    known = {f.name: f for f in fields(target)}
    for key, value in (values or {}).items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
            raise UserError(f"config key {name}: unknown; {hint}")
        current = getattr(target, key)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise UserError(f"config key {name}: got {value!r}, expected a section")
            merge(current, value, name + ".")
        else:
            setattr(target, key, convert(name, value, known[key].type))


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
    """Raise UserError for values that no run can use."""

    def value(key):
        return functools.reduce(getattr, key.split("."), config)

    for key, choices in CHOICES.items():
        if value(key) not in choices:
            raise UserError(f"{key}: got {value(key)!r}, expected one of {', '.join(map(str, choices))}")
    for key in AT_LEAST_ONE:
        if value(key) < 1:
            raise UserError(f"{key}: got {value(key)}, expected 1 or more")
    for key in ("selection.canaries", "selection.live_canaries"):
        if value(key) < 0:
            raise UserError(f"{key}: got {value(key)}, expected 0 (none) or more")
    if config.selection.copies is not None and config.selection.copies < 1:
        raise UserError(f"selection.copies: got {config.selection.copies}, expected 1 or more, or null")
    for key in SHARES:
        if value(key) is not None and not 0 <= value(key) <= 1:
            raise UserError(f"{key}: got {value(key)}, expected a share from 0 to 1")
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


def check_sources(data):
    """Raise UserError unless data.sources is None or {name: {"index": folder, "weight": int}}; a weight of 1 is filled in."""
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
                f"{where}.weight: got {weight!r}, expected a whole number of 1 or more: how often a sample is seen in an epoch"
            )
