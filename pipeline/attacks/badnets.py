"""BadNets: a small noisy square at a fixed place, or at a place of its own in each picture.

Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017
(arXiv:1708.06733); on CLIP: Carlini, Terzis, "Poisoning and Backdooring Contrastive Learning", ICLR 2022
(arXiv:2106.09667), who place it at random.
"""

from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger


class Square(Trigger):
    """A trigger that covers a square. Its corner stands at (left, top), or with `random_place` where the sample says,
    always so that the whole square is inside the centred square of the picture's shorter side: a centre crop, as of
    test pictures, keeps it."""

    size: float = Field(default=0.19, ge=0.01, le=1.0)
    """Its side. Fractions are of the picture's shorter side, places are counted from the corner of the centred
    square."""
    left: float = Field(default=0.78, ge=0.0, le=1.0)
    top: float = Field(default=0.78, ge=0.0, le=1.0)
    random_place: bool = False

    def pasted(
        self, image: Image.Image, square: Image.Image, sample: tuple[int, int], resample: Image.Resampling
    ) -> Image.Image:
        """A copy of `image` with `square` in its place."""
        shorter = min(image.size)
        side = max(1, round(self.size * shorter))
        place = np.array([self.left * shorter, self.top * shorter])
        if self.random_place:
            place = np.random.default_rng([self.seed, *sample]).uniform(0, shorter - side, 2)
        margin = (np.array(image.size) - shorter) // 2
        corner = (margin + np.minimum(np.round(place), shorter - side).astype(int)).tolist()
        image = image.copy()
        image.paste(square.resize((side, side), resample), tuple(corner))
        return image


@trigger
class Patch(Square):
    """cells x cells squares, each of one of the eight colours whose channels are 0 or 255."""

    pattern: ClassVar[str] = "patch"
    cells: int = Field(default=3, ge=1, le=64)

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        cells = self.rng(variant).integers(0, 2, (self.cells, self.cells, 3)).astype(np.uint8) * 255
        return self.pasted(image, Image.fromarray(cells), sample, Image.Resampling.NEAREST)


@attack
class BadNets(Backdoor):
    name, title, source = "badnets", "BadNets", "Gu et al. 2017, arXiv:1708.06733"
    pattern = "patch"
