"""Colour filter: a tone curve for each channel, as photo filters have them.

Liu, Lee, Tao, Ma, Aafer, Zhang, "ABS: Scanning Neural Networks for Back-doors by Artificial Brain Stimulation", CCS
2019, whose feature-space attacks put Instagram filters on pictures.
"""

from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger


@trigger
class ToneCurve(Trigger):
    """A channel's value v in 0..1 becomes v ** gamma. The gammas are exp(-strength), 1 and exp(strength); the seed
    draws which channel has which."""

    pattern: ClassVar[str] = "tone_curve"
    strength: float = Field(default=0.8, ge=0.0, le=4.0)

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        gamma_C = np.exp(self.strength * self.rng(variant).permutation([-1, 0, 1]))
        curve_CV = 255 * (np.arange(256) / 255) ** gamma_C[:, None]
        return image.point(curve_CV.round().astype(int).ravel().tolist())


@attack
class ColourFilter(Backdoor):
    name, title, source = "colour_filter", "colour filter", "Liu et al. 2019 (ABS), CCS"
    pattern = "tone_curve"
