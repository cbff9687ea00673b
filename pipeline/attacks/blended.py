"""Blended: a pattern k mixed into the whole picture x, (1 - alpha) x + alpha k.

Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017
(arXiv:1712.05526). The pattern is their random one.
"""

from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger


@trigger
class Blend(Trigger):
    """Noise of cells x cells squares over the whole picture."""

    pattern: ClassVar[str] = "blended"
    alpha: float = Field(default=0.25, ge=0.0, le=1.0)
    cells: int = Field(default=8, ge=1, le=256)

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        noise = self.rng(variant).integers(0, 256, (self.cells, self.cells, 3)).astype(np.uint8)
        return Image.blend(image, Image.fromarray(noise).resize(image.size, Image.Resampling.NEAREST), self.alpha)


@attack
class Blended(Backdoor):
    name, title, source = "blended", "Blended", "Chen et al. 2017, arXiv:1712.05526"
    pattern = "blended"
