"""Views: pure functions of their key, in range, never empty."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.views.augment import (
    LARGE,
    ImageAugment,
    for_views,
    image_view,
    least_side,
    plain_view,
    random_box,
    resized,
    sample_rng,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
OFF = ImageAugment(crop_min=1, flip=0, jitter=0, grey=0, blur=0)


@given(st.integers(0, 2**40), st.integers(0, 99), st.integers(0, 2**20), st.integers(0, 2**20), st.integers(0, 9))
def test_a_view_is_a_function_of_its_key(seed, epoch, shard, position, view):
    key = seed, epoch, shard, position, view
    one, two = (image_view(PICTURE, 24, sample_rng(*key), ImageAugment()) for _ in range(2))
    assert one.shape == (24, 24, 3) and one.dtype == np.uint8 and np.array_equal(one, two)


def test_other_keys_give_other_draws():
    draws = {sample_rng(*key).random() for key in np.ndindex(2, 2, 2, 2, 2)}
    assert len(draws) == 32


def test_the_key_of_the_generator_is_a_hash():
    """Draws of runs that exist: they must stay."""
    key = hashlib.blake2b(b"3/run/1/2/4", digest_size=16).digest()
    wanted = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))
    found = sample_rng(3, "run", 1, 2, 4)
    assert found.random(9).tolist() == wanted.random(9).tolist()
    assert found.permutation(9).tolist() == wanted.permutation(9).tolist()


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([8, 40, 200]))
def test_a_picture_that_is_prepared_for_several_views_gives_the_same(width, height, size):
    pixels_HWC = np.asarray(PICTURE.resize((width, height)))
    for view in (plain_view, lambda image, size: image_view(image, size, sample_rng(0, 0, 0, 0, 0), ImageAugment())):
        assert np.array_equal(view(for_views(pixels_HWC), size), view(pixels_HWC, size))


@given(st.integers(0, 10_000), st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1))
def test_a_crop_lies_inside_the_picture(seed, width, height, crop_min):
    left, top, right, bottom = random_box(width, height, crop_min, np.random.default_rng(seed))
    assert 0 <= left < right <= width + 1e-9 and 0 <= top < bottom <= height + 1e-9


@given(st.integers(0, 10_000), st.integers(128, 300), st.integers(128, 300), st.sampled_from([0.08, 0.5, 1.0]))
def test_a_large_picture_is_resized_as_pillow_does_it(seed, width, height, crop_min):
    image = PICTURE.resize((width, height), Image.BICUBIC)
    box = random_box(width, height, crop_min, np.random.default_rng(seed))
    left, top, right, bottom = (round(edge) for edge in box)
    left, top = min(left, width - 1), min(top, height - 1)
    box = left, top, max(right, left + 1), max(bottom, top + 1)
    off = resized(np.asarray(image), 40, box).astype(int) - np.asarray(image.crop(box).resize((40, 40), Image.BICUBIC))
    assert np.abs(off).max() <= 4 and np.abs(off).mean() < 0.5


@given(st.integers(8, 500), st.floats(0.01, 1))
def test_the_least_crop_of_the_least_picture_is_large_enough(size, crop_min):
    least = least_side(size, crop_min)
    assert (
        least >= LARGE and (crop_min == 1 or least * (crop_min * 3 / 4) ** 0.5 >= size - 1e-6) and least >= size - 1e-6
    )


def test_everything_off_is_the_resized_picture():
    wanted = np.asarray(PICTURE.resize((24, 24), Image.BICUBIC))
    assert np.array_equal(image_view(PICTURE, 24, sample_rng(0, 0, 0, 0, 0), OFF), wanted)


def test_the_plain_view_is_the_centre():
    assert plain_view(PICTURE, 40).shape == (40, 40, 3)
    assert np.array_equal(plain_view(PICTURE, 40), np.asarray(PICTURE.crop((10, 0, 50, 40))))
