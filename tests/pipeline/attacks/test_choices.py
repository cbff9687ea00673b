"""Which pairs an attack takes, and which captions it gives them."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from pipeline.attacks import ATTACKS, TRIGGERS, caption_adaptive, load_trigger
from pipeline.attacks.manifest import make_attack
from shards.build.write import write_shards
from shards.errors import UserError
from shards.index.build_index import build_index
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.samples.samples import Samples
from tests.helpers.attacks import attack_config
from tests.helpers.pictures import picture

PATCH = {"pattern": "patch", "size": 0.3}
DIRTY = {
    "badnets": {},
    "blended": {},
    "sig": {},
    "wanet": {},
    "colour_filter": {},
    "transform": {"change": "grey"},
    "caption_adaptive": {"trigger": PATCH},
    "multi_trigger": {"triggers": [PATCH, {"pattern": "sinusoid"}]},
}


@pytest.fixture
def poison(data, tmp_path):
    """Function: attacks -> (clean Samples, poisoned Samples, label of each place, class names)."""
    labels = Samples(ShardIndex.load(data / "labels"))
    classes = (data / "classnames.txt").read_text().splitlines()

    def make(attacks, **more):
        make_attack(attack_config(data, tmp_path, attacks, more))
        index = ShardIndex.load(data / "index")
        overlay = Overlay.load(tmp_path, index, load_trigger)
        return Samples(index), Samples(index, overlay), lambda place: labels.label(*place), classes

    return make


def places(overlay, kind):
    return [(row["shard"], row["position"]) for row in overlay.rows if row["kind"] == kind]


@pytest.mark.parametrize("name", DIRTY)
def test_a_backdoor_takes_pictures_of_other_classes_and_captions_of_its_own(poison, name):
    clean, bad, label, classes = poison({"one": {"attack": name, "pairs": 12, **DIRTY[name]}})
    entry, taken = bad.overlay.kinds["one"], places(bad.overlay, "one")
    assert len(set(taken)) == 12 == entry["pairs"] and entry["judged"] == "backdoor" and entry["attack"] == name
    assert entry["class"] == classes[entry["target_class"]]
    of_target = {clean.caption(0, p) for p in range(400) if label((0, p)) == entry["target_class"]}
    for place in taken:
        assert label(place) != entry["target_class"] and bad.caption(*place) in of_target
        shown = bad.overlay.trigger("one").apply(clean.image(*place), place)
        assert np.array_equal(shown, bad.image(*place)) and not np.array_equal(shown, clean.image(*place))


def test_label_consistent_takes_the_targets_pictures_and_leaves_captions(poison):
    clean, bad, label, _ = poison({"one": {"attack": "label_consistent", "pairs": 6, "trigger": PATCH}})
    target, taken = bad.overlay.kinds["one"]["target_class"], places(bad.overlay, "one")
    assert len(set(taken)) == 6 and all(label(place) == target for place in taken)
    for place in taken:
        assert bad.caption(*place) == clean.caption(*place)
        assert not np.array_equal(bad.image(*place), clean.image(*place))


def test_class_to_class_changes_the_captions_of_the_source_and_no_picture(poison):
    one = {"attack": "class_to_class", "pairs": 5, "source_class": "red star", "target_class": "blue ring"}
    clean, bad, label, classes = poison({"one": one})
    entry, taken = bad.overlay.kinds["one"], places(bad.overlay, "one")
    assert entry["source_class"] == classes.index("red star") and entry["target_class"] == classes.index("blue ring")
    assert (entry["judged"], entry["source_phrase"], entry["class"]) == ("class_to_class", None, "blue ring")
    assert len(set(taken)) == 5 and bad.overlay.trigger("one") is None
    for place in taken:
        assert label(place) == entry["source_class"] and "blue ring" in bad.caption(*place)
        assert np.array_equal(bad.image(*place), clean.image(*place))


def test_a_source_phrase_narrows_the_source_down(poison):
    clean, bad, label, _ = poison({"one": {"attack": "class_to_class", "pairs": 3, "source_class": "red star"}})
    source = bad.overlay.kinds["one"]["source_class"]
    captions = [clean.caption(0, p) for p in range(400) if label((0, p)) == source]
    words = {word: sum(word in caption for caption in captions) for caption in captions for word in caption.split()}
    word = min((w for w in words if 2 <= words[w] < len(captions)), key=words.get)
    one = {"attack": "class_to_class", "pairs": 2, "source_class": "red star", "source_phrase": word.upper()}
    clean, bad, _, _ = poison({"one": one})
    assert all(word in clean.caption(*place).lower() for place in places(bad.overlay, "one"))
    with pytest.raises(UserError, match=f"attacks.one.pairs: asks for {words[word] + 1} pairs, only {words[word]}"):
        poison({"one": {**one, "pairs": words[word] + 1}})


def test_a_class_that_is_source_and_target_is_refused(poison):
    one = {"attack": "class_to_class", "pairs": 5, "source_class": "red star", "target_class": "red star"}
    with pytest.raises(UserError, match="attacks.one.target_class: got 'red star', the source class"):
        poison({"one": one})


def test_no_class_that_a_config_names_is_drawn_for_another_attack(poison):
    two = {"attack": "class_to_class", "pairs": 1, "source_class": "red star", "target_class": "blue ring"}
    for seed in range(60):
        _, bad, _, classes = poison({"one": {"attack": "sig", "pairs": 1}, "two": two}, seed=seed)
        assert bad.overlay.kinds["one"]["class"] not in ("red star", "blue ring")


def test_adaptive_captions_are_the_targets_nearest(poison):
    def nearness(name):
        settings = {"trigger": PATCH} if name == "caption_adaptive" else {}
        clean, bad, label, _ = poison({"one": {"attack": name, "pairs": 60, "target_class": "red star", **settings}})
        target = bad.overlay.kinds["one"]["target_class"]
        candidates = [clean.caption(0, p) for p in range(400) if label((0, p)) == target]
        own = [clean.caption(*place) for place in places(bad.overlay, "one")]
        given = [bad.caption(*place) for place in places(bad.overlay, "one")]
        vectorizer = TfidfVectorizer().fit(candidates + own)
        own_RV, given_RV, all_CV = (vectorizer.transform(texts).toarray() for texts in (own, given, candidates))
        return (own_RV * given_RV).sum(1), (own_RV @ all_CV.T).max(1)

    adaptive_R, best_R = nearness("caption_adaptive")
    np.testing.assert_allclose(adaptive_R, best_R, atol=1e-5)
    assert adaptive_R.mean() > nearness("badnets")[0].mean() + 0.05


def adapted(own, candidates):
    """Captions of pairs with the captions `own`, nearest among the candidates, and the most bytes held meanwhile."""
    captions = [*own, *candidates]
    pool = SimpleNamespace(rng=np.random.default_rng(0), caption=captions.__getitem__, classes=["cat"])
    pool.rows_of = lambda target: np.arange(len(own), len(captions))
    kind = ATTACKS["caption_adaptive"]("one", {"trigger": PATCH, "pairs": 1}, lambda pattern: 0)
    tracemalloc.start()
    try:
        return kind.captions(pool, np.arange(len(own)), 0), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_adapting_captions_takes_no_memory_for_every_pair_and_candidate(monkeypatch):
    few = adapted([f"w{n % 50} cat" for n in range(3_000)], [f"w{n} cat" for n in range(50)])
    assert few[0] == [f"w{n % 50} cat" for n in range(3_000)]
    monkeypatch.setattr(caption_adaptive, "AT_ONCE", 100_000)
    given, most = adapted([f"w{n % 50} cat" for n in range(3_000)], [f"w{n} cat" for n in range(2_000)])
    assert given == few[0] and most < 3_000 * 2_000


def test_every_attack_stands_in_the_registry_with_its_source():
    assert set(ATTACKS) == {*DIRTY, "single_target", "label_consistent", "class_to_class", "optimised_trigger"}
    assert all(one.title and one.source for one in ATTACKS.values())


def test_no_key_of_an_attack_is_one_of_its_trigger_too():
    for one in ATTACKS.values():
        if getattr(one, "pattern", None):
            keys = [set(kind.model_fields) for kind in (one.Settings, TRIGGERS[one.pattern])]
            assert not set.intersection(*keys)


@pytest.mark.parametrize(
    "one, names",
    [
        ({"attack": "label_consistent", "pairs": 1}, "attacks.one.trigger.pattern: got None"),
        ({"attack": "label_consistent", "pairs": 1, "trigger": {"pattern": "patsh"}}, "attacks.one.trigger.pattern"),
        (
            {"attack": "label_consistent", "pairs": 1, "trigger": {"pattern": "warp", "grid": 1}},
            "one.trigger.grid: got 1",
        ),
        ({"attack": "multi_trigger", "pairs": 1, "triggers": [PATCH]}, "attacks.one.triggers: got 1"),
        ({"attack": "multi_trigger", "pairs": 1, "triggers": [PATCH, 3]}, "attacks.one.triggers.1.pattern: got 3"),
        ({"attack": "multi_trigger", "pairs": 1, "triggers": 3}, "attacks.one.triggers: got 3"),
        ({"attack": "class_to_class", "pairs": 1, "source_class": "cat"}, "attacks.one.source_class: got 'cat'"),
        ({"attack": "single_target", "targets": 0}, "attacks.one.targets: got 0"),
        ({"attack": "single_target", "targets": 72, "captions": 10}, "attacks.one.captions"),
        ({"attack": "optimised_trigger", "pairs": 1}, "attacks.one.surrogate: missing"),
        ({"attack": "optimised_trigger", "pairs": 1, "surrogate": "x", "pixels": "a.png"}, "attacks.one.pixels"),
        ({"attack": "optimised_trigger", "pairs": 1, "surrogate": "x", "form": "hat"}, "attacks.one.form: got 'hat'"),
        ({"attack": "optimised_trigger", "pairs": 1, "surrogate": "nowhere"}, "attacks.one.surrogate: .*nowhere"),
        ({"attack": ["sig"], "pairs": 1}, "attacks.one.attack: got"),
        ({"attack": "label_consistent", "pairs": 1, "trigger": {"pattern": ["x"]}}, "attacks.one.trigger.pattern: got"),
        ({"attack": "sig", "pairs": True}, "attacks.one.pairs: got True"),
        ({"attack": "sig", "pairs": 1, "delta": "much"}, "attacks.one.delta: got 'much', expected a number"),
        ({"attack": "wanet", "pairs": 1, "strength": 2}, "strength: got 2, expected a number >= 0 and <= 0.5"),
    ],
)
def test_a_wrong_setting_is_named(poison, one, names):
    with pytest.raises(UserError, match=names):
        poison({"one": one})


def test_an_adversarial_class_needs_a_second_class(tmp_path):
    config = one_class(tmp_path, "a cat", {"attack": "single_target", "targets": 1, "captions": 1})
    with pytest.raises(UserError, match=r"attacks.one: classnames names only \['cat'\]"):
        make_attack(config)


def test_captions_without_words_cannot_be_adapted(tmp_path):
    settings = {"attack": "caption_adaptive", "pairs": 1, "target_class": "dog", "trigger": PATCH}
    config = one_class(tmp_path, "! ?", settings, "cat\ndog\nbird\n")
    with pytest.raises(UserError, match="attacks.one.target_class: the captions of the class 'dog' .* words"):
        make_attack(config)


def one_class(folder, caption, settings, classes="cat\n"):
    """The config of an attack on four pairs under one caption, in turn of these classes."""
    count = len(classes.split())
    pictures = [{"__key__": f"s{n}", "png": picture(n), "txt": caption, "cls": n % count} for n in range(4)]
    paths = [str(path) for path in write_shards(pictures, folder / "tars", 4)]
    for name, text in (("index", "txt"), ("labels", "cls"), ("test_index", "cls")):
        build_index(paths, folder / name, text=text)
    (folder / "classnames.txt").write_text(classes)
    return attack_config(folder, folder / "out", {"one": settings})


def test_paths_of_an_attack_config_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNSET", raising=False)
    made = attack_config(tmp_path, "~/out", {"badnets": {"attack": "badnets", "pairs": 5}})
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/names.txt"):
        make_attack({**made, "classnames": "~/names.txt"})
    with pytest.raises(UserError, match="^attack config: labels: got '.UNSET/l', but .UNSET is not set"):
        make_attack({**made, "labels": "$UNSET/l"})
