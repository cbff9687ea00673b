"""Colours changed on the device are those changed where the view was read, up to rounding."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shards.samples.colour import NUMBERS, as_numbers, coloured_batch
from shards.views.augment import ImageAugment, coloured, drawn_view, sample_rng
from tests.helpers.pictures import smooth_picture

OFF = dict(jitter=0, grey=0, blur=0)
ONE = [
    *(
        dict(OFF, jitter=1, brightness=0, contrast=0, saturation=0, hue=0) | {name: 0.5}
        for name in ("brightness", "contrast", "saturation")
    ),
    dict(OFF, jitter=1, brightness=0, contrast=0, saturation=0, hue=0.1),
    dict(OFF, grey=1),
    dict(OFF, blur=1),
    dict(jitter=0.8, grey=0.2, blur=0.5),
]


def both(settings, count=40, size=64):
    """uint8 (N, 3, size, size) twice: the same views coloured one by one, and as a batch."""
    augment = ImageAugment(**settings)
    drawn = [drawn_view(smooth_picture(n), size, sample_rng(0, 0, 0, n, 1), augment) for n in range(count)]
    one = np.stack([coloured(pixels, colour).transpose(2, 0, 1) for pixels, colour in drawn])
    pixels = torch.from_numpy(np.stack([pixels.transpose(2, 0, 1) for pixels, _ in drawn]))
    numbers = torch.from_numpy(np.stack([as_numbers(colour) for _, colour in drawn]))
    return torch.from_numpy(one), coloured_batch(pixels, numbers)


@pytest.mark.parametrize("settings", ONE)
def test_the_same_view_wherever_its_colours_are_changed(settings):
    one, batch = both(settings)
    off = (one.int() - batch.int()).abs().float()
    assert batch.dtype == torch.uint8 and off.mean() < 1.5 and off.flatten(1).mean(1).max() < 4
    assert (off <= 8).float().mean() > 0.98
    one, batch = one.float(), batch.float()
    assert torch.allclose(one.mean((0, 2, 3)), batch.mean((0, 2, 3)), atol=1)
    assert torch.allclose(one.std((0, 2, 3)), batch.std((0, 2, 3)), atol=1)


def test_nothing_drawn_changes_nothing():
    one, batch = both(OFF)
    assert torch.equal(one, batch)


def test_a_row_does_not_depend_on_the_others():
    _, whole = both(ONE[-1], 12)
    _, part = both(ONE[-1], 5)
    assert torch.equal(whole[:5], part)


def test_it_stays_on_the_gpu():
    with FakeTensorMode():
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        assert coloured_batch(images, torch.zeros(4, NUMBERS, device="cuda")).device.type == "cuda"
        with pytest.raises(RuntimeError):
            coloured_batch(images, torch.zeros(4, NUMBERS))
