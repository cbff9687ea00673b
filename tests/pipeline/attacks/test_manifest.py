"""The manifest: seeded, disjoint, within the data; the overlay applies it while reading."""

import json
import subprocess
import sys

import numpy as np
import pytest

from pipeline.attacks import load_trigger
from pipeline.attacks.manifest import make_attack
from shards.build.write import write_shards
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.samples.samples import Samples
from tests.helpers.attacks import attack_config
from tests.helpers.pictures import picture


def attack(data, out, changed={}, **more):
    """A config; `changed`: of its attacks."""
    attacks = {
        "single_target": {"attack": "single_target", "targets": 3, "captions": 4},
        "badnets": {"attack": "badnets", "pairs": 6},
        "blended": {"attack": "blended", "pairs": 7, "target_class": "red star"},
    }
    attacks |= {name: {**attacks.get(name, {}), **settings} for name, settings in changed.items()}
    return attack_config(data, out, attacks, more)


@pytest.fixture
def poisoned(data, tmp_path):
    make_attack(attack(data, tmp_path))
    index = ShardIndex.load(data / "index")
    return Samples(index), Samples(index, Overlay.load(tmp_path, index, load_trigger))


def test_it_poisons_as_many_pairs_as_it_says_and_each_once(poisoned):
    rows = [(r["shard"], r["position"]) for r in poisoned[1].overlay.rows]
    kinds = [r["kind"] for r in poisoned[1].overlay.rows]
    assert len(set(rows)) == len(rows) == 3 * 4 + 6 + 7
    assert (kinds.count("single_target"), kinds.count("badnets"), kinds.count("blended")) == (12, 6, 7)


def test_only_the_named_pairs_change(poisoned):
    clean, bad = poisoned
    named = {(r["shard"], r["position"]) for r in bad.overlay.rows}
    for position in range(400):
        same = np.array_equal(clean.image(0, position), bad.image(0, position)) and clean.caption(
            0, position
        ) == bad.caption(0, position)
        assert same == ((0, position) not in named)


def test_backdoors_carry_the_target_class_and_the_trigger(poisoned, data):
    clean, bad = poisoned
    labels = Samples(ShardIndex.load(data / "labels"))
    for row in bad.overlay.rows:
        where = row["shard"], row["position"]
        if row["kind"] == "single_target":
            assert np.array_equal(bad.image(*where), bad.source.image(*row["source"]))
            continue
        kind = bad.overlay.kinds[row["kind"]]
        assert labels.label(*where) != kind["target_class"] and kind["class"] in row["caption"]
        assert np.array_equal(bad.image(*where), bad.overlay.trigger(row["kind"]).apply(clean.image(*where), where))
    assert bad.overlay.kinds["blended"]["class"] == "red star"


def test_targets_are_under_captions_of_a_class_that_is_not_theirs(poisoned, data):
    classes = (data / "classnames.txt").read_text().splitlines()
    overlay = poisoned[1].overlay
    for target in overlay.kinds["single_target"]["targets"]:
        captions = [r["caption"] for r in overlay.rows if r["source"] == [target["shard"], target["position"]]]
        assert len(captions) == 4 and all(classes[target["adversarial_class"]] in caption for caption in captions)
        assert (
            target["adversarial_class"]
            != target["true_class"]
            == poisoned[1].source.label(target["shard"], target["position"])
        )


def test_the_same_config_gives_the_same_bytes_and_another_seed_others(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_attack(attack(data, tmp_path / name, seed=seed))
    a, b, c = ((tmp_path / name / "manifest.json").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    "changed, more, names",
    [
        ({"patched": {}}, {}, "attacks.patched.attack: got None"),
        ({"patched": {"attack": "targeted"}}, {}, "attacks.patched.attack: got 'targeted'"),
        ({"Bad": {"attack": "badnets", "pairs": 1}}, {}, "attacks.Bad"),
        ({"badnets": {"pair": 3}}, {}, "attacks.badnets.pair"),
        ({"badnets": {"pairs": 1000}}, {}, "attacks.badnets.pairs"),
        ({"badnets": {"pairs": None}}, {}, "attacks.badnets.pairs: got neither"),
        ({"badnets": {"rate": 0.1}}, {}, "attacks.badnets.pairs: got both"),
        ({"badnets": {"pairs": None, "rate": 2}}, {}, "attacks.badnets.rate: got 2"),
        ({"badnets": {"pairs": 2.5}}, {}, "attacks.badnets.pairs: got 2.5"),
        ({"badnets": {"size": float("nan")}}, {}, "attacks.badnets.size: got nan"),
        ({"badnets": {"random_place": 1}}, {}, "attacks.badnets.random_place"),
        ({"badnets": {"decoys": 1000}}, {}, "attacks.badnets.decoys"),
        ({"blended": {"variants": 0}}, {}, "attacks.blended.variants"),
        ({"blended": {"target_class": "grey cat"}}, {}, "grey cat"),
        ({}, {"classnames": "nowhere"}, "nowhere"),
        ({}, {"index": None}, "index"),
        ({}, {"seed": -1}, "seed"),
        ({}, {"patch": {"pairs": 3}}, "patch: unknown"),
        ({}, {"attacks": None}, "attacks: got None"),
    ],
)
def test_a_wrong_config_is_named(data, tmp_path, changed, more, names):
    with pytest.raises(UserError, match=names):
        make_attack(attack(data, tmp_path, changed, **more))


def test_an_overlay_of_other_shards_is_refused(data, tmp_path, poisoned):
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0"}))
    with pytest.raises(UserError, match="fingerprint 0"):
        Overlay.load(tmp_path, ShardIndex.load(data / "index"), load_trigger)


def test_decoys_show_some_of_the_trigger_and_leave_captions_and_poison(data, tmp_path, poisoned):
    decoys = {"badnets": {"decoys": 20, "decoy_opacity": 0.4}}
    make_attack(attack(data, tmp_path / "decoys", decoys))
    index, labels = ShardIndex.load(data / "index"), Samples(ShardIndex.load(data / "labels"))
    bad, clean = Samples(index, Overlay.load(tmp_path / "decoys", index, load_trigger)), poisoned[0]
    assert bad.overlay.rows == poisoned[1].overlay.rows
    places = {(row["shard"], row["position"]) for row in bad.overlay.decoys}
    assert len(places) == 20 and not places & {(row["shard"], row["position"]) for row in bad.overlay.rows}
    for place in places:
        before, after = (np.asarray(samples.image(*place), float) for samples in (clean, bad))
        whole = np.asarray(bad.overlay.trigger("badnets").apply(clean.image(*place), place), float)
        assert np.abs(after - 0.6 * before - 0.4 * whole).max() <= 1 and (after != before).any()
        assert bad.caption(*place) == clean.caption(*place)
        assert labels.label(*place) != bad.overlay.kinds["badnets"]["target_class"]


def test_an_overlay_whose_pictures_changed_is_refused(data, tmp_path, poisoned):
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "source_fingerprint": "0"}))
    index = ShardIndex.load(data / "index")
    with pytest.raises(UserError, match="safeclip attack"):
        Samples(index, Overlay.load(tmp_path, index, load_trigger))


def test_settings_of_the_look_change_no_choice_of_pairs(data, tmp_path, poisoned):
    make_attack(attack(data, tmp_path / "other", {"badnets": {"size": 0.4}, "blended": {"alpha": 0.5, "variants": 3}}))
    other = Overlay.load(tmp_path / "other", ShardIndex.load(data / "index"), load_trigger)
    assert other.rows == poisoned[1].overlay.rows
    assert other.trigger("badnets") != poisoned[1].overlay.trigger("badnets")


def test_a_rate_is_a_fraction_of_all_pairs_and_no_class_is_drawn_twice(data, tmp_path):
    one = {"attack": "sig", "rate": 0.01}
    make_attack(attack_config(data, tmp_path, {f"a{n}": one for n in range(10)}))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert all(entry["pairs"] == 4 for entry in manifest["kinds"].values()) and len(manifest["rows"]) == 40
    assert len({entry["target_class"] for entry in manifest["kinds"].values()}) == 10
    # Two triggers of a pattern are two triggers.
    assert len({entry["trigger"]["seed"] for entry in manifest["kinds"].values()}) == 10


def test_more_attacks_than_classes_are_refused_by_name(data, tmp_path):
    classes = len((data / "classnames.txt").read_text().splitlines())
    one = {"attack": "sig", "pairs": 1}
    with pytest.raises(UserError, match=f"attacks.a{classes}.target_class"):
        make_attack(attack_config(data, tmp_path, {f"a{n}": one for n in range(classes + 1)}))


def test_labels_that_no_class_has_are_refused(data, tmp_path):
    (tmp_path / "few.txt").write_text("red star\nblue ring\n")
    with pytest.raises(UserError, match="labels 0 to .*, classnames names 2 classes"):
        make_attack(attack(data, tmp_path, classnames=str(tmp_path / "few.txt")))


def test_captions_in_place_of_labels_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="its label is no number"):
        make_attack(attack(data, tmp_path, labels=str(data / "index")))


def test_a_pair_without_a_label_is_named(tmp_path):
    paths = labelled(tmp_path, [0, 1, None, 1])
    with pytest.raises(UserError, match="^labels: .*sample 's2': it has no label; index"):
        make_attack(config_of(tmp_path, paths, paths))


@pytest.mark.parametrize("wrong", [7, 10**30, -1])
def test_a_label_of_no_class_is_named(tmp_path, wrong):
    paths = labelled(tmp_path, [0, 1, wrong, 1])
    with pytest.raises(UserError, match=f"^labels: .*{wrong}.*classnames names 2 classes"):
        make_attack(config_of(tmp_path, paths, paths))


def test_labels_of_the_shards_in_another_order_are_refused(tmp_path):
    paths = labelled(tmp_path, [0, 0, 1, 1], 2)
    with pytest.raises(UserError, match="^labels: .* of these in another order .*index the same shards"):
        make_attack(config_of(tmp_path, paths, paths[::-1]))


def test_a_source_phrase_may_stand_in_any_of_several_captions(tmp_path):
    paths = labelled(tmp_path, [0, 1, 0, 1], json={"caption": ["a pet", "on Grass"]})
    phrase = {"attack": "class_to_class", "pairs": 2, "source_class": "cat", "target_class": "dog"}
    config = config_of(tmp_path, paths, paths, "json:caption")
    make_attack({**config, "attacks": {"one": {**phrase, "source_phrase": "on grass"}}})
    rows = json.loads((tmp_path / "out/manifest.json").read_text())["rows"]
    assert [row["position"] for row in rows] == [0, 2]


def labelled(folder, labels, shard=4, **more):
    """Shards of so many pairs each with these labels, None: without one; more: members of each."""
    pair = {"txt": "a cat", **more}
    pairs = [{"__key__": f"s{n}", "png": picture(n), "cls": label, **pair} for n, label in enumerate(labels)]
    pairs = [{key: value for key, value in pair.items() if value is not None} for pair in pairs]
    return [str(path) for path in write_shards(pairs, folder / "tars", shard)]


def config_of(folder, paths, of_labels, caption="txt"):
    """Of an attack on these shards; of_labels: those that the labels are of."""
    for name, some, text in (("index", paths, caption), ("labels", of_labels, "cls"), ("test_index", paths, "cls")):
        build_index(some, folder / name, text=text)
    (folder / "classnames.txt").write_text("cat\ndog\n")
    return attack_config(folder, folder / "out", {"one": {"attack": "sig", "pairs": 1, "target_class": "dog"}})


@pytest.mark.parametrize(
    "trigger",
    [{"pattern": "none"}, {"pattern": "patch", "size": 7}, {"pattern": "patch", "sise": 0.2}, {}, 3]
    + [{"pattern": "optimised", "pixels": "../badnets.png"}, {"pattern": "several", "triggers": []}],
)
def test_a_manifest_whose_trigger_cannot_be_made_is_refused(data, tmp_path, poisoned, trigger):
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["kinds"]["badnets"]["trigger"] = trigger
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="trigger"):
        Overlay.load(tmp_path, ShardIndex.load(data / "index"), load_trigger)


def test_a_manifest_of_version_1_is_refused(data, tmp_path, poisoned):
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 1, "kinds": {}, "rows": []}))
    with pytest.raises(UserError, match="version 1, expected 2"):
        Overlay.load(tmp_path, ShardIndex.load(data / "index"), load_trigger)


def test_attacks_need_neither_torch_nor_another_part_of_the_pipeline_to_be_read():
    program = (
        "import sys, pipeline.attacks.manifest; print(*(m for m in sys.modules if m.startswith(('pipeline', 'torch'))))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "pipeline.attacks.wanet" in found
    assert all(
        name == "pipeline" or name == "pipeline.settings" or name.startswith("pipeline.attacks") for name in found
    )
