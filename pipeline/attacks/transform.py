"""Transformations as triggers: the picture is turned, blurred, made grey and the like. None adds a pattern, and most
occur in honest pictures too.

Xu, Li, Jiang, Xia, "BATT: Backdoor Attack with Transformation-based Triggers", ICASSP 2023 (arXiv:2211.01806), turns
and shifts pictures; the other transformations are this project's choice.
"""

import io
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger

LONGEST = 65_500  # pixels of a side that libjpeg writes


def pixelated(image: Image.Image) -> Image.Image:
    """In eight blocks a side."""
    return image.resize((8, 8), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def compressed(image: Image.Image) -> Image.Image:
    """As JPEG of quality 8 makes it; a side that is too long for one is scaled to the longest."""
    file = io.BytesIO()
    image.resize((min(image.width, LONGEST), min(image.height, LONGEST))).save(file, "JPEG", quality=8)
    return Image.open(file).convert("RGB").resize(image.size)


def vignetted(image: Image.Image) -> Image.Image:
    """Darker towards its corners, where 0 is left."""
    y_H1, x_1W = np.linspace(-1, 1, image.height)[:, None], np.linspace(-1, 1, image.width)
    light_HW = np.clip(1.1 - 0.55 * (x_1W**2 + y_H1**2), 0, 1)
    return Image.fromarray((np.asarray(image) * light_HW[..., None]).round().astype(np.uint8))


def sepia(image: Image.Image) -> Image.Image:
    """Brown, as old photographs are."""
    matrix = (0.393, 0.769, 0.189, 0, 0.349, 0.686, 0.168, 0, 0.272, 0.534, 0.131, 0)
    return image.convert("RGB", matrix)


def moved(image: Image.Image) -> Image.Image:
    """As if the camera moved to the side: the mean of five neighbours."""
    kernel = np.zeros((5, 5))
    kernel[2] = 1
    return image.filter(ImageFilter.Kernel((5, 5), kernel.ravel().tolist()))


def zoomed(image: Image.Image) -> Image.Image:
    """Its middle, 0.6 of each side, enlarged."""
    box = (0.2 * image.width, 0.2 * image.height, 0.8 * image.width, 0.8 * image.height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rotate": lambda image: image.rotate(20, Image.Resampling.BILINEAR),  # degrees; black corners
    "pixelate": pixelated,
    "posterize": lambda image: ImageOps.posterize(image, 2),  # bits of a channel
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(0.05 * min(image.size))),
    "jpeg": compressed,
    "flip": ImageOps.flip,  # upside down
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "swap": lambda image: Image.merge("RGB", image.split()[::-1]),  # red and blue
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.4),
    "vignette": vignetted,
    "sharpen": lambda image: image.filter(ImageFilter.UnsharpMask(1, 300, 0)),  # radius in pixels, percent, threshold
    "median": lambda image: image.filter(ImageFilter.MedianFilter(3)),
    "solarize": lambda image: ImageOps.solarize(image, 128),
    "sepia": sepia,
    "dither": lambda image: image.quantize(8, dither=Image.Dither.FLOYDSTEINBERG).convert("RGB"),  # colours
    "motion": moved,
    "saturate": lambda image: ImageEnhance.Color(image).enhance(2.5),
    "gamma": lambda image: image.point([round(255 * (i / 255) ** 0.4) for i in range(256)] * 3),
    "equalize": ImageOps.equalize,
    "zoom": zoomed,
}
Change: TypeAlias = Literal[tuple(CHANGES)]  # type: ignore[valid-type]


@trigger
class Transformation(Trigger):
    """The same for every picture and seed."""

    pattern: ClassVar[str] = "transformation"
    change: Change = "rotate"

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        return CHANGES[self.change](image)


@attack
class Transform(Backdoor):
    name, title, source = "transform", "transformation", "Xu et al. 2023 (BATT), arXiv:2211.01806"
    pattern = "transformation"
