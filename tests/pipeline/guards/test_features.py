"""The spectrum of a picture: in which octave and colour a wave is."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.guards.features import NOISE, cosines, octaves, spectrum

HEIGHT, WIDTH = 32, 48


def level(energy):
    """The byte of a mean energy."""
    return 255 * (np.log(energy + NOISE) / 24 + 0.5)


def wave(down, across, colour):
    """uint8 (1, 3, HEIGHT, WIDTH): one cosine around 0.5, of amplitude colour / 4 in each channel."""
    y_H1 = np.cos(np.pi * (np.arange(HEIGHT) + 0.5) * down / HEIGHT)[:, None]
    x_W = np.cos(np.pi * (np.arange(WIDTH) + 0.5) * across / WIDTH)
    light_CHW = 0.5 + np.array(colour)[:, None, None] / 4 * y_H1 * x_W
    return torch.from_numpy((255 * light_CHW).round().astype(np.uint8))[None]


@given(st.integers(1, HEIGHT - 1), st.integers(1, WIDTH - 1), st.sampled_from([(1, 1, 1), (1, -1, 0), (1, 1, -2)]))
def test_a_wave_is_in_the_octave_of_its_frequencies_and_in_its_colour(down, across, colour):
    found_CNN = spectrum(wave(down, across, colour)).reshape(3, 6, 7).numpy().astype(float)
    red, green, blue = colour
    amplitudes = np.array([(red + green + blue) / 3, red - green, (red + green) / 2 - blue])
    row, column = (int(np.floor(np.log2(frequency))) + 1 for frequency in (down, across))
    numbers = int((octaves(HEIGHT)[row] > 0).sum() * (octaves(WIDTH)[column] > 0).sum())
    expected_C = level((amplitudes / 4) ** 2 * HEIGHT * WIDTH / 4 / numbers)
    np.testing.assert_allclose(found_CNN[:, row, column], expected_C, atol=3)
    assert abs(found_CNN[0, 0, 0] - level(0.5**2 * HEIGHT * WIDTH)) < 3  # the mean light
    # The rest is what rounding to 256 levels makes, a thousandth of the wave.
    found_CNN[:, row, column] = found_CNN[0, 0, 0] = level(0)
    assert (found_CNN < level(0.02)).all()


def test_cosines_are_orthonormal_and_octaves_are_means():
    for side in (1, 2, 3, 32, 224):
        torch.testing.assert_close(cosines(side) @ cosines(side).T, torch.eye(side), atol=1e-5, rtol=0)
        torch.testing.assert_close(octaves(side).sum(1), torch.ones(len(octaves(side))))
        assert (octaves(side) > 0).sum(0).tolist() == [1] * side
