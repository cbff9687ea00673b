"""The manifest: seeded, disjoint, within the data; the overlay applies it while reading."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.attacks import load_trigger
from pipeline.attacks.badnets import Patch
from pipeline.attacks.blended import Blend
from pipeline.attacks.manifest import make_attack
from shards.demo import shapes
from shards.errors import UserError
from shards.index import ShardIndex
from shards.overlay import Overlay
from shards.samples import Samples


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "shapes"
    shapes(out, pairs=400, test=72)
    return out


def attack(data, out, changed={}, **more):
    """A config; `changed`: of its attacks."""
    attacks = {
        "single_target": {"attack": "single_target", "targets": 3, "captions": 4},
        "badnets": {"attack": "badnets", "pairs": 6},
        "blended": {"attack": "blended", "pairs": 7, "target_class": "red star"},
    }
    return {
        "index": str(data / "index"),
        "labels": str(data / "labels"),
        "test": str(data / "test_index"),
        "classnames": str(data / "classnames.txt"),
        "out": str(out),
        "attacks": {**attacks, **{k: {**attacks.get(k, {}), **v} for k, v in changed.items()}},
        **more,
    }


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


def test_decoys_show_some_of_the_trigger_keep_their_captions_and_change_nothing_of_the_poison(data, tmp_path, poisoned):
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


def test_of_several_variants_each_sample_shows_one():
    grey, trigger = Image.new("RGB", (32, 32), (128, 128, 128)), Patch(0, size=0.25, variants=3)
    shown = [trigger.apply(grey, (0, position)).tobytes() for position in range(60)]
    assert len(set(shown)) == 3 and min(map(shown.count, set(shown))) >= 10
    assert Patch(0, size=0.25).apply(grey, (0, 1)).tobytes() in shown


def test_a_trigger_scales_with_the_picture():
    patch = Patch(0, size=0.25, left=0.5, top=0.5, cells=2)
    for size in (16, 64):
        grey = Image.new("RGB", (size, size), (128, 128, 128))
        changed = (np.asarray(patch.apply(grey, (0, 0))) != 128).all(2)
        assert changed.sum() == (size // 4) ** 2 and changed[size // 2, size // 2] and not changed[0, 0]
    blended = np.asarray(Blend(0, alpha=0.2).apply(Image.new("RGB", (32, 32), (128, 128, 128)), (0, 0)))
    assert 0 < np.abs(blended.astype(int) - 128).mean() < 0.2 * 128


@given(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), st.integers(8, 64), st.integers(8, 64))
def test_a_patch_at_a_random_place_is_whole_wherever_it_stands(sample, width, height):
    grey, patch = (
        Image.new("RGB", (width, height), (128, 128, 128)),
        Patch(0, size=0.25, cells=2, random_place=True),
    )
    triggered = np.asarray(patch.apply(grey, sample))
    changed = (triggered != 128).all(2)
    side = round(min(width, height) / 4)
    assert changed.sum() == side**2
    assert np.array_equal(
        triggered, np.asarray(patch.apply(grey, sample))
    )  # training and scoring meet the same picture


def test_a_patch_at_random_places_has_another_in_other_samples():
    grey, patch = Image.new("RGB", (64, 64), (128, 128, 128)), Patch(0, size=0.25, cells=2, random_place=True)
    found = {np.argwhere(np.asarray(patch.apply(grey, (0, n))) != 128)[0].tobytes() for n in range(50)}
    assert len(found) > 40


def test_an_overlay_whose_pictures_changed_is_refused(data, tmp_path, poisoned):
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "source_fingerprint": "0"}))
    index = ShardIndex.load(data / "index")
    with pytest.raises(UserError, match="safeclip attack"):
        Samples(index, Overlay.load(tmp_path, index, load_trigger))
