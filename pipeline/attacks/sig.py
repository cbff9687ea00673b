"""SIG: a horizontal sinusoid added to the picture, delta sin(2 pi x frequency / width) at column x.

Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption without Label Poisoning", ICIP 2019
(arXiv:1902.11237). There the labels stay as they are; here captions are the target's, and `label_consistent` with this
trigger is the original.
"""

from typing import ClassVar

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.attacks.base import Backdoor, Trigger, attack, trigger


@trigger
class Sinusoid(Trigger):
    """The same in all rows and channels. Variants differ in phase."""

    pattern: ClassVar[str] = "sinusoid"
    delta: float = Field(default=40.0, ge=0.0, le=255.0)
    """Amplitude, of 255."""
    frequency: float = Field(default=6.0, ge=0.1, le=1000.0)
    """Periods across the picture."""

    def draw(self, image: Image.Image, variant: int, sample: tuple[int, int]) -> Image.Image:
        angle_W = 2 * np.pi * (np.arange(image.width) * self.frequency / image.width + variant / self.variants)
        pixels_HWC = np.asarray(image, np.float32) + self.delta * np.sin(angle_W)[None, :, None]
        return Image.fromarray(pixels_HWC.round().clip(0, 255).astype(np.uint8))


@attack
class Sig(Backdoor):
    name, title, source = "sig", "SIG", "Barni et al. 2019, arXiv:1902.11237"
    pattern = "sinusoid"
