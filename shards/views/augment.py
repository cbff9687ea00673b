"""Views of a sample. Their randomness is keyed by (seed, epoch, sample, view), never by worker or call order.

Pictures: the SimCLR augmentations (Chen et al. 2020, appendix A). Captions: shards/views/eda.py.
"""

import hashlib
from dataclasses import dataclass
from math import sqrt
from typing import Annotated

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from PIL import Image, ImageEnhance, ImageFilter
from pydantic import Field

# Pixels of the shorter side from which on a picture is cropped at whole pixels, and a JPEG may come smaller.
LARGE = 128
NARROW, WIDE = float(np.log(3 / 4)), float(np.log(4 / 3))  # of the ratio of a crop's sides
Fraction = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=10)]

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class ImageAugment:
    """Strengths of the picture's augmentation; the defaults are the published ones."""

    crop_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Least fraction of the picture's area that a crop keeps; 1 switches cropping off."""
    flip: Fraction = 0.5
    """Probability of a mirror image."""
    jitter: Fraction = 0.8
    """Probability of a colour jitter, of the four strengths below."""
    brightness: Strength = 0.5
    """Strength of the change of brightness."""
    contrast: Strength = 0.5
    """Strength of the change of contrast."""
    saturation: Strength = 0.5
    """Strength of the change of saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Strength of the change of hue, in turns."""
    grey: Fraction = 0.2
    """Probability of a grey picture."""
    blur: Fraction = 1.0
    """Probability of a Gaussian blur, of a deviation from 0.1 to 2 pixels at 224 pixels."""


class Key(ISeedSequence):
    """Philox(Key(words)) is Philox(key=words) in a third of its time, most of which goes into a seed of the system's
    that it does not use."""

    def __init__(self, words_2: np.ndarray):
        self.words_2 = words_2

    def generate_state(self, n_words: int, dtype: object = None) -> np.ndarray:
        return self.words_2


def sample_rng(seed: int, epoch: int | str, shard: int, position: int, view: int) -> np.random.Generator:
    """A pure function of its key."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{shard}/{position}/{view}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(Key(np.frombuffer(key, np.uint64))))  # type: ignore[arg-type]


@dataclass
class Colour:
    """What was drawn of a view's colours: plain numbers, so that they can be changed here or on the device
    (shards/samples/colour.py)."""

    # [(step, amount)] in their order: 0 brightness, 1 contrast, 2 saturation (factors), 3 hue (255ths of a turn)
    jitter: list[tuple[int, float]]
    grey: bool
    blur: float  # deviation in pixels, 0 = none


def image_view(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator, augment: ImageAugment
) -> np.ndarray:
    """uint8 (size, size, 3): a random view of a picture, RGB or uint8 (H, W, 3)."""
    return coloured(*drawn_view(image, size, rng, augment))


def drawn_view(
    image: Image.Image | np.ndarray, size: int, rng: np.random.Generator, augment: ImageAugment
) -> tuple[np.ndarray, Colour]:
    """(uint8 (size, size, 3), Colour): a random view whose colours are drawn but not changed yet."""
    pixels_HWC = resized(image, size, random_box(*size_of(image), augment.crop_min, rng))
    flip, jitter, grey, blur = rng.random(4).tolist()
    colour = Colour(
        draw_jitter(augment, rng) if jitter < augment.jitter else [],
        grey < augment.grey,
        rng.uniform(0.1, 2.0) * size / 224 if blur < augment.blur else 0.0,
    )
    return mirrored(pixels_HWC) if flip < augment.flip else pixels_HWC, colour


def mirrored(pixels_HWC: np.ndarray) -> np.ndarray:
    """The mirror image: torch copies it in a tenth of numpy's time."""
    return torch.from_numpy(np.require(pixels_HWC, requirements="W")).flip(1).numpy()


def coloured(pixels_HWC: np.ndarray, colour: Colour) -> np.ndarray:
    """uint8 (H, W, 3) with its colours changed as `colour` says."""
    if not (colour.jitter or colour.grey or colour.blur):
        return pixels_HWC
    image = jittered(Image.fromarray(pixels_HWC), colour.jitter)
    if colour.grey:
        image = image.convert("L").convert("RGB")
    if colour.blur:
        image = image.filter(ImageFilter.GaussianBlur(colour.blur))
    return np.asarray(image)


def plain_view(image: Image.Image | np.ndarray, size: int) -> np.ndarray:
    """uint8 (size, size, 3): shorter side to `size`, centre crop; one bicubic resize."""
    width, height = size_of(image)
    if (width, height) == (size, size):
        return np.asarray(image)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return resized(image, size, (left, top, left + side, top + side))


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) in pixels."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def for_views(pixels_HWC: np.ndarray) -> Image.Image | np.ndarray:
    """The same picture as `resized` takes it, for several views: PIL's where PIL resizes it."""
    return Image.fromarray(pixels_HWC) if min(size_of(pixels_HWC)) < LARGE else pixels_HWC


def resized(image: Image.Image | np.ndarray, size: int, box: Box) -> np.ndarray:
    """uint8 (size, size, 3): a box of a picture, resized with bicubic antialiased interpolation.

    box: (left, top, right, bottom) in pixels, which may be fractions. PIL resizes small pictures. Large ones are
    resized by torch in a sixth of the time, with the box rounded to whole pixels.
    """
    width, height = size_of(image)
    if min(width, height) < LARGE:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    left, top, right, bottom = (round(edge) for edge in box)
    left, top = min(left, width - 1), min(top, height - 1)
    cut_HWC = np.asarray(image)[top : max(bottom, top + 1), left : max(right, left + 1)]
    # Dense, and with a batch axis before axes are permuted: torch takes longer where strides do not tell that channels
    # are last.
    cut_1CHW = torch.from_numpy(np.require(cut_HWC, requirements=("C", "W")))[None].permute(0, 3, 1, 2)
    found_1CHW = torch.nn.functional.interpolate(cut_1CHW, (size, size), mode="bicubic", antialias=True)
    return found_1CHW[0].permute(1, 2, 0).numpy()


def least_side(size: int, crop_min: float = 1.0) -> float:
    """Pixels of the shorter side that a picture needs, so that no view of `size` pixels is an enlargement for the lack
    of them."""
    return max(LARGE, size / (crop_min * 3 / 4) ** 0.5 if crop_min < 1 else size)


def random_box(width: int, height: int, crop_min: float, rng: np.random.Generator) -> Box:
    """A random crop: a fraction of the area from crop_min to 1, sides in a ratio from 3/4
    to 4/3."""
    if crop_min >= 1:
        return 0, 0, width, height
    draw = rng.random  # low + (high - low) * draw() is rng.uniform(low, high), in a third of its time
    for _ in range(10):
        area = width * height * (crop_min + (1.0 - crop_min) * draw())
        ratio = float(np.exp(NARROW + (WIDE - NARROW) * draw()))  # math.exp rounds otherwise
        w, h = sqrt(area * ratio), sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = (width - w) * draw(), (height - h) * draw()
            return left, top, left + w, top + h
    side = min(width, height)  # no crop of that area fits: the centre
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def draw_jitter(augment: ImageAugment, rng: np.random.Generator) -> list[tuple[int, float]]:
    """[(step, amount)] of Colour: brightness, contrast, saturation and hue in random order."""
    drawn: list[tuple[int, float]] = []
    for step in rng.permutation(4).tolist():
        strength = (augment.brightness, augment.contrast, augment.saturation, augment.hue)[step]
        if strength and step == 3:
            drawn.append((step, int(rng.uniform(-strength, strength) * 255)))
        elif strength:
            drawn.append((step, rng.uniform(max(0.0, 1 - strength), 1 + strength)))
    return drawn


def jittered(image: Image.Image, drawn: list[tuple[int, float]]) -> Image.Image:
    """An RGB picture after the `drawn` steps of a colour jitter."""
    for step, amount in drawn:
        if step == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = hue.point([(i + amount) % 256 for i in range(256)])
            image = Image.merge("HSV", (turned, saturation, value)).convert("RGB")
        else:
            image = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step](image).enhance(amount)
    return image
