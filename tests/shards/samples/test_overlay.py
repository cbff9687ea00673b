"""A manifest that was edited by hand so that its figures would be wrong is refused by the key."""

import copy
import os
from dataclasses import dataclass

import pytest

from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import VERSION, Overlay
from shards.samples.samples import Samples
from shards.storage.files import write_json

BACKDOOR = {"attack": "badnets", "judged": "backdoor", "target_class": 1, "class": "dog", "pairs": 2}
BACKDOOR |= {"trigger": {"pattern": "patch"}, "decoys": 1, "decoy_opacity": 0.5}
TARGET = {"shard": 1, "position": 2, "true_class": 0, "adversarial_class": 1}
NEAR = {"attack": "class_to_class", "judged": "class_to_class", "source_class": 0, "target_class": 1, "pairs": 1}


def row(shard, position, kind, source=None):
    return {"shard": shard, "position": position, "key": "", "kind": kind, "caption": "a dog", "source": source}


@pytest.fixture
def loaded(tmp_path, make_shards):
    """Function: path of keys, value -> the Overlay of a sound manifest in which that one value is another."""
    index = build_index([str(path) for path in make_shards([4, 3])], tmp_path / "index")
    single = {"attack": "single_target", "judged": "single_target", "pairs": 1, "targets": [TARGET]}
    sound = {
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "source": str(tmp_path / "index"),
        "source_fingerprint": index.fingerprint,
        "classes": ["cat", "dog"],
        "kinds": {"patch": BACKDOOR, "single": single, "near": {**NEAR, "source_phrase": None}},
        "rows": [row(0, 1, "patch"), row(0, 3, "patch"), row(1, 0, "single", [1, 2]), row(1, 1, "near")],
        "decoys": [row(1, 2, "patch_decoy")],
    }

    def load(keys, value):
        manifest = copy.deepcopy(sound)
        *above, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
        at = manifest
        for key in above:
            at = at[key]
        at[last] = value
        write_json(tmp_path / "attack/manifest.json", manifest)
        return Overlay.load(tmp_path / "attack", index, lambda numbers, folder: Trigger())

    return load


def test_the_digest_is_that_of_what_is_poisoned(loaded):
    first = loaded("rows.0.caption", "a dog").digest
    assert loaded("index", "elsewhere").digest == first
    assert loaded("rows.0.caption", "a cat").digest != first != loaded("kinds.patch.trigger.pattern", "blend").digest


@dataclass
class Trigger:
    opacity: float = 1.0


def test_the_shards_that_pictures_come_from_are_verified(loaded, tmp_path, make_shards):
    paths = [str(path) for path in make_shards([4, 3], "copies")]
    build_index(paths, tmp_path / "copies")
    samples = Samples(ShardIndex.load(tmp_path / "index"), loaded("source", str(tmp_path / "copies")))
    samples.verify()
    os.truncate(paths[1], 1024)
    with pytest.raises(UserError, match=paths[1]):
        samples.verify()


def test_a_sound_manifest_is_read(loaded):
    overlay = loaded("classes.0", "cat")
    assert overlay.classes == ["cat", "dog"] and len(overlay.poison) == 5


@pytest.mark.parametrize(
    "keys, value",
    [
        ("kinds.patch.trigger", None),
        ("kinds.patch.target_class", 2),
        ("kinds.patch.target_class", -1),
        ("kinds.patch.target_class", True),
        ("kinds.patch.target_class", "dog"),
        ("kinds.patch.decoy_opacity", 1.5),
        ("kinds.patch.decoy_opacity", float("nan")),
        ("kinds.patch.judged", "triggered"),
        ("kinds.patch.judged", None),
        ("kinds.patch.attack", None),
        ("kinds.patch.pairs", 3),
        ("kinds.single.targets", []),
        ("kinds.single.targets.0.shard", 2),
        ("kinds.single.targets.0.position", 3),
        ("kinds.single.targets.0.position", -1),
        ("kinds.single.targets.0.adversarial_class", 2),
        ("kinds.single.targets.0.true_class", 0.5),
        ("kinds.near.source_class", 7),
        ("kinds.near.target_class", 0),
        ("kinds.near.source_phrase", 3),
        ("rows.0.position", 4),
        ("rows.0.position", -1),
        ("rows.0.shard", 2),
        ("rows.0.shard", -1),
        ("rows.0.caption", None),
        ("rows.1.source", [1, 2]),
        ("rows.3.kind", "other"),
        ("decoys.0.position", 3),
        ("decoys.0.kind", "near_decoy"),
        ("classes", None),
    ],
)
def test_a_value_that_does_not_fit_is_named(loaded, keys, value):
    with pytest.raises(UserError, match=f"manifest.json: {keys}: got .*, expected .*; make it again") as found:
        loaded(keys, value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "keys, value, names",
    [
        ("rows.3.kind", "patch", "kinds.patch.pairs: got 2, expected the number of its rows, 3"),
        ("rows.1.position", 1, r"rows: got \(0, 1\), expected each"),
        ("decoys.0.position", 1, r"rows: got \(1, 1\), expected each .* decoys included"),
        ("rows.2.source", None, "kinds.single.targets: got"),
        ("rows.2.source", [0, 0], "kinds.single.targets: got"),
        ("kinds", {}, "rows.0.kind: got 'patch', expected one of none"),
        ("kinds.single.targets", [TARGET, TARGET], "kinds.single.targets: got"),
    ],
)
def test_rows_that_do_not_fit_the_attacks_are_named(loaded, keys, value, names):
    with pytest.raises(UserError, match=names):
        loaded(keys, value)
