"""Bytes of strangers -> an RGB picture or a caption; every guard comes before the work that it guards."""

import io
import warnings

from PIL import Image, ImageOps

from shards.errors import BadSample

MAX_BYTES = 20_000_000  # of an encoded picture
MAX_PIXELS = 50_000_000
MAX_CHARACTERS = 10_000  # of a caption
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")


def decode_image(data, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS):
    """PIL RGB picture: first frame, upright (EXIF), transparency on white. Raises BadSample with a short reason."""
    if len(data) > max_bytes:
        raise BadSample(f"picture of {len(data)} bytes, at most {max_bytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own warning about large pictures: we refuse them ourselves
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadSample(f"picture of {image.width} x {image.height} pixels, at most {max_pixels}")
        image.load()
        if image.getexif().get(0x0112, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "RGB":
            return image
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except BadSample:
        raise
    except (
        Exception
    ) as error:  # PIL raises many kinds for damaged data; whichever it is, the sample is bad and the run is not
        raise BadSample(f"picture cannot be decoded ({type(error).__name__})") from None


def decode_caption(data, max_characters=MAX_CHARACTERS):
    """str: UTF-8, not blank, stripped. Raises BadSample."""
    if len(data) > 4 * max_characters:
        raise BadSample(f"caption of {len(data)} bytes, at most {4 * max_characters}")
    try:
        caption = data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadSample(f"caption is not UTF-8 (byte {error.start})") from None
    if not caption:
        raise BadSample("caption is blank")
    if len(caption) > max_characters:
        raise BadSample(f"caption of {len(caption)} characters, at most {max_characters}")
    return caption
