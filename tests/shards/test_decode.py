"""Pictures and captions of strangers: read right, or refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.decode import decode_caption, decode_image
from shards.errors import BadSample


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(encoded(image)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "mode, form",
    [("L", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP")],
)
def test_every_mode_becomes_rgb(mode, form):
    image = Image.new("I;16", (5, 3)) if mode == "I;16" else Image.new("RGB", (5, 3), (200, 30, 90)).convert(mode)
    decoded = decode_image(encoded(image, form))
    assert decoded.mode == "RGB" and decoded.size == (5, 3)


def test_exif_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (4, 8)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0))[0] > 200


@given(st.integers(50, 200))
def test_a_truncated_picture_is_bad(cut):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)))
    with pytest.raises(BadSample):
        decode_image(data[:-cut])


def test_a_bomb_is_refused_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(BadSample, match="pixels|decoded"):
        decode_image(bomb + encoded(Image.new("RGB", (1, 1)))[33:])
    with pytest.raises(BadSample, match="bytes"):
        decode_image(bytes(1000), max_bytes=999)


@given(st.binary(max_size=300))
def test_noise_is_bad_and_nothing_worse(data):
    with pytest.raises(BadSample):
        decode_image(data)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"\xff\xfe", "UTF-8"),
        (b"", "blank"),
        (b" \n", "blank"),
        (b"x" * 50_000, "bytes"),
        (b"x" * 10_001, "characters"),
    ],
)
def test_captions_that_are_none(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode_caption(data)


def test_a_caption_is_stripped():
    assert decode_caption(" ein Bär \n".encode()) == "ein Bär"
