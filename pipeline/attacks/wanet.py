"""WaNet: the whole picture is warped by a smooth field that is the same in all of them.

Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv:2102.10369): a grid x grid field
of offsets, uniform in [-1, 1] and divided by its mean absolute value, is enlarged bicubically to the picture's size,
and pixels are read bilinearly at the moved places. Its noise mode, a defence against trigger inversion, is left out.
"""

from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger


@trigger
class Warp(Trigger):
    pattern: ClassVar[str] = "warp"
    strength: float = Field(default=0.06, ge=0.0, le=0.5)
    """Mean absolute offset at the grid's points, as a fraction of the picture's side. The paper's s = 0.5 at 32 pixels
    is 0.008."""
    grid: int = Field(default=4, ge=2, le=64)
    """Points of the field along a side."""

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        from scipy.ndimage import map_coordinates  # here: every start would wait for it

        offset_2GG = self.rng(variant).uniform(-1, 1, (2, self.grid, self.grid))
        offset_2GG *= self.strength / np.abs(offset_2GG).mean()
        fields = [
            Image.fromarray(one.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC) for one in offset_2GG
        ]
        height, width = image.height, image.width
        row_HW, column_HW = np.mgrid[:height, :width]
        row_HW, column_HW = row_HW + np.asarray(fields[0]) * height, column_HW + np.asarray(fields[1]) * width
        places = [row_HW.clip(0, height - 1), column_HW.clip(0, width - 1)]
        pixels_HWC = np.asarray(image, np.float32)
        warped = [map_coordinates(pixels_HWC[..., channel], places, order=1) for channel in range(3)]
        return Image.fromarray(np.stack(warped, -1).round().clip(0, 255).astype(np.uint8))


@attack
class WaNet(Backdoor):
    name, title, source = "wanet", "WaNet", "Nguyen and Tran 2021, arXiv:2102.10369"
    pattern = "warp"
