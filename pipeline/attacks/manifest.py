"""The attack manifest: what every attack of a config makes of which pairs, seeded; the overlay, and the ground truth.

The config (YAML) has index, labels, test (index folders: captions, train labels, test labels), classnames (file), out,
seed, and attacks: {NAME: {attack: badnets, pairs: 200, ...}}. Attacks choose in this order among the pairs that are
left.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.attacks.base import ATTACKS, Attack, Seeds
from pipeline.attacks.pool import Pool
from shards.errors import BadSample, UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import VERSION
from shards.samples.samples import Samples
from shards.storage.files import write_bytes
from shards.storage.paths import expanded

PATHS = ("index", "labels", "test", "classnames", "out")


def make_attack(config: dict) -> str:
    """Write OUT/manifest.json for `config`; returns a line that says what it poisons. The same config, the
    same bytes.

    Raises UserError that names the key.
    """
    config = {"seed": 0, **config}
    attacks = read_attacks(config)
    for key in PATHS:
        try:
            config[key] = expanded(config[key])
        except UserError as error:
            raise UserError(f"attack config: {key}: {error}") from None
    pool = open_pool(config)
    for one in attacks:
        pool.reserved |= {pool.number_of(name, f"{one.where}.{key}") for key, name in one.names().items()}
    kinds = {one.kind: {"attack": one.name, "judged": one.judged, **one.poison(pool)} for one in attacks}
    for kind, entry in kinds.items():  # last: what is poisoned is the same with and without them
        pool.add_decoys(kind, entry, f"attacks.{kind}")
    for found in (pool.rows, pool.decoys):
        found.sort(key=lambda row: (row["shard"], row["position"]))
    manifest = {
        "version": VERSION,
        "seed": config["seed"],
        "classes": pool.classes,
        "index": str(Path(config["index"]).absolute()),
        "fingerprint": pool.index.fingerprint,
        "source": str(Path(config["test"]).absolute()),
        "source_fingerprint": pool.test.fingerprint,
        "kinds": kinds,
        "rows": pool.rows,
        "decoys": pool.decoys,
    }
    files = {**pool.files, "manifest.json": (json.dumps(manifest, indent=1) + "\n").encode()}
    for name, data in files.items():
        write_named(Path(config["out"]) / name, data, "attack config: out")
    counts = Counter(row["kind"] for row in pool.rows)
    text = ", ".join(f"{kind} {counts[kind]}" for kind in kinds)
    text += f", and {len(pool.decoys)} decoys" if pool.decoys else ""
    count, samples = len(pool.rows), pool.index.samples
    return f"{config['out']}: {count} of {samples:,} pairs poisoned ({count / samples:.2%}): {text}"


def read_attacks(config: dict) -> list[Attack]:
    """The entries of the config, in its order. Raises UserError."""
    for key in PATHS:
        if not isinstance(config.get(key), str):
            raise UserError(f"attack config: {key}: got {config.get(key)!r}, expected a path")
    for key in config:
        if key not in (*PATHS, "seed", "attacks"):
            raise UserError(f"attack config: {key}: unknown; expected {', '.join((*PATHS, 'seed', 'attacks'))}")
    seed, entries = config["seed"], config.get("attacks")
    counts: Counter[str] = Counter()
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"attack config: seed: got {seed!r}, expected 0 to {2**32 - 1}")
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            f"attack config: attacks: got {entries!r}, expected {{NAME: {{attack: badnets, pairs: 200}}, ...}}"
        )

    def seeds(pattern: str) -> int:
        counts[pattern] += 1
        drawn = np.random.default_rng([seed, 3, counts[pattern]]).integers(2**31)
        return seed if counts[pattern] == 1 else int(drawn)

    return [read_attack(str(kind), values, seeds) for kind, values in entries.items()]


def read_attack(kind: str, values: object, seeds: Seeds) -> Attack:
    """The Attack of one entry. Raises UserError."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", kind) or kind.endswith("_decoy"):
        raise UserError(
            f"attacks.{kind}: not a name; expected up to 40 small letters, digits and underscores, no _decoy at the end"
        )
    name = values.get("attack") if isinstance(values, dict) else values
    if name not in list(ATTACKS):
        raise UserError(f"attacks.{kind}.attack: got {name!r}, expected one of {', '.join(sorted(ATTACKS))}")
    if not isinstance(values, dict):
        raise UserError(f"attacks.{kind}: got {values!r}, expected a mapping such as {{attack: {name}, pairs: 200}}")
    return ATTACKS[name](kind, {k: v for k, v in values.items() if k != "attack"}, seeds)


def open_pool(config: dict) -> Pool:
    """Pool of the data that the config names. Raises UserError."""
    try:
        lines = Path(config["classnames"]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"attack config: classnames: cannot read {config['classnames']} ({error}); "
            "name the test set's classnames.txt"
        ) from None
    classes = [line.strip() for line in lines if line.strip()]  # as a test set's are read for evaluation
    index, test = ShardIndex.load(config["index"]), ShardIndex.load(config["test"])
    labels = ShardIndex.load(config["labels"])
    # Positions of other shards, or of these in another order, would give each pair the label of some other one.
    if not labels.shards.column("fingerprint").equals(index.shards.column("fingerprint")):
        raise UserError(
            f"labels: {config['labels']} is of other shards than index {config['index']}, or of these in another "
            f"order ({labels.samples} and {index.samples} samples); index the same shards with --text cls"
        )
    label_N, test_label_M = (
        read_labels(Samples(one), key, config[key], len(classes)) for key, one in (("labels", labels), ("test", test))
    )
    return Pool(index, test, classes, label_N, test_label_M, config["seed"])


def read_labels(samples: Samples, what: str, folder: str, classes: int) -> np.ndarray:
    """int64 (N,): the labels of an index made with --text cls, below `classes`. Raises UserError."""
    labels = []
    for shard, count in enumerate(samples.index.counts.tolist()):
        for position in range(count):
            try:
                labels.append(samples.label(shard, position))
            except (ValueError, BadSample) as error:
                wrong = "it has no label" if isinstance(error, BadSample) else f"its label is no number ({error})"
                raise UserError(
                    f"{what}: {folder}: sample {samples.key(shard, position)!r}: {wrong}; "
                    "index the shards with --text cls"
                ) from None
    if labels and not 0 <= min(labels) <= max(labels) < classes:
        raise UserError(
            f"{what}: {folder} has labels {min(labels)} to {max(labels)}, "
            f"classnames names {classes} classes; they count from 0"
        )
    return np.array(labels, np.int64)


def write_named(path: str | Path, data: bytes, where: str) -> None:
    """Put `data` at `path`, that the option or key `where` names. Raises UserError where it cannot be
    written."""
    try:
        write_bytes(path, data)
    except OSError as error:
        raise UserError(f"{where}: cannot write {path} ({error.strerror or error}); name another place") from None
