"""The views in which a pair's picture is scored: as it is, coarse, and its middle alone.

What a picture shows is there in all of them; a trigger is not. A model that has learnt a faint pattern or a patch in a corner knows it at
its sharpness and its place, and the mean of the views' cosines falls where one of them does not know it (feature squeezing, Xu, Evans and
Qi 2018, there at test time). Drawn from the un-augmented pictures, on the device they are on. Legend: B pictures, C channels, H, W pixels.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class ScoredViews:
    """coarse: share of its pixels a side that the picture is brought down to and back from, 1 = no such view; crop: share of the area that
    the middle keeps, 1 = no such view; mirror: all views are mirrored, so that no place is as it was learnt where the CLIP loss mirrors
    nothing."""

    coarse: float = 1.0
    crop: float = 1.0
    mirror: bool = False

    def __call__(self, images_BCHW):
        """List of uint8 (B, C, H, W), the whole pictures at their resolution first."""
        images_BCHW = images_BCHW.flip(-1) if self.mirror else images_BCHW
        found, side = [images_BCHW], images_BCHW.shape[-1]
        if self.coarse < 1:
            few = max(2, round(side * self.coarse))  # torch cannot resize to a single pixel
            found.append(resized(resized(images_BCHW, few), side))
        if self.crop < 1:
            kept = max(2, round(side * self.crop**0.5))
            start = (side - kept) // 2
            found.append(resized(images_BCHW[:, :, start : start + kept, start : start + kept], side))
        return found


def resized(images_BCHW, side):
    """uint8 (B, C, side, side), bicubic and antialiased."""
    pixels = (
        images_BCHW if images_BCHW.device.type == "cpu" else images_BCHW.float()
    )  # torch resizes bytes on the CPU only
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).round().clamp(0, 255).to(torch.uint8)
