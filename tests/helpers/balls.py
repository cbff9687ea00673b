"""Pictures of a ball of one of 8 colours on smooth noise, 16 x 16, with captions: a very small CLIP learns them in
seconds."""

import io

import numpy as np
from PIL import Image

from shards.build import shapes

SIDE = 16
COLOURS = {**shapes.COLOURS, "black": (10, 10, 10), "orange": (240, 130, 20)}
FORMS = ("a photo of {}", "{}", "there is {}", "{} on the ground", "my own {}")


def balls(out, pairs, test, seed=0):
    """Build the data set in OUT, in the layout of shards.build.shapes."""
    made_by = {"data": "balls", "pairs": pairs, "test": test, "seed": seed}
    names = [f"{colour} ball" for colour in COLOURS]
    templates = ["a {c}", "there is a {c}"]
    shapes.build(out, made_by, lambda: (render(0, pairs, seed), render(pairs, test, seed), names), templates)


def smooth_noise(rng, count, slope=1.5):
    """float (N, SIDE, SIDE, 3) of variance 1: amplitudes fall with the frequency, as in natural pictures."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None]) + 1 / SIDE
    spectrum = np.fft.fft2(rng.normal(size=(count, SIDE, SIDE, 3)), axes=(1, 2)) / frequency[..., None] ** slope
    smooth = np.fft.ifft2(spectrum, axes=(1, 2)).real
    return smooth / smooth.std((1, 2, 3), keepdims=True)


def render(start, count, seed):
    """Yield the samples from number `start` on."""
    rng = np.random.default_rng([seed, start])
    noise, label_N = 40 * smooth_noise(rng, count), rng.integers(0, len(COLOURS), count)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for number, (noise_HWC, label) in enumerate(zip(noise, label_N.tolist())):
        radius = rng.uniform(4, 6.5)
        y, x = rng.uniform(radius - 1, SIDE - radius + 1, 2)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        colour, tint = list(COLOURS)[label], rng.normal(0, 8, 3)
        pixels = np.where(inside[..., None], np.array(COLOURS[colour]) + tint + 0.3 * noise_HWC, 128 + noise_HWC)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        text = FORMS[rng.integers(len(FORMS))].format(f"a {colour} ball")
        yield {"__key__": f"{start + number:06d}", "png": file.getvalue(), "cls": label, "txt": text}
