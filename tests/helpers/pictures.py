"""Pictures drawn by a seed."""

import io

import numpy as np
from PIL import Image


def picture(seed, size=16):
    """PNG bytes of a random picture."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def smooth_picture(seed, size=96):
    """A smooth picture in strong colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.BICUBIC)
