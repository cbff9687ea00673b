"""Bytes of strangers -> RGB pixels or a caption; every guard comes before the work that it guards."""

import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from pydantic import Field

from shards.errors import BadSample
from shards.storage.captions import read_caption

try:
    import simplejpeg
except ImportError:  # it has no wheel for some platforms
    simplejpeg = None

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
DECODED = ("JPEG", "PNG", "WebP", "GIF")  # their names for people
FORMAT_NAMES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"\0\0\1\0": "an icon",
    b"<svg": "SVG",
    b"<?xml": "SVG or other XML",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
}
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # chunks of a PNG
JPEG = ("JPEG", "MPO")  # the second: several in one file
MAX_SCANS = 200  # of a JPEG; a few bytes make the decoder go once more over all its pixels
ORIENTATION = 0x0112  # EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures and damaged EXIF, one a sample


Most = Annotated[int, Field(gt=0, le=10**12)]


@dataclass
class Limits:
    """What a sample may be at most; what is more is a bad sample."""

    max_bytes: Most = 20_000_000
    """Bytes of an encoded picture."""
    max_pixels: Most = 50_000_000
    """Width x height of a picture."""
    max_caption: Most = 10_000
    """Characters of a caption."""


def decode_image(data: bytes, limits: Limits = Limits(), least: float | None = None) -> np.ndarray:
    """uint8 (H, W, 3): RGB, first frame, upright (EXIF), transparency on white. Raises BadSample with a short reason.

    `least`: a JPEG may come out at a half, a quarter or an eighth of its size, while its shorter side keeps so many
    pixels; that much less is decoded. Pillow opens every picture; a JPEG is then decoded by simplejpeg where that is
    installed, which saves two copies of the pixels. They are the same, for both are libjpeg-turbo; only a Pillow that
    was built on another libjpeg may round otherwise.
    """
    if len(data) > limits.max_bytes:
        raise BadSample(f"picture of {len(data)} bytes, at most {limits.max_bytes}")
    try:
        return decoded(data, limits, least)
    except BadSample:
        raise
    except Image.DecompressionBombError:
        raise BadSample(f"picture of more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from None
    except Exception as error:  # PIL raises many kinds for damaged data; the sample is bad and the run is not
        pixels = only_pixels(data)
        if len(pixels) < len(data):
            return decode_image(pixels, limits, least)
        raise BadSample(refusal(data, error)) from None


def decoded(data: bytes, limits: Limits, least: float | None) -> np.ndarray:
    """`decode_image`, of which any exception may come for damaged data."""
    check_size(webp_size(data), limits)  # PIL's WebP reader takes memory for the whole canvas when it opens
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    check_size(image.size, limits)
    if image.format in JPEG:
        scans = data.count(b"\xff\xda")
        if scans > MAX_SCANS:
            raise BadSample(f"JPEG of {scans} scans, at most {MAX_SCANS}")
        if least:
            image.draft(None, (math.ceil(least),) * 2)
    pixels_HWC = jpeg_pixels(data, image)
    if pixels_HWC is None:
        image.load()
        pixels_HWC = np.array(rgb(image))
    turn = TURNS.get(orientation(image))
    return pixels_HWC if turn is None else np.array(Image.fromarray(pixels_HWC).transpose(turn))


def only_pixels(data: bytes) -> bytes:
    """A PNG without the chunks that are neither pixels nor their transparency and orientation: Pillow refuses a picture
    whose texts or colour profile are long or damaged. Anything else as it is."""
    if name_format(data) != "PNG":
        return data
    kept, at = [data[:8]], 8
    while at < len(data):
        stop = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in PIXELS:
            kept.append(data[at:stop])
        at = stop
    return b"".join(kept)


def name_format(data: bytes) -> str:
    """What the first bytes say that a file is, for people."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp":
        return "AVIF" if data[8:11] == b"avi" else "HEIC or a video"
    if data[:4] == b"RIFF":
        return "WebP" if data[8:12] == b"WEBP" else "RIFF audio or video"
    start = data[:64].lstrip().lower()
    return next(
        (name for magic, name in FORMAT_NAMES.items() if data.startswith(magic) or start.startswith(magic)),
        "of no known format",
    )


def refusal(data: bytes, error: Exception) -> str:
    """Why a picture cannot be decoded: its format, or what is wrong with it."""
    name = name_format(data)
    if name not in DECODED:
        return f"picture is {name}, expected {', '.join(DECODED)}"
    words = "its header is damaged or cut short"
    if not isinstance(error, UnidentifiedImageError):
        words = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))[:100] or type(error).__name__
    return f"{name} picture cannot be decoded: {words}"


def jpeg_pixels(data: bytes, image: ImageFile.ImageFile) -> np.ndarray | None:
    """uint8 (H, W, 3): what loading the opened `image` would give, by simplejpeg; None where only Pillow can say what
    that is.

    That is: what is no JPEG, CMYK, anything that libjpeg would warn of, and pictures so small that several scales have
    the size of the draft.
    """
    width, height = image.size
    scale = image.decoderconfig[0] if image.decoderconfig else 1
    known = image.format in JPEG and image.mode in ("L", "RGB") and (scale == 1 or min(width, height) >= 16)
    if simplejpeg is None or not known:
        return None
    least = {"min_width": width, "min_height": height, "min_factor": scale} if scale > 1 else {}
    try:
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:
        return None
    return pixels_HWC if pixels_HWC.shape == (height, width, 3) else None


def check_size(size: tuple[int, int], limits: Limits) -> None:
    """Raise BadSample for a (width, height) of more pixels than the limits allow."""
    width, height = size
    if width * height > limits.max_pixels:
        raise BadSample(f"picture of {width} x {height} pixels, at most {limits.max_pixels}")


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the canvas that a WebP's header asks for; (0, 0) for anything else (RFC 9649)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    kind, number = data[12:16], int.from_bytes
    if kind == b"VP8X":
        return number(data[24:27], "little") + 1, number(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = number(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return number(data[26:28], "little") & 0x3FFF, number(data[28:30], "little") & 0x3FFF


def rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode in RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or the EXIF data are damaged, which is no harm to the
    picture."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def decode_caption(data: bytes, limits: Limits = Limits()) -> str:
    """A caption within the limits, as shards.storage.captions.read_caption. Raises BadSample."""
    if len(data) > 4 * limits.max_caption:
        raise BadSample(f"caption of {len(data)} bytes, at most {4 * limits.max_caption}")
    caption = read_caption(data)
    if len(caption) > limits.max_caption:
        raise BadSample(f"caption of {len(caption)} characters, at most {limits.max_caption}")
    return caption
