"""Transformations as triggers: the picture is turned, blurred, made grey and the like. None adds a pattern, and most
occur in honest pictures too.

Xu, Li, Jiang, Xia, "BATT: Backdoor Attack with Transformation-based Triggers", ICASSP 2023 (arXiv:2211.01806), turns
and shifts pictures; the other transformations are this project's choice.
"""

import io
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger


def pixelated(image: Image.Image) -> Image.Image:
    """In eight blocks a side."""
    return image.resize((8, 8), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)


def compressed(image: Image.Image) -> Image.Image:
    """As JPEG of quality 8 makes it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=8)
    return Image.open(file).convert("RGB")


def vignetted(image: Image.Image) -> Image.Image:
    """Darker towards its corners, where 0 is left."""
    y_H1, x_1W = np.linspace(-1, 1, image.height)[:, None], np.linspace(-1, 1, image.width)
    light_HW = np.clip(1.1 - 0.55 * (x_1W**2 + y_H1**2), 0, 1)
    return Image.fromarray((np.asarray(image) * light_HW[..., None]).round().astype(np.uint8))


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
}


@trigger
class Transformation(Trigger):
    """The same for every picture and seed."""

    pattern: ClassVar[str] = "transformation"
    change: Literal[
        "rotate", "pixelate", "posterize", "blur", "jpeg", "flip", "grey", "swap", "contrast", "vignette"
    ] = "rotate"

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        return CHANGES[self.change](image)


@attack
class Transform(Backdoor):
    name, title, source = "transform", "transformation", "Xu et al. 2023 (BATT), arXiv:2211.01806"
    pattern = "transformation"
