"""Attacks: a seeded manifest of what to poison, which is also the ground truth (threat model: METHOD, Carlini and Terzis 2022).

targeted   each target, a test picture, stands under several captions of one adversarial class
patch      pictures of other classes get a small patch and a caption of the target class (BadNets); with `wander` its place is another in each
blended    the same with a pattern mixed into the whole picture (Blended)

Both can be of an attacker who knows that pictures with one trigger and one word are looked for: `variants` of a trigger, one a picture, and `decoys`, other pairs that show
it at `decoy_opacity` and keep their captions, so that what it stands out by is not the target's.
"""

import json
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.index import ShardIndex
from shards.overlay import VERSION
from shards.samples import Samples
from shards.storage import write_bytes

BACKDOOR = {"target_class": None, "variants": 1, "decoys": 0, "decoy_opacity": 0.5}
SETTINGS = {
    "targeted": {"targets": 30, "captions": 12},
    "patch": {"pairs": 80, "size": 0.19, "left": 0.78, "top": 0.78, "cells": 3, "wander": False, **BACKDOOR},
    "blended": {"pairs": 95, "alpha": 0.25, "cells": 8, **BACKDOOR},
}
KEYS = ("index", "labels", "test", "classnames", "out")


def make_attack(config):
    """Write OUT/manifest.json for the dict `config`; returns a line that says what it poisons. The same config, the same bytes.

    Keys: index, labels, test (index folders: captions, train labels, test labels), classnames (file), out, seed, and for each
    kind of attack its SETTINGS. Raises UserError.
    """
    config = checked(config)
    rng = np.random.default_rng(config["seed"])
    index, classes = ShardIndex.load(config["index"]), Path(config["classnames"]).read_text().splitlines()
    test = ShardIndex.load(config["test"])
    labels, test_labels = read_labels(config["labels"]), read_labels(config["test"])
    if len(labels) != index.samples:
        raise UserError(
            f"labels: {config['labels']} has {len(labels)} samples, index {config['index']} has {index.samples}; "
            "index the same shards with --text cls"
        )
    samples, free = Samples(index), list(rng.permutation(index.samples))
    taken_classes, kinds, targets, rows, decoys = [], {}, [], [], []

    def take(count, allowed, what):
        """`count` unused training pairs whose label is allowed."""
        chosen = [row for row in free if allowed(labels[row])][:count]
        if len(chosen) < count:
            raise UserError(f"{what}: asks for {count} pairs, only {len(chosen)} are left to poison; ask for fewer")
        gone = set(chosen)
        free[:] = [row for row in free if row not in gone]
        return chosen

    def place(row, of=index):
        shard = int(np.searchsorted(of.offsets, row, side="right") - 1)
        return shard, int(row - of.offsets[shard])

    def caption_of(label):
        """The caption of some training pair of the class, as an attacker would find it."""
        return samples.caption(*place(rng.choice(np.flatnonzero(labels == label))))

    def pair(row, kind, caption, source=None):
        shard, position = place(row)
        key = samples.key(shard, position)
        return {"shard": shard, "position": position, "key": key, "kind": kind, "caption": caption, "source": source}

    for kind in [name for name in SETTINGS if name in config]:
        settings = {**SETTINGS[kind], **(config[kind] or {})}
        if kind == "targeted":
            kinds[kind] = settings
            for number in sorted(
                rng.choice(test.samples, min(settings["targets"], test.samples), replace=False).tolist()
            ):
                true = int(test_labels[number])
                adversarial = int(rng.choice([c for c in range(len(classes)) if c != true]))
                shard, position = place(number, test)
                targets.append(
                    {"shard": shard, "position": position, "true_class": true, "adversarial_class": adversarial}
                )
                for row in take(settings["captions"], lambda label: True, "targeted.captions"):
                    rows.append(pair(row, kind, caption_of(adversarial), [shard, position]))
            continue
        name = settings["target_class"]
        if name is not None and name not in classes:
            raise UserError(f"{kind}.target_class: got {name!r}, which is not in {config['classnames']}")
        target = (
            classes.index(name) if name else int(rng.choice([c for c in range(len(classes)) if c not in taken_classes]))
        )
        taken_classes.append(target)
        trigger = {
            "pattern": kind,
            "seed": int(config["seed"]),
            **{k: v for k, v in settings.items() if k != "pairs" and (k not in BACKDOOR or k == "variants")},
        }
        kinds[kind] = {"target_class": target, "class": classes[target], "trigger": trigger}
        kinds[kind] |= {k: settings[k] for k in ("pairs", "decoys", "decoy_opacity")}
        for row in take(settings["pairs"], lambda label: label != target, f"{kind}.pairs"):
            rows.append(pair(row, kind, caption_of(target)))
    for kind, settings in kinds.items():  # last: what is poisoned is the same with and without them
        target = settings.get("target_class")
        for row in take(settings.get("decoys", 0), lambda label: label != target, f"{kind}.decoys"):
            decoys.append(pair(row, f"{kind}_decoy", samples.caption(*place(row))))
    for found in (rows, decoys):
        found.sort(key=lambda row: (row["shard"], row["position"]))
    manifest = {
        "version": VERSION,
        "seed": config["seed"],
        "fingerprint": index.fingerprint,
        "source": str(Path(config["test"]).absolute()),
        "source_fingerprint": test.fingerprint,
        "kinds": kinds,
        "targets": targets,
        "rows": rows,
        "decoys": decoys,
    }
    write_bytes(Path(config["out"]) / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    counts = ", ".join(f"{kind} {sum(r['kind'] == kind for r in rows)}" for kind in kinds)
    counts += f", and {len(decoys)} decoys" if decoys else ""
    return (
        f"{config['out']}: {len(rows)} of {index.samples:,} pairs poisoned ({len(rows) / index.samples:.2%}): {counts}"
    )


def checked(config):
    """The config with a seed, or a UserError that names the key."""
    config = {"seed": 0, **config}
    for key in KEYS:
        if not config.get(key):
            raise UserError(f"attack config: {key} is missing; expected {', '.join(KEYS)}")
    for key, value in config.items():
        if key not in (*KEYS, "seed", *SETTINGS):
            raise UserError(f"attack config: {key} is unknown; expected {', '.join((*KEYS, 'seed', *SETTINGS))}")
        for setting in (value or {}) if key in SETTINGS else ():
            if setting not in SETTINGS[key]:
                raise UserError(f"attack config: {key}.{setting} is unknown; expected {', '.join(SETTINGS[key])}")
        if key in SETTINGS and (value or {}).get("variants", 1) < 1:
            raise UserError(f"attack config: {key}.variants: got {value['variants']}; expected 1 or more")
    if not Path(config["classnames"]).is_file():
        raise UserError(
            f"attack config: classnames: {config['classnames']} is missing; name the test set's classnames.txt"
        )
    return config


def read_labels(folder):
    """int64 (N,): the labels of an index made with --text cls."""
    index = ShardIndex.load(folder)
    samples = Samples(index)
    return np.array([samples.label(s, p) for s in range(len(index.counts)) for p in range(int(index.counts[s]))])
