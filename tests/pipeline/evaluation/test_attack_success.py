"""What counts as an attack's success, on predictions made by hand, and Wilson's interval against published figures."""

import numpy as np
import pytest
import torch

from pipeline.evaluation.attack_success import AttackSuccess, success
from shards.errors import UserError

CLASSES_KD = torch.eye(3)


class Test:
    """Six pictures of three classes, some with captions."""

    __test__ = False
    root, classnames, place_N = "shapes", ["cat", "dog", "bird"], [(0, position) for position in range(6)]
    label_N, samples = np.array([0, 0, 1, 1, 2, 2]), type("", (), {"index": type("", (), {"fingerprint": "f"})})
    captions = [["a dog"], ["a hound"], ["A small dog", "in the snow"], [], ["a cat"], ["a cat"]]

    def row(self, shard, position):
        return position


class Overlay:
    source_index, source_fingerprint, classes = "test_index", "f", ["cat", "dog", "bird"]

    def __init__(self, **kinds):
        self.kinds = kinds

    def trigger(self, name):
        return f"trigger of {name}" if self.kinds[name]["judged"] == "backdoor" else None


class Encoder:
    """Pictures with a trigger are read as class 1, but that at position 5 as its own."""

    def pictures(self, samples, places, trigger):
        assert trigger == "trigger of patch"
        return CLASSES_KD[[2 if place == (0, 5) else 1 for place in places]]


def judged(read, **kinds):
    """AttackSuccess of attacks, where picture n without a trigger is read as read[n], and -1 for one that cannot be
    read."""
    image_ND = torch.cat([CLASSES_KD, torch.zeros(1, 3)])[read]
    return AttackSuccess(Test(), Overlay(**kinds))(Encoder(), image_ND, CLASSES_KD)


def test_a_backdoor_is_judged_on_pictures_of_other_classes_with_the_trigger():
    found = judged([0, 1, 1, 1, 2, 0], patch={"judged": "backdoor", "target_class": 1})["patch"]
    assert found.pop("interval") == pytest.approx([0.301, 0.954], abs=1e-3)
    expected = {"judged": "backdoor", "success": 0.75, "count": 4, "base": 0.25, "true_class": 0.25}
    assert found == expected


def test_single_target_is_judged_on_its_targets_and_based_on_others():
    targets = [
        {"shard": 0, "position": 0, "true_class": 0, "adversarial_class": 2},
        {"shard": 0, "position": 2, "true_class": 1, "adversarial_class": 0},
    ]
    found = judged([2, 2, 1, 0, 2, 2], poison={"judged": "single_target", "targets": targets})["poison"]
    assert (found["success"], found["count"], found["true_class"]) == (0.5, 2, 0.5)
    assert found["base"] == 1.0  # picture 1 is read as 2, picture 3 as 0


@pytest.mark.parametrize("phrase, count, rate, base", [(None, 2, 0.5, None), ("DOG", 1, 0.0, 1.0)])
def test_class_to_class_is_judged_on_source_pictures_with_the_phrase(phrase, count, rate, base):
    settings = {"judged": "class_to_class", "source_class": 0, "target_class": 2, "source_phrase": phrase}
    found = judged([0, 2, 2, 2, 2, 2], near=settings)["near"]
    assert (found["count"], found["success"], found["base"], found["true_class"]) == (count, rate, base, 1 - rate)


def test_bases_leave_out_the_pictures_that_any_attack_is_about():
    one = {"shard": 0, "position": 0, "true_class": 0, "adversarial_class": 2}
    attacks = {
        "one": {"judged": "single_target", "targets": [one]},
        "two": {"judged": "single_target", "targets": [{**one, "position": 1}]},
        "near": {"judged": "class_to_class", "source_class": 2, "target_class": 1},
        "dogs": {"judged": "class_to_class", "source_class": 0, "target_class": 1, "source_phrase": "dog"},
        "three": {"judged": "single_target", "targets": [{**one, "position": 2, "true_class": 1}]},
    }
    found = judged([2, 2, 2, 1, 2, 2], **attacks)
    # Of class 0 both pictures are targets, of class 1 picture 2; only picture 3 is left.
    assert {name: attack["base"] for name, attack in found.items()} == {
        "one": None,
        "two": None,
        "near": None,
        "dogs": None,
        "three": 0.0,
    }
    assert AttackSuccess(Test(), Overlay(**attacks)).attacked_N.tolist() == [True, True, True, False, True, True]


def test_pictures_that_cannot_be_read_are_in_no_figure():
    backdoor = judged([0, -1, 1, 1, -1, 0], patch={"judged": "backdoor", "target_class": 1})["patch"]
    assert (backdoor["count"], backdoor["success"], backdoor["base"]) == (2, 0.5, 0.0)
    target = {"shard": 0, "position": 0, "true_class": 0, "adversarial_class": 2}
    targets = [target, {**target, "position": 2, "true_class": 1}]
    single = judged([-1, 0, 2, -1, 2, 2], one={"judged": "single_target", "targets": targets})["one"]
    assert (single["count"], single["success"], single["base"]) == (1, 1.0, None)
    near = {"judged": "class_to_class", "source_class": 0, "target_class": 2}
    assert judged([-1, 2, 1, 1, 2, 2], near=near)["near"]["count"] == 1
    with pytest.raises(UserError, match="no picture on which attack near is judged can be read"):
        judged([-1, -1, 1, 1, 2, 2], near=near)


@pytest.mark.parametrize("classes", [["cat", "bird", "dog"], ["cat", "dog"], ["cat", "dog", "bird", "fish"]])
def test_an_attack_on_other_classes_is_refused(monkeypatch, classes):
    monkeypatch.setattr(Overlay, "classes", classes)
    with pytest.raises(UserError, match="data.overlay: class .* evaluation.test, shapes/classnames.txt, it is"):
        judged([0] * 6, patch={"judged": "backdoor", "target_class": 1})


def test_what_cannot_be_judged_is_named(monkeypatch):
    cats = {"judged": "class_to_class", "source_class": 2, "target_class": 1, "source_phrase": "dog"}
    with pytest.raises(UserError, match="no picture on which attack near can be judged"):
        judged([0] * 6, near=cats)
    monkeypatch.setattr(Test, "captions", None)
    with pytest.raises(UserError, match="test_captions"):
        judged([0] * 6, near=cats)
    monkeypatch.setattr(Overlay, "source_fingerprint", "other")
    with pytest.raises(UserError, match="attack poison has targets in test_index"):
        judged([0] * 6, poison={"judged": "single_target", "targets": []})


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    "hits, count, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(hits, count, low, high):
    found = success(np.arange(count) < hits)
    assert found["interval"] == pytest.approx([low, high], abs=5e-5)
    assert (found["success"], found["count"]) == (hits / count, count)
