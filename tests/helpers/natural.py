"""Random pictures with the correlations of natural ones, for the tests of guards."""

import numpy as np

SIDE = 32


def pictures(rng, count):
    """uint8 (N, 3, SIDE, SIDE) with the correlations of natural pictures: energy falls with the square of the
    frequency."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None]) + 1 / SIDE
    spectrum = np.fft.fft2(rng.normal(size=(count, 3, SIDE, SIDE))) / frequency**1.5
    smooth = np.fft.ifft2(spectrum).real
    smooth = smooth / smooth.std((1, 2, 3), keepdims=True)
    return np.clip(128 + 45 * smooth, 0, 255).astype(np.uint8)
