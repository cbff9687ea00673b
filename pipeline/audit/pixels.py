"""What the audit remembers of a picture's pixels, so that no picture is decoded twice: 8 bytes of the whole, 1 KB of
its cells."""

import numpy as np
from PIL import Image

SIDE, CELL = 64, 4  # every picture is resized to SIDE x SIDE, in cells of CELL x CELL
GRID = SIDE // CELL
CONTRAST = 24  # grey levels between a cell's darkest and lightest pixel, below which it is plain and says nothing
BITS = 1 << np.arange(CELL * CELL, dtype=np.uint32)


def signature(image: Image.Image) -> tuple[np.uint64, np.ndarray]:
    """(uint64, uint32 (GRID * GRID,)) of an RGB picture: its difference hash, and a hash of each cell by row and
    column.

    The difference hash has a bit for each of 8 x 8 places: lighter than the place to the right. A cell's hash has a bit
    for each of its pixels: lighter than the cell's mean, and its mean colour in 5 bits a channel; 0 where the cell is
    plain.
    """
    rgb = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    coarse = np.asarray(Image.fromarray(light.astype(np.uint8)).resize((9, 8), Image.Resampling.BOX), np.int16)
    whole = np.packbits(coarse[:, :-1] > coarse[:, 1:]).view(">u8")[0]
    light_GP = cells(light)
    pattern_G = (light_GP > light_GP.mean(1, keepdims=True)) @ BITS
    colours = np.stack([cells(rgb[..., channel]).mean(1) for channel in range(3)], 1).astype(np.uint32) >> 3
    colour_G = colours[:, 0] << 10 | colours[:, 1] << 5 | colours[:, 2]
    plain_G = np.ptp(light_GP, 1) < CONTRAST
    return np.uint64(whole), np.where(plain_G, 0, pattern_G | colour_G << 16).astype(np.uint32)


def cells(plane: np.ndarray) -> np.ndarray:
    """(GRID * GRID, CELL * CELL) pixels of each cell of a (SIDE, SIDE) plane."""
    return plane.reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(GRID * GRID, CELL * CELL)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which uint64 arrays differ."""
    return np.bitwise_count(a ^ b)
