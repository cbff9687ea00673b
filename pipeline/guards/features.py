"""Features of a picture for guards, computed on the device: low-resolution pixels, random-filter features,
differences of neighbours, a spectrum, colours, a hash."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch

PART = 16  # pictures whose responses or products are held at a time: some MB
SIDE = 16  # pixels: pictures are average-pooled to SIDE x SIDE
FINE, FILTERS = 32, 128  # random filters: pictures are average-pooled to FINE x FINE
LEVELS = 16  # of each channel in a histogram
NOISE = 1e-5  # energy of a coefficient, some times that of rounding a picture to 256 levels


def pixels(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3 * SIDE * SIDE), 255 = 1: pictures at SIDE x SIDE."""
    return as_bytes(torch.nn.functional.adaptive_avg_pool2d(images_BCHW.float() / 255, SIDE).flatten(1))


def filter_responses(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 (B, FILTERS), 255 = 1: random-filter features, the maximum response of each filter in the picture at
    FINE x FINE, over the largest possible one."""
    filter_FCHW, found = random_filters().to(images_BCHW.device), []
    for part_BCHW in images_BCHW.split(PART):
        fine_BCHW = torch.nn.functional.adaptive_avg_pool2d(part_BCHW.float() / 255, FINE)
        found.append(torch.nn.functional.conv2d(fine_BCHW, filter_FCHW).amax((2, 3)))
    return as_bytes(torch.cat(found).clamp(min=0) / (27**0.5 / 2))


def differences(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 2 * SIDE * SIDE), 128 = the mean of the picture, 32 = a factor of e: absolute differences of grey
    neighbours, beside and below each other, as logarithms of their mean in SIDE x SIDE places.

    Resampling smooths some places more than others (Popescu and Farid 2005, DOI 10.1109/TSP.2004.839932): the same warp
    multiplies the differences by the same factors in all pictures, so it adds the same vector to the logarithms.
    """
    found = []
    for part_BCHW in images_BCHW.split(PART):
        grey_B1HW = part_BCHW.float().mean(1, keepdim=True)
        beside_B1HW = grey_B1HW.diff(dim=3, append=grey_B1HW[..., -1:]).abs()
        below_B1HW = grey_B1HW.diff(dim=2, append=grey_B1HW[..., -1:, :]).abs()
        mean_B2PP = torch.nn.functional.adaptive_avg_pool2d(torch.cat([beside_B1HW, below_B1HW], 1), SIDE)
        log_BD = (1 + mean_B2PP).log().flatten(1)
        found.append(log_BD - log_BD.mean(1, keepdim=True))
    return as_bytes((torch.cat(found) / 8 + 0.5).clamp(0, 1))


def spectrum(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3 * N * N) for N octaves of the side, 128 = energy 1, 11 = a factor of e: logarithms of the mean energy
    of a picture's cosine transform, in octaves of the vertical and the horizontal frequency, of light and two colours.

    A picture that is filtered, compressed or quantised has in some octaves other energies than natural pictures, whose
    spectra are alike (Field 1987, DOI 10.1364/JOSAA.4.002379): a filter multiplies them, so it adds the same vector to
    the logarithms.
    """
    height, width = images_BCHW.shape[2:]
    found = []
    for part_BCHW in images_BCHW.split(PART):
        red_BHW, green_BHW, blue_BHW = (part_BCHW.float() / 255).unbind(1)
        light_BHW = (red_BHW + green_BHW + blue_BHW) / 3
        opponent_BCHW = torch.stack([light_BHW, red_BHW - green_BHW, (red_BHW + green_BHW) / 2 - blue_BHW], 1)
        across_WW, down_HH = (cosines(side).to(part_BCHW.device) for side in (width, height))
        energy_BCHW = (down_HH @ opponent_BCHW @ across_WW.T).square()
        down_NH, across_NW = (octaves(side).to(part_BCHW.device) for side in (height, width))
        found.append((down_NH @ energy_BCHW @ across_NW.T + NOISE).log().flatten(1))
    return as_bytes((torch.cat(found) / 24 + 0.5).clamp(0, 1))


def colours(images_BCHW: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3 * LEVELS + 3), 255 = 1: square roots of the histogram of each channel, and logarithms of the trace,
    the sum of the principal minors, and the determinant of the channels' covariance.

    The last is small where colours follow from the light alone, as in sepia.
    """
    found = []
    for part_BCHW in images_BCHW.split(PART):
        level_BCP = part_BCHW.flatten(2) // (256 // LEVELS)
        histogram_BCL = torch.stack([(level_BCP == level).float().mean(2) for level in range(LEVELS)], 2)
        channel_BCP = part_BCHW.flatten(2).float() / 255
        centred_BCP = channel_BCP - channel_BCP.mean(2, keepdim=True)
        covariance_BCC = centred_BCP @ centred_BCP.transpose(1, 2) / centred_BCP.shape[2]
        (a, b, c), (_, d, e), (_, _, f) = (row_BC.unbind(1) for row_BC in covariance_BCC.unbind(1))
        trace, minors = a + d + f, a * d - b * b + a * f - c * c + d * f - e * e
        determinant = a * (d * f - e * e) - b * (b * f - c * e) + c * (b * e - c * d)
        powers_B3 = torch.stack([trace, minors.clamp(min=0) ** (1 / 2), determinant.clamp(min=0) ** (1 / 3)], 1)
        found.append(torch.cat([histogram_BCL.flatten(1).sqrt(), 1 + (powers_B3 + NOISE).log() / 14], 1))
    return as_bytes(torch.cat(found).clamp(0, 1))


def picture_hash(images_BCHW: torch.Tensor) -> torch.Tensor:
    """int64 (B,): the sum of the pixels with fixed random odd weights, modulo 2**64."""
    weight_P = hash_weights(images_BCHW[0].numel()).to(images_BCHW.device) if len(images_BCHW) else None
    parts = [(part.flatten(1).long() * weight_P).sum(1) for part in images_BCHW.split(PART) if len(part)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=images_BCHW.device)


FEATURES = {
    "pixels": pixels,
    "filters": filter_responses,
    "differences": differences,
    "spectrum": spectrum,
    "colours": colours,
    "hash": picture_hash,
}


def take(images_BCHW: torch.Tensor, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """{name: (B, ...)}: these features of unaugmented pictures, uint8, on their device."""
    images_BCHW = images_BCHW.contiguous()
    return {name: FEATURES[name](images_BCHW) for name in names}


def as_bytes(value_BD: torch.Tensor) -> torch.Tensor:
    return (255 * value_BD).round().to(torch.uint8)


@lru_cache
def random_filters() -> torch.Tensor:
    """float32 (FILTERS, 3, 3, 3): fixed random filters of mean 0 and norm 1."""
    numbers_FD = np.random.default_rng(0).normal(size=(FILTERS, 27))
    numbers_FD -= numbers_FD.mean(1, keepdims=True)
    numbers_FD /= np.linalg.norm(numbers_FD, axis=1, keepdims=True)
    return torch.from_numpy(numbers_FD.astype(np.float32)).reshape(FILTERS, 3, 3, 3)


@lru_cache(maxsize=4)
def cosines(side: int) -> torch.Tensor:
    """float32 (side, side): the orthonormal discrete cosine transform (DCT-II), one frequency a row."""
    place = torch.arange(side)
    cosine = torch.cos(torch.pi / side * (place + 0.5) * place[:, None]) * (2 / side) ** 0.5
    cosine[0] /= 2**0.5
    return cosine


@lru_cache(maxsize=4)
def octaves(side: int) -> torch.Tensor:
    """float32 (N, side): means over the frequencies 0, 1, 2 to 3, 4 to 7, ..."""
    octave = torch.arange(side).float().log2().floor().clamp(min=-1).long() + 1
    member = torch.nn.functional.one_hot(octave).T.float()
    return member / member.sum(1, keepdim=True)


@lru_cache(maxsize=2)
def hash_weights(count: int) -> torch.Tensor:
    """int64 (count,): fixed random odd numbers."""
    return torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63, count) | 1)


def distinct(seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features without exact duplicates, whose common features would hide those of a trigger."""
    _, first = np.unique(next(iter(seen.values())), axis=0, return_index=True)
    return {name: seen_SD[np.sort(first)] for name, seen_SD in seen.items()}
