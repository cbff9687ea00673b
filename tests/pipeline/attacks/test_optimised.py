"""The optimised trigger: on a real CLIP, that it points to the target there, and that a manifest holds it whole."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.attacks import load_trigger
from pipeline.attacks.manifest import make_attack
from pipeline.attacks.optimised_trigger import Optimised
from pipeline.attacks.surrogate import Surrogate, put_on
from shards.errors import UserError
from shards.index.shard_index import ShardIndex
from shards.samples.overlay import Overlay
from shards.samples.samples import Samples
from shards.views.augment import plain_view
from tests.helpers.attacks import attack_config
from tests.helpers.audits import make_model

FORMS = {
    "patch": {"size": 0.5, "left": 0.5, "top": 0.5},
    "placed": {"size": 0.5, "random_place": True},
    "perturbation": {"form": "perturbation", "strength": 0.2},
}


@pytest.fixture(scope="module")
def surrogate(tmp_path_factory):
    """An open_clip local directory: a small CLIP with random weights."""
    return make_model(tmp_path_factory.mktemp("surrogate") / "model")


@pytest.fixture(scope="module")
def made(data, surrogate, tmp_path_factory):
    """Folder of a manifest with an optimised trigger of each form, made twice: first/ and second/."""
    folder = tmp_path_factory.mktemp("optimised")
    same = {
        "attack": "optimised_trigger",
        "pairs": 6,
        "surrogate": surrogate,
        "steps": 30,
        "pictures": 48,
        "cells": 6,
        "batch": 16,
    }
    for name in ("first", "second"):
        make_attack(attack_config(data, folder / name, {form: {**same, **FORMS[form]} for form in FORMS}))
    return folder


def opened(data, folder):
    index = ShardIndex.load(data / "index")
    return Samples(index), Overlay.load(folder, index, load_trigger)


@pytest.mark.parametrize("form", FORMS)
def test_the_surrogate_reads_other_pictures_with_it_as_the_target(data, made, surrogate, form):
    clean, overlay = opened(data, made / "first")
    target, labels = overlay.kinds[form]["target_class"], Samples(ShardIndex.load(data / "labels"))
    test, test_index = Samples(ShardIndex.load(data / "test_index")), 0  # it was not fitted on these
    classes = sorted({labels.label(0, row) for row in range(400)})
    captions = [[clean.caption(0, row) for row in range(400) if labels.label(0, row) == c][:32] for c in classes]
    model = Surrogate(surrogate, captions)

    def probability(change):
        pictures = [change(test.image(test_index, row), (test_index, row)) for row in range(72)]
        views = np.stack([plain_view(picture, model.size) for picture in pictures])
        with torch.no_grad():
            logits_BK = model.logits(torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255)
        return float(logits_BK.softmax(1)[:, classes.index(target)].mean())

    def random_one(image, sample):
        colours = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return put_in_place_of(overlay.trigger(form), colours).apply(image, sample)

    fitted = probability(overlay.trigger(form).apply)
    assert fitted > 1.2 * probability(lambda image, sample: image) and fitted > 1.1 * probability(random_one)
    assert 0 <= overlay.kinds[form]["trigger"]["success"] <= 1


def put_in_place_of(trigger, colours):
    """The same trigger with other colours."""

    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    return trigger.model_copy(update={"data": file.getvalue()})


def test_the_same_config_gives_the_same_bytes(made):
    for name in ("manifest.json", *(f"{form}.png" for form in FORMS)):
        assert (made / "first" / name).read_bytes() == (made / "second" / name).read_bytes()
    assert sorted(path.name for path in (made / "first").iterdir()) == sorted(
        ["manifest.json", *(f"{f}.png" for f in FORMS)]
    )


@pytest.mark.parametrize("form", FORMS)
def test_what_is_fitted_is_what_pictures_show(data, made, form):
    _, overlay = opened(data, made / "first")
    trigger = overlay.trigger(form)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    shown = np.asarray(trigger.apply(image, (0, 0)), float)
    colours = np.asarray(Image.open(made / "first" / f"{form}.png"))
    if form == "placed":
        rows, columns = np.nonzero((shown != np.asarray(image)).any(2))
        assert np.ptp(rows) < 16 and np.ptp(columns) < 16
        return
    pixels_1CHW = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    colours_CGG = torch.from_numpy(colours.copy()).permute(2, 0, 1).float() / 255
    fitted = 255 * put_on(trigger, pixels_1CHW, colours_CGG, None)[0].permute(1, 2, 0).numpy()
    assert np.abs(fitted - shown).max() <= (0 if form == "patch" else 2)
    if form == "perturbation":
        assert np.abs(shown - np.asarray(image)).max() <= 0.2 * 255 * 128 / 127 + 1


def test_another_picture_than_the_manifests_is_refused(data, made, tmp_path):
    (tmp_path / "manifest.json").write_bytes((made / "first/manifest.json").read_bytes())
    index = ShardIndex.load(data / "index")
    with pytest.raises(UserError, match="patch.png: cannot be read"):
        Overlay.load(tmp_path, index, load_trigger)
    for form in FORMS:
        (tmp_path / f"{form}.png").write_bytes((made / "first/patch.png").read_bytes())
    with pytest.raises(UserError, match="placed.png: not the picture of the manifest"):
        Overlay.load(tmp_path, index, load_trigger)


def test_no_file_outside_the_manifests_folder_is_read(made):
    numbers = json.loads((made / "first/manifest.json").read_text())["kinds"]["patch"]["trigger"]
    folder = made / "first/inside"
    folder.mkdir()
    with pytest.raises(UserError, match="not the picture of the manifest"):
        Optimised.load({k: v for k, v in {**numbers, "pixels": "../patch.png"}.items() if k != "pattern"}, "x", folder)
