"""The colour augmentations of a whole batch on its device, from the numbers that were drawn for each view where it was
read.

The same views as shards.views.augment.coloured makes one by one with Pillow, up to rounding: only the arithmetic is
another, so nothing random happens here. Legend: N views, C channels, H height, W width, P numbers of a view's Colour.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

NUMBERS = 10  # P: 4 steps of jitter, 4 amounts, grey, blur
NO_STEP = -1
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow
REACH = 7  # pixels of a blur to each side; its deviation is 2 pixels at most at 224 pixels


class DrawnColour(Protocol):
    """shards.views.augment.Colour, which stands below this."""

    @property
    def jitter(self) -> Sequence[tuple[int, float]]: ...

    @property
    def grey(self) -> bool: ...

    @property
    def blur(self) -> float: ...


def as_numbers(colour: DrawnColour) -> np.ndarray:
    """float32 (P,)."""
    steps = [step for step, _ in colour.jitter] + [NO_STEP] * (4 - len(colour.jitter))
    amounts = [amount for _, amount in colour.jitter] + [0.0] * (4 - len(colour.jitter))
    return np.array([*steps, *amounts, colour.grey, colour.blur], np.float32)


def coloured_batch(images_NCHW: torch.Tensor, numbers_NP: torch.Tensor) -> torch.Tensor:
    """uint8 (N, C, H, W): the views with their colours changed, on the device of both."""
    x = images_NCHW.to(torch.float32, memory_format=torch.contiguous_format)
    p = numbers_NP.float().t()[:, :, None, None, None]
    for at in range(4):
        step, amount = p[at], p[4 + at]
        changed = torch.where(step == 3, turned(x, amount), blended(x, step, amount))
        x = torch.where(step == NO_STEP, x, changed.round().clamp(0, 255))
    grey, deviation = p[8:]
    x = torch.where(grey > 0, luma(x).round(), x)
    x = torch.where(deviation > 0, blurred(x, numbers_NP[:, 9].float()).round(), x)
    return x.to(torch.uint8)


def luma(x: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W): how light each pixel is."""
    red, green, blue = x.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def blended(x: torch.Tensor, step: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast or saturation (steps 0, 1, 2): away from black, the mean grey, the pixel's own grey."""
    grey = luma(x).round()
    mean = (grey.mean((2, 3), keepdim=True) + 0.5).floor()
    anchor = torch.where(step == 0, 0.0, torch.where(step == 1, mean, grey))
    return anchor + amount * (x - anchor)


def turned(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """Hue turned by `amount` 255ths of a circle, value and saturation kept (the hexcone of HSV; Smith 1978)."""
    top, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    safe = chroma.clamp(min=1)
    hue = torch.where(
        top == red, (green - blue) / safe, torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    offset = torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1)
    k = (offset + hue + amount * 6 / 255) % 6
    return top - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blurred(x: torch.Tensor, deviation_N: torch.Tensor) -> torch.Tensor:
    """Each view under a Gaussian of its own deviation in pixels, the border repeated."""
    n, c, h, w = x.shape
    at = torch.arange(-REACH, REACH + 1, device=x.device)
    kernel_NK = torch.exp(-0.5 * (at / deviation_N.clamp(min=1e-3)[:, None]) ** 2)
    kernel_NK = (kernel_NK / kernel_NK.sum(1, keepdim=True)).repeat_interleave(c, 0)
    x = F.pad(x, (REACH, REACH, REACH, REACH), "replicate").reshape(1, n * c, h + 2 * REACH, w + 2 * REACH)
    x = F.conv2d(x, kernel_NK[:, None, :, None], groups=n * c)
    return F.conv2d(x, kernel_NK[:, None, None, :], groups=n * c).reshape(n, c, h, w)
