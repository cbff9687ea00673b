"""Pictures and captions of strangers: read right, or refused with a reason."""

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from shards.errors import BadSample
from shards.samples import decode
from shards.samples.decode import ORIENTATION, Limits, decode_caption, decode_image, webp_size


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(data, *limits, **least):
    return Image.fromarray(decode_image(data, *limits, **least))


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decoded(encoded(image)).getpixel((0, 0)) == (255, 255, 255)
    assert decoded(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "mode, form",
    [("L", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("RGB", "WEBP")],
)
def test_every_mode_becomes_rgb(mode, form):
    image = Image.new("RGB", (5, 3), (200, 30, 90)).convert(mode)
    found = decoded(encoded(image, form))
    assert found.size == (5, 3)
    assert np.allclose(np.asarray(found), np.asarray(image.convert("RGB")), atol=6)


def test_sixteen_bits_of_grey_keep_their_shades():
    grey = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    assert np.asarray(decoded(encoded(grey)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert np.asarray(decoded(encoded(image, transparency=0)))[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_printers_colours_are_adobes_inverted_ones():
    image = Image.merge("CMYK", [Image.new("L", (16, 16), value) for value in (250, 20, 30, 0)])
    data = encoded(image, "JPEG", quality=95)
    assert b"Adobe" in data and decoded(data).getpixel((8, 8))[0] < 20
    # The same components, said to be YCCK: the decoder has to turn them into CMYK first.
    at = data.index(b"Adobe") + 11
    ycck = decoded(data[:at] + b"\2" + data[at + 1 :])
    y, cr = 255 - 250, 255 - 30  # as they are stored
    red = 255 - np.clip(y + 1.402 * (cr - 128), 0, 255)
    assert ycck.getpixel((8, 8))[0] == pytest.approx(red, abs=6)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_the_picture_upright(turn, form):
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    ramp = Image.fromarray(np.arange(0, 240, 2, np.uint8).reshape(10, 12)).convert("RGB").resize((48, 40))
    data = encoded(ramp, form, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(decoded(data), wanted) and wanted.size == ((48, 40) if turn < 5 else (40, 48))


@pytest.mark.parametrize("damage", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_does_not_spoil_a_picture(damage):
    assert decoded(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=damage)).size == (8, 4)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    red, _, blue = decoded(encoded(frames[0], form, save_all=True, append_images=frames[1:])).getpixel((0, 0))
    assert red > 200 and blue < 50


@pytest.mark.parametrize(
    "form, options", [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {})]
)
@given(fraction=st.floats(0, 0.9))
def test_a_truncated_picture_is_bad(form, options, fraction):
    data = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)), form, **options
    )
    with pytest.raises(BadSample):
        decoded(data[: int(fraction * len(data))])


def test_a_progressive_jpeg_is_read():
    image = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(15, 16)).convert("RGB")
    plain, progressive = (decoded(encoded(image, "JPEG", progressive=p)) for p in (False, True))
    assert np.array_equal(plain, progressive)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 150))
def test_a_large_jpeg_may_come_out_smaller_but_not_too_small(width, height, least):
    image = Image.new("RGB", (width, height), (30, 60, 90))
    found = decoded(encoded(image, "JPEG"), least=least).size
    short = min(width, height)
    factor = next(f for f in (8, 4, 2, 1) if f == 1 or short // least >= f)
    assert found == (-(-width // factor), -(-height // factor)) and min(found) >= min(short, least)
    assert decoded(encoded(image), least=least).size == (width, height)


def outcome(data, least=None):
    """Shape and bytes of the pixels, or the reason why there are none."""
    try:
        pixels_HWC = decode_image(data, Limits(max_pixels=10**6), least)
        return pixels_HWC.shape, pixels_HWC.tobytes()
    except BadSample as error:
        return str(error)


@st.composite
def jpegs(draw):
    """bytes: a JPEG of any size, colours, sampling and order of its data, perhaps turned."""
    width, height = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    coarse = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    mode = draw(st.sampled_from(["RGB", "RGB", "L", "CMYK"]))
    image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = draw(st.integers(0, 9))
    options = {"quality": draw(st.sampled_from([5, 75, 100])), "progressive": draw(st.booleans()), "exif": exif}
    if mode == "RGB":
        options |= draw(
            st.sampled_from([{"keep_rgb": True}, *({"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"))])
        )
        if draw(st.booleans()):
            return encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)], **options)
    return encoded(image, "JPEG", **options)


@given(jpegs(), st.none() | st.integers(1, 150), st.none() | st.floats(0, 1), st.randoms(use_true_random=False))
def test_pillow_alone_says_the_same_of_any_jpeg(data, least, cut, random):
    """So the bits of a training do not depend on whether simplejpeg is installed: pixels, or the reason why a sample is
    bad."""
    pytest.importorskip("simplejpeg")
    damaged = bytearray(data)
    damaged[random.randrange(len(data))] ^= 1 << random.randrange(8)
    for one in (data, bytes(damaged), data if cut is None else data[: int(cut * len(data))], data[:-2]):
        found = outcome(one, least)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode, "simplejpeg", None)
            assert outcome(one, least) == found


def test_a_jpeg_is_decoded_by_simplejpeg_where_it_can_be(monkeypatch):
    pytest.importorskip("simplejpeg")
    used, original = [], decode.simplejpeg.decode_jpeg
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda *a, **kw: (used.append(kw), original(*a, **kw))[1])
    for mode, least, wanted in (
        ("RGB", None, [{}]),
        ("L", 40, [{"min_width": 50, "min_height": 40, "min_factor": 2}]),
        ("CMYK", None, []),
    ):
        used.clear()
        assert outcome(encoded(Image.new(mode, (100, 80)), "JPEG"), least) and used == wanted


def png(*chunks):
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


HEADER = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
REST = [(b"IDAT", zlib.compress(b"\0" * 4)), (b"IEND", b"")]


def test_a_bomb_is_refused_before_it_is_decoded():
    bomb = png((b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)), *REST)
    with pytest.raises(BadSample, match="picture of more than [0-9]+ pixels"):
        decoded(bomb)
    with pytest.raises(BadSample, match="bytes"):
        decoded(bytes(1000), Limits(max_bytes=999))
    with pytest.raises(BadSample, match="at most 11"):
        decoded(encoded(Image.new("RGB", (4, 3))), Limits(max_pixels=11))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_that_unpacks_to_much_takes_no_memory(kind):
    packed = zlib.compress(bytes(50_000_000))
    chunk = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind] + packed
    tracemalloc.start()
    try:
        with contextlib.suppress(BadSample):
            decoded(png(HEADER, (kind, chunk), *REST))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert decoded(png(HEADER, *REST)).size == (1, 1) and peak < 8_000_000


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0", "lossless": True}])
def test_the_canvas_of_a_webp_is_known_from_its_header(options, monkeypatch):
    data = encoded(Image.new("RGB", (33, 21)), "WEBP", **options)
    assert webp_size(data) == (33, 21)
    monkeypatch.setattr(Image, "open", None)  # it must not come so far: opening takes memory for the canvas
    with pytest.raises(BadSample, match="33 x 21 pixels"):
        decoded(data, Limits(max_pixels=600))
    huge = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0\xff\x3f\0"
    with pytest.raises(BadSample, match="16384 x 16384 pixels"):
        decoded(huge)


def test_a_jpeg_of_very_many_scans_is_refused():
    data = encoded(Image.new("RGB", (64, 64), "red"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(BadSample, match="scans"):
        decoded(data[:last] + data[last:-2] * 300 + data[-2:])


@given(st.binary(max_size=300))
def test_noise_is_bad_and_nothing_worse(data):
    with pytest.raises(BadSample):
        decoded(data)


def png_with(**chunks):
    """A PNG with `texts`, a list of (method of PngInfo, text), or with other options of its writer."""
    info = PngImagePlugin.PngInfo()
    for method, text in chunks.pop("texts", []):
        getattr(info, method)("xmp", text, zip=True)
    return encoded(Image.new("RGB", (20, 10), "red"), pnginfo=info, **chunks)


LONG = "a" * 3_000_000


@pytest.mark.parametrize(
    "chunks",
    [
        {"texts": [("add_text", LONG)]},
        {"texts": [("add_itxt", LONG)]},
        {"texts": [("add_text", LONG[: 1 << 20])] * 70},
        {"icc_profile": bytes(2_000_000)},
    ],
)
def test_long_metadata_of_a_png_is_no_harm(chunks):
    data = png_with(**chunks)
    with pytest.raises(ValueError, match="too large|Too much"):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(decoded(data), decoded(png_with()))


def test_a_damaged_text_of_a_png_is_no_harm():
    data = bytearray(png_with(texts=[("add_text", "hello")]))
    data[data.index(b"zTXt") + 8] ^= 1
    assert np.array_equal(decoded(bytes(data)), decoded(png_with()))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "picture is empty, expected JPEG, PNG, WebP, GIF"),
        (b"\n<!DOCTYPE HTML><p>404", "a web page"),
        (b'<svg xmlns="">', "SVG"),
        (b"II*\0" + bytes(60), "TIFF"),
        (b"\0\0\0\x20ftypavif" + bytes(20), "AVIF"),
        (b"RIFF\0\0\0\0WAVE", "RIFF audio"),
        (b"words", "of no known format"),
        (b"\xff\xd8\xff\xe0aaaa", "^JPEG picture cannot be decoded: [A-Z]?[a-z]+ "),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "^PNG picture cannot be decoded: its header"),
    ],
)
def test_a_refusal_says_what_was_found(data, reason):
    with pytest.raises(BadSample, match=reason) as error:
        decode_image(data)
    assert "Error" not in str(error.value) and "\n" not in str(error.value)


INVISIBLE = [
    "\ufeff",
    "\0",
    "\u200b\u2060",
    "\u200d\u200e\ufe0f",
    "\x07\x1b",
    "\xad",
    "&nbsp; &#8203;",
    "&amp;nbsp;",
    "\x1b[31m",
]
INVISIBLE += ["\u115f\u1160\u3164\uffa0", "\u2800"]  # fillers
INVISIBLE += ["\u202e\u3000", "<start_of_text><END_OF_TEXT>", "\uff06nbsp;", "\uff1cstart_of_text>", "\ufdd0\U0001ffff"]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"\xff\xfe", "UTF-8"),
        (b"", "blank"),
        (b" \n", "blank"),
        (b"x" * 50_000, "bytes"),
        (b"x" * 10_001, "characters"),
        *((text.encode(), "blank|holds no word") for text in INVISIBLE),
    ],
)
def test_captions_that_are_none(data, reason):
    with pytest.raises(BadSample, match=reason):
        decode_caption(data)


def test_a_caption_is_stripped():
    assert decode_caption(" ein Bär \n".encode()) == "ein Bär"
    assert decode_caption("\ufeff a dog\ufeff".encode()) == "a dog"


@pytest.mark.parametrize("caption", ["\U0001fae8", "\U000e0fff", "\ue000", "\uff06amp;"])  # of some Python no letters
def test_a_caption_is_visible_to_every_version_of_python(caption):
    assert decode_caption(caption.encode()) == caption
