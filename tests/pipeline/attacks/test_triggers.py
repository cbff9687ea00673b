"""Triggers: each by its paper's formula, at any picture size, and the same in a picture whenever it is read."""

import io
import json
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.attacks import TRIGGERS, load_trigger
from pipeline.attacks.badnets import Patch
from pipeline.attacks.blended import Blend
from pipeline.attacks.colour_filter import ToneCurve
from pipeline.attacks.sig import Sinusoid
from pipeline.attacks.transform import CHANGES, Transformation
from pipeline.attacks.wanet import Warp
from shards.views.augment import plain_view

PLACES = {False: [[25, 25]] * 3, True: [[7, 17], [10, 12], [11, 16]]}
SEVERAL = [{"pattern": "patch", "seed": 1}, {"pattern": "sinusoid"}, {"pattern": "warp", "seed": 2}]
PLAIN = [
    {"pattern": "patch"},
    {"pattern": "patch", "random_place": True, "variants": 3},
    {"pattern": "blended", "variants": 2},
    {"pattern": "blended", "opacity": 0.5},
    {"pattern": "sinusoid", "variants": 4},
    {"pattern": "warp", "variants": 2},
    {"pattern": "tone_curve", "variants": 2},
    {"pattern": "several", "triggers": SEVERAL},
    *({"pattern": "transformation", "change": change} for change in CHANGES),
]
samples = st.tuples(st.integers(0, 2**40), st.integers(0, 2**40))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def numbers(image):
    return np.asarray(image, float)


@given(st.sampled_from(PLAIN), st.integers(0, 2**63 - 1), samples, st.integers(13, 70), st.integers(13, 70))
def test_a_trigger_changes_any_picture_and_always_in_the_same_way(one, seed, sample, width, height):
    trigger, image = load_trigger({"seed": seed, **one}), noise(width, height)
    triggered = trigger.apply(image, sample)
    assert triggered.size == image.size and triggered.mode == "RGB"
    assert (numbers(triggered) != numbers(image)).any()
    np.testing.assert_array_equal(numbers(image), numbers(noise(width, height)))  # the original stays as it is
    again = load_trigger(json.loads(json.dumps(trigger.numbers())))  # as a manifest holds it
    np.testing.assert_array_equal(numbers(again.apply(image, sample)), numbers(triggered))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (65_600, 1), (1, 65_600)])
@pytest.mark.parametrize("one", PLAIN, ids=lambda one: "-".join(map(str, one.values()))[:30])
def test_a_trigger_takes_any_shape_of_a_picture(one, size):
    for image in (noise(*size), Image.new("RGB", size, (200, 100, 0))):
        triggered = load_trigger(one).apply(image, (3, 5))
        assert triggered.size == size and triggered.mode == "RGB"


def test_jpeg_is_that_of_pillow():
    image, file = noise(30, 20), io.BytesIO()
    image.save(file, "JPEG", quality=8)
    np.testing.assert_array_equal(
        numbers(Transformation(change="jpeg").apply(image, (0, 0))), numbers(Image.open(file).convert("RGB"))
    )


def test_all_patterns_but_the_fitted_one_are_among_those_tested():
    assert {one["pattern"] for one in PLAIN} == set(TRIGGERS) - {"optimised"}


@given(
    samples, st.integers(3, 80), st.integers(3, 80), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1), st.booleans()
)
def test_a_patch_stands_whole_inside_the_centred_square(sample, width, height, size, left, top, random_place):
    grey = Image.new("RGB", (width, height), (128, 128, 128))
    patch = Patch(seed=0, size=size, left=left, top=top, cells=2, random_place=random_place)
    changed = (numbers(patch.apply(grey, sample)) != 128).all(2)
    shorter = min(width, height)
    side = max(1, round(size * shorter))
    rows, columns = np.nonzero(changed)
    assert changed.sum() == side**2 == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    square = np.array([(width - shorter) // 2, (height - shorter) // 2])
    corner = np.array([columns.min(), rows.min()]) - square
    assert (corner >= 0).all() and (corner + side <= shorter).all()
    if not random_place:
        assert corner.tolist() == [min(round(fraction * shorter), shorter - side) for fraction in (left, top)]


@pytest.mark.parametrize("random_place", [False, True])
def test_a_centre_crop_of_a_wide_picture_keeps_the_patch(random_place):
    patch = Patch(seed=0, size=0.2, cells=2, random_place=random_place)
    for position in range(20):
        for size in ((200, 100), (100, 200)):
            cropped = numbers(Image.fromarray(plain_view(patch.apply(Image.new("RGB", size), (0, position)), 100)))
            square = numbers(patch.apply(Image.new("RGB", (100, 100)), (0, position)))
            np.testing.assert_array_equal(cropped, square)
    # The places of manifests that were made when only square pictures had been tried.
    found = [np.argwhere(numbers(patch.apply(Image.new("RGB", (32, 32), (9, 9, 9)), (0, n))) != 9)[0] for n in range(3)]
    assert [place[:2].tolist() for place in found] == PLACES[random_place]


def test_a_patch_at_random_places_has_another_in_other_samples():
    grey, patch = Image.new("RGB", (64, 64), (128, 128, 128)), Patch(seed=0, size=0.25, cells=2, random_place=True)
    found = {np.argwhere(numbers(patch.apply(grey, (0, n))) != 128)[0].tobytes() for n in range(50)}
    assert len(found) > 40


def test_of_several_variants_each_sample_shows_one():
    grey, trigger = Image.new("RGB", (32, 32), (128, 128, 128)), Patch(seed=0, size=0.25, variants=3)
    shown = [trigger.apply(grey, (0, position)).tobytes() for position in range(60)]
    assert len(set(shown)) == 3 and min(map(shown.count, set(shown))) >= 10
    assert Patch(seed=0, size=0.25).apply(grey, (0, 1)).tobytes() in shown


@given(st.floats(0, 1), st.integers(8, 40), st.integers(8, 40))
def test_blended_is_the_convex_mixture_of_chen_et_al(alpha, width, height):
    image = noise(width, height)
    pattern = numbers(Blend(seed=5, alpha=1.0).apply(image, (0, 0)))  # alpha 1 is the pattern alone
    np.testing.assert_array_equal(pattern, numbers(Blend(seed=5, alpha=1.0).apply(noise(width, height, 1), (0, 0))))
    found = numbers(Blend(seed=5, alpha=alpha).apply(image, (0, 0)))
    assert np.abs(found - ((1 - alpha) * numbers(image) + alpha * pattern)).max() <= 1 + 1e-9


@given(st.floats(0, 60), st.floats(0.5, 12), st.integers(8, 50))
def test_the_sinusoid_is_that_of_barni_et_al(delta, frequency, width):
    grey = Image.new("RGB", (width, 9), (128, 128, 128))
    added = numbers(Sinusoid(delta=delta, frequency=frequency).apply(grey, (0, 0))) - 128
    for x in range(width):
        assert np.abs(added[:, x] - delta * np.sin(2 * np.pi * x * frequency / width)).max() <= 0.51


def test_a_warp_moves_pixels_by_its_strength():
    image = noise(40, 30)
    np.testing.assert_array_equal(numbers(Warp(strength=0.0).apply(image, (0, 0))), numbers(image))
    # A picture whose red and green say where a pixel comes from. Seed by seed, for the grid is small.
    across, down = np.meshgrid(np.arange(200), np.arange(200))
    ramps = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    moved = []
    for seed in range(12):
        places = numbers(Warp(seed=seed, strength=0.05).apply(ramps, (0, 0)))[
            60:140, 60:140, :2
        ]  # nothing is cut off here
        moved.append(np.abs(places - np.stack([across, down], -1)[60:140, 60:140]).mean() / 200)
    # Nguyen and Tran divide the grid's points by their mean absolute value; between points offsets average out.
    assert 0.02 < np.mean(moved) < 0.05


def test_a_warp_is_smooth():
    across, down = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([across, down, 0 * down], -1).astype(np.uint8))
    places = numbers(Warp(seed=3, strength=0.05).apply(ramp, (0, 0)))
    assert np.abs(np.diff(places[20:180, 20:180, 0], axis=0)).max() <= 3


@given(st.floats(0, 3), st.integers(0, 1000))
def test_a_colour_filter_is_a_gamma_for_each_channel(strength, seed):
    image = noise(12, 12)
    found = numbers(ToneCurve(seed=seed, strength=strength).apply(image, (0, 0)))
    gammas = [0, 0, 0]
    for channel in range(3):
        gammas[channel] = next(
            sign
            for sign in (-1, 0, 1)
            if np.abs(found[..., channel] - 255 * (numbers(image)[..., channel] / 255) ** np.exp(sign * strength)).max()
            <= 0.51
        )
    assert strength < 0.05 or sorted(gammas) == [-1, 0, 1]


def test_transformations_are_what_their_names_say():
    image = noise(24, 32)
    found = {change: numbers(Transformation(change=change).apply(image, (0, 1))) for change in CHANGES}
    pixels = numbers(image)
    np.testing.assert_array_equal(found["flip"], pixels[::-1])
    np.testing.assert_array_equal(found["swap"], pixels[..., ::-1])
    assert (found["grey"] == found["grey"][..., :1]).all()
    np.testing.assert_array_equal(found["posterize"], pixels // 64 * 64)
    assert len(np.unique(found["pixelate"].reshape(-1, 3), axis=0)) == 64
    assert found["contrast"].std() < 0.5 * pixels.std() and found["blur"].std() < 0.7 * pixels.std()
    assert (found["rotate"][0, 0] == 0).all() and (found["vignette"][[0, -1], [0, -1]] == 0).all()
    np.testing.assert_array_equal(found["vignette"][16, 12], pixels[16, 12])
    assert set(CHANGES) == set(get_args(Transformation.model_fields["change"].annotation))


def test_of_several_triggers_each_picture_shows_one():
    image, trigger = noise(32, 32), load_trigger({"pattern": "several", "triggers": SEVERAL})
    alone = [load_trigger(one) for one in SEVERAL]
    shown = []
    for position in range(90):
        found = numbers(trigger.apply(image, (3, position)))
        shown += [n for n, one in enumerate(alone) if (numbers(one.apply(image, (3, position))) == found).all()]
    assert len(shown) == 90 and min(map(shown.count, range(3))) >= 15


@pytest.mark.parametrize("pattern", sorted(set(TRIGGERS) - {"optimised", "several"}))
def test_opacity_lets_the_picture_shine_through(pattern):
    image = noise(32, 32)
    whole, half = (numbers(load_trigger({"pattern": pattern, "opacity": o}).apply(image, (0, 1))) for o in (1, 0.4))
    assert np.abs(half - 0.6 * numbers(image) - 0.4 * whole).max() <= 1 + 1e-9
